"""An engine that loses one of its processes ends its answers with an error."""

import json
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import httpx

from baco.cli import run
from tests_vllm.engines import apart
from tests_vllm.serving import WAIT, baco, kill_a_worker, served

PROMPT = "Where should I go this summer?"
TWO = ("--engine", "tensor_parallel_size=2", "--engine", "block-size=32")
LONG = 200  # tokens: far more than come before the kill


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
