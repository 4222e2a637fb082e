"""An engine that loses one of its processes, and an answer that vLLM ends, end with an error."""

import json
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import httpx

from baco import Baco
from baco.cli import run
from baco.sampling import constraint
from tests_vllm.engines import apart, in_vllm
from tests_vllm.serving import WAIT, baco, kill_a_worker, served

PROMPT = "Where should I go this summer?"
TWO = ("--engine", "tensor_parallel_size=2", "--engine", "block-size=32")
LONG = 200  # tokens: far more than come before the kill
# Too complex once the first three letters are written.
RULES = "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(30))
EXPLODING = f'start: /[a-z][a-z][a-z]/ a0\n{RULES}a30: "x"'


def test_a_command_prints_what_was_written_and_ends_with_one_line(
    random_pair: Callable[[str], Path],
) -> None:
    pair = str(random_pair("llama"))
    options = ("--pair", pair, "-r", "Base", "-t", "0", "--max-tokens", str(LONG))
    command = baco("generate", PROMPT, *options, "--backend", "vllm", *TWO)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        begun = process.stdout.read(1)
        kill_a_worker()
        rest, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 2, errors
    assert begun + rest
    assert "baco: 1 of 1 answers broke off: the vLLM engine ended" in " ".join(errors.split())


def test_a_server_answers_502_and_is_not_healthy(random_pair: Callable[[str], Path]) -> None:
    command = baco("serve", "--pair", str(random_pair("llama")), "--backend", "vllm", *TWO)
    body = {"messages": [{"role": "user", "content": PROMPT}], "router": "Base"}
    with served(command) as url, httpx.Client(base_url=url, timeout=WAIT) as client:
        streamed = body | {"stream": True, "max_tokens": LONG}
        with client.stream("POST", "/v1/chat/completions", json=streamed) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: {"))
            next(lines)
            kill_a_worker()
            *_, last = lines
        replies = [json.loads(last.removeprefix("data: "))]
        for _ in range(2):
            refused = client.post("/v1/chat/completions", json=body)
            assert refused.status_code == 502
            replies.append(refused.json())
        for reply in replies:
            assert reply["error"]["type"] == "server_error"
            assert "the vLLM engine ended" in reply["error"]["message"]
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "ended"})


REFUSED = {
    "tensor_paralel_size=2": "did you mean tensor_parallel_size?",
    "tensor_parallel_size=two": "vLLM does not start: tensor_parallel_size: ",
    "model=other": "leave out model",
}


def refusals() -> list[tuple[int, str]]:
    """Exit codes and errors of commands."""
    refused = []
    for given in REFUSED:
        with redirect_stderr(StringIO()) as err:
            code = run(["generate", PROMPT, "--backend", "vllm", "--engine", given])
        refused.append((code, err.getvalue().splitlines()[-1]))
    return refused


def test_a_wrong_engine_argument_is_one_line() -> None:
    for (code, line), message in zip(apart(refusals), REFUSED.values(), strict=True):
        assert code == 2
        assert message in line


def answers_beside_a_structure_that_explodes(baco: Baco) -> Any:
    """The errors of its answers, and the answers beside them next to those without it."""
    constraint._REHEARSED = 0  # it is refused before it is decoded otherwise
    sampling: dict[str, Any] = {"seed": 1, "n": 2, "max_tokens": 20, "router": baco.router("P:0.5")}
    alone = baco.generate("Name a town", **sampling)
    decoder = baco.decoder()
    tickets = [decoder.submit("Hi", grammar=EXPLODING, **sampling)]
    tickets.append(decoder.submit("Name a town", **sampling))
    ended: dict[int, list[Any]] = {ticket: [] for ticket in tickets}
    while decoder.busy:
        for chunk in decoder.step():
            if (c := chunk.completion) is not None:
                ended[chunk.prompt].append(c)
    failed, kept = (ended[ticket] for ticket in tickets)
    errors = [(c.finish_reason, c.error_kind, c.error) for c in failed]
    return errors, sorted(c.text for c in kept), sorted(c.text for c in alone)


def test_a_structure_that_turns_out_too_complex_ends_its_answers_in_an_error() -> None:
    errors, kept, alone = in_vllm(answers_beside_a_structure_that_explodes, "demo", {})
    message = "the answer's grammar cannot be followed; the log says why"
    assert errors == [("error", "structure", message)] * 2
    assert kept == alone
