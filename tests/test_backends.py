import dataclasses
from typing import Any

import pytest
from fastapi.testclient import TestClient

from baco import Baco, BacoError
from baco.backends.base import Capabilities
from baco.calibration.store import Calibration
from baco.cli import options as opt
from baco.cli import run
from baco.engine.engine import Engine
from baco.engine.sequence import SequenceState
from baco.errors import ErrorKind, Failure
from baco.models.known_pairs import find_pair
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair
from baco.serve.app import create_app
from baco.serve.settings import Settings

PROMPT = "Recommend a summer destination"
OF_LOCAL = "memory, draft, compile and enable_prefix_caching are options of the local backend"


@pytest.fixture(scope="module")
def described() -> Pair:
    return load_weightless_pair(find_pair("demo"), {"base": "there", "aligned": "elsewhere"})


@dataclasses.dataclass
class Borrowed:
    """A backend that decodes with the models of another pair."""

    pair: Pair
    capabilities: Capabilities = dataclasses.field(default_factory=lambda: Capabilities("borrowed"))
    closed: bool = False
    ended: str | None = None

    def engine(self) -> Engine:
        return Engine(self.pair)

    def close(self) -> None:
        self.closed = True


def test_a_pair_without_weights_answers_through_a_backend_as_the_pair_itself_does(
    demo: Baco, described: Pair
) -> None:
    backend = Borrowed(demo.pair)
    baco = Baco(described, backend=backend)
    for router in (None, "P-Punc:0.4", "Aligned"):
        there = baco.generate(PROMPT, n=3, router=router, seed=5)
        here = demo.generate(PROMPT, n=3, router=router, seed=5)
        assert [(a.token_ids, a.sources, a.text, a.router) for a in there] == [
            (a.token_ids, a.sources, a.text, a.router) for a in here
        ]
    assert baco.capabilities.name == "borrowed"
    assert demo.capabilities == Capabilities(
        "local",
        samplers=True,
        thinking=True,
        combiners=True,
        stateful=True,
        structured=True,
        hidden_states=True,
    )
    baco.close()
    assert backend.closed


def test_a_pair_without_weights_keeps_its_dial_its_ends_and_its_windows(
    demo: Baco, described: Pair
) -> None:
    assert Calibration.load(described) == Calibration.load(demo.pair)
    assert described.end_ids == demo.pair.end_ids
    assert described.base.context == demo.pair.base.context
    assert described.weights_formats == {"base": "by there", "aligned": "by elsewhere"}


def test_calls_that_need_local_weights_are_refused_by_name(described: Pair) -> None:
    with pytest.raises(BacoError, match=r"runs in elsewhere: .* needs --backend local"):
        described.aligned.score([1, 2])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--backend", "slurm"),
            "unknown backend 'slurm': use one of local, llamacpp, remote, vllm",
        ),
        (("--backend", "ray"), "give it to 'baco batch' or 'baco sweep'; here use one of local"),
        (("--base-url", "http://127.0.0.1:1/v1"), "base_url is an option of the remote backend"),
        (
            ("--engine", "seed=1"),
            "engine is an option of the vllm backend: give backend vllm with it",
        ),
        (("--backend", "remote", "--engine", "seed=1"), "the remote backend takes no engine"),
        (("--backend", "vllm", "--engine", "seed"), "--engine seed: give NAME=VALUE"),
        (
            ("--backend", "remote", "--compile"),
            OF_LOCAL,
        ),
        (
            ("--backend", "vllm", "--memory", "1GiB"),
            OF_LOCAL,
        ),
    ],
)
def test_an_unknown_backend_or_an_option_of_another_is_one_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", PROMPT, *arguments]) == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_engine_arguments_are_names_and_values() -> None:
    assignments = ["tensor-parallel-size=2", "quantization=fp8", 'speculative_config={"n": "x"}']
    assert opt.load_arguments(opt.BackendOptions(engine=assignments)) == {
        "engine": {
            "tensor_parallel_size": 2,
            "quantization": "fp8",
            "speculative_config": {"n": "x"},
        }
    }
    assert opt.load_arguments(opt.BackendOptions()) == {}


def test_a_server_with_an_ended_engine_is_not_healthy(demo: Baco, described: Pair) -> None:
    backend = Borrowed(demo.pair)
    with TestClient(create_app(Baco(described, backend=backend), Settings())) as client:
        assert client.get("/health").status_code == 200
        backend.ended = "the engine ended"
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "ended"})


class Failing(Engine):
    """Ends every answer in an error after its first token."""

    failure = Failure("server", "the engine ended")

    def step(self) -> list[SequenceState]:
        grew = super().step()
        for sequence in grew:
            self.stop(sequence, 1)
            sequence.finish_reason, sequence.error = "error", self.failure
        return grew


@pytest.mark.parametrize("model", ["baco", "baco/string-seed"])
@pytest.mark.parametrize(
    ("kind", "status"), [("structure", 400), ("process", 500), ("server", 502)]
)
def test_the_kind_of_an_answers_error_decides_its_status_whatever_its_message(
    demo: Baco,
    described: Pair,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    kind: ErrorKind,
    status: int,
) -> None:
    message = "the answer's regex cannot be followed: no"
    monkeypatch.setattr(Failing, "failure", Failure(kind, message))
    backend = Borrowed(demo.pair, Capabilities("borrowed", structured=True))
    monkeypatch.setattr(backend, "engine", lambda: Failing(demo.pair))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "model": model}
    if model == "baco":
        body["structured_outputs"] = {"regex": "[a-z]+"}
    with TestClient(create_app(Baco(described, backend=backend), Settings())) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, message)


@pytest.mark.parametrize("form", [(), ("--json",), ("--compare",)])
def test_a_command_shows_answers_that_broke_off_and_exits_with_2(
    form: tuple[str, ...],
    demo: Baco,
    described: Pair,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backend = Borrowed(demo.pair)
    monkeypatch.setattr(backend, "engine", lambda: Failing(demo.pair))
    monkeypatch.setattr(opt, "load", lambda *_, **__: Baco(described, backend=backend))
    assert run(["generate", PROMPT, "-r", "P-Punc:0.4", *form]) == 2
    shown = capsys.readouterr()
    assert "answers broke off: the engine ended" in " ".join(shown.err.split())
    assert shown.out.strip()
