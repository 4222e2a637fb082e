"""An engine that loses one of its processes ends its answers, and says so."""

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


def test_a_command_ends_in_one_line_with_what_there_was(
    random_pair: Callable[[str], Path],
) -> None:
    pair = str(random_pair("llama"))
    asked = ("--pair", pair, "-r", "Base", "-t", "0", "--max-tokens", str(LONG))
    command = baco("generate", PROMPT, *asked, "--backend", "vllm", *TWO)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        begun = process.stdout.read(1)
        kill_a_worker()
        said, told = process.communicate(timeout=WAIT)
    assert process.returncode == 2, told
    assert begun + said
    assert "baco: 1 of 1 answers broke off: the vLLM engine ended" in " ".join(told.split())


def test_a_server_answers_502_and_is_not_healthy(random_pair: Callable[[str], Path]) -> None:
    command = baco("serve", "--pair", str(random_pair("llama")), "--backend", "vllm", *TWO)
    body = {"messages": [{"role": "user", "content": PROMPT}], "router": "Base"}
    with served(command) as url, httpx.Client(base_url=url, timeout=WAIT) as client:
        asked = body | {"stream": True, "max_tokens": LONG}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: {"))
            next(lines)
            kill_a_worker()
            *_, last = lines
        told = [json.loads(last.removeprefix("data: "))]
        for _ in range(2):
            refused = client.post("/v1/chat/completions", json=body)
            assert refused.status_code == 502
            told.append(refused.json())
        for each in told:
            assert each["error"]["type"] == "server_error"
            assert "the vLLM engine ended" in each["error"]["message"]
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "ended"})


REFUSED = {
    "tensor_paralel_size=2": "did you mean tensor_parallel_size?",
    "tensor_parallel_size=two": "vLLM does not start: tensor_parallel_size: ",
    "model=other": "leave out model",
}


def refusals() -> list[tuple[int, str]]:
    """Exit codes and errors of commands."""
    told = []
    for given in REFUSED:
        with redirect_stderr(StringIO()) as err:
            code = run(["generate", PROMPT, "--backend", "vllm", "--engine", given])
        told.append((code, err.getvalue().splitlines()[-1]))
    return told


def test_an_engine_argument_that_cannot_be_is_one_line() -> None:
    for (code, line), says in zip(apart(refusals), REFUSED.values(), strict=True):
        assert code == 2
        assert says in line
