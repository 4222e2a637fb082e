"""A pair on two of llama.cpp's own servers, which come in the wheel xllamacpp."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from baco import Baco
from baco.models.gguf_export import export_gguf
from baco.models.known_pairs import find_pair
from baco.source import MODELS
from tests.remoting import Backing, Door, listening, remote
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut
from tests.test_remote import ROUTERS, STORY, alike

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: make test-llamacpp")

PROMPT = "Recommend a summer destination"
# Routers that a naive loop over the same servers is run for: one of each quantity.
NAIVE = ("P:0.5", "H:1.5", "Gap:0.02", "P-Punc:0.6", "Rand:0.5")
SIZE = 2048


@contextmanager
def llama_server(file: Path) -> Iterator[str]:
    """The address of a server of one GGUF file."""
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(file)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@contextmanager
def pair_on_servers(folder: Path, pair: str = "demo") -> Iterator[tuple[Baco, dict[str, str]]]:
    """The pair whose models are GGUF files in a folder, each on a server, and their addresses."""
    with ExitStack() as stack:
        urls: dict[str, str] = {
            source: stack.enter_context(llama_server(folder / f"{source}.gguf"))
            for source in MODELS
        }
        options = {f"{source}_url": url for source, url in urls.items()}
        yield stack.enter_context(remote(urls["base"], pair, **options)), urls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("servers") / "demo"
    export_gguf(find_pair("demo"), out, format="f32")
    return out


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[tuple[Baco, dict[str, str]]]:
    with pair_on_servers(folder) as running:
        yield running


@pytest.fixture(scope="module")
def demo() -> Baco:
    return Baco.load("demo", dtype="float32")


def generated(baco: Baco, prompt: str, **sampling: Any) -> list[tuple[Any, ...]]:
    return [
        (answer.token_ids, answer.sources, answer.text, answer.finish_reason, answer.error)
        for answer in baco.generate(prompt, seed=3, **sampling)
    ]


@pytest.mark.parametrize("router", ROUTERS)
def test_at_temperature_0_answers_are_those_of_this_process(
    servers: tuple[Baco, dict[str, str]], demo: Baco, router: str
) -> None:
    for prompt in (PROMPT, STORY):
        settings: dict[str, Any] = {"router": router, "temperature": 0}
        assert generated(servers[0], prompt, **settings) == generated(demo, prompt, **settings)


class OverHttp:
    """A model on a server whose whole row is requested at every token."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def score(self, ids: Sequence[int]) -> list[Tensor]:
        """The row after the last of some tokens, in a list."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": SIZE}
        reply = self._client.post("/v1/completions", json=body).json()
        row = torch.empty(SIZE)
        for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        return [row]


def test_quantised_models_answer_as_a_naive_loop_over_the_same_servers(tmp_path: Path) -> None:
    export_gguf(find_pair("demo"), tmp_path / "demo", format="q8_0")
    settings: dict[str, Any] = {"seed": 7, "temperature": 0.0, "max_tokens": 12}
    with pair_on_servers(tmp_path / "demo") as (loaded, urls):
        baco = without_turn_cut(loaded)
        models: dict[str, Any] = {source: OverHttp(url) for source, url in urls.items()}
        alone = replace(baco, pair=replace(baco.pair, **models))
        for router in NAIVE:
            (answer,) = baco.generate(PROMPT, router=router, **settings)
            expected = reference(alone, PROMPT, rules(baco.pair)[router], sample=0, **settings)
            assert tokens_and_sources(answer) == expected, router


@pytest.mark.parametrize(
    ("router", "temperature"), [("Base", 1.3), ("Base", 0.7), ("P-Punc:0.4", 1.3)]
)
def test_min_p_truncates_after_the_temperature(
    servers: tuple[Baco, dict[str, str]], demo: Baco, router: str, temperature: float
) -> None:
    settings: dict[str, Any] = {"router": router, "temperature": temperature, "min_p": 0.2}
    settings["max_tokens"] = 2
    mine = servers[0].generate(PROMPT, n=400, seed=1, **settings)
    expected = demo.generate(PROMPT, n=2000, seed=2, **settings)
    assert {answer.error for answer in mine} == {None}
    for tokens in (1, 2):
        counts = [Counter(str(a.token_ids[:tokens]) for a in each) for each in (mine, expected)]
        assert alike(*counts) > 0.001


def test_its_own_order_of_samplers_is_detected(servers: tuple[Baco, dict[str, str]]) -> None:
    """Left alone, it truncates before the temperature; the probe finds that."""

    def refuse_samplers(body: dict[str, Any]) -> Any:
        return (400, {}) if "samplers" in body else body

    loaded, urls = servers
    with (
        listening(Door(Backing(urls["base"]), refuse_samplers)) as url,
        remote(url, base_url=url, aligned_url=urls["aligned"]) as changed,
    ):
        backends: Any = loaded.backend, changed.backend
        first = [backend.models["base"].ability.truncates_first for backend in backends]
        assert first == [False, True]


@pytest.mark.parametrize("router", ["H:1.5", "H-Punc:1.2", "Gap:0.3"])
def test_few_log_probabilities_decide_as_whole_rows_do(
    servers: tuple[Baco, dict[str, str]], router: str
) -> None:
    loaded, urls = servers
    doors = {source: Door(Backing(url), lambda body: body) for source, url in urls.items()}
    with ExitStack() as stack:
        options = {
            f"{source}_url": stack.enter_context(listening(door)) for source, door in doors.items()
        }
        few = stack.enter_context(remote(options["base_url"], **options))
        for door in doors.values():
            door.bodies.clear()
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
        (answer,) = few.generate(PROMPT, router=router, **settings)
    requests = [body.get("logprobs", 0) for door in doors.values() for body in door.bodies]
    assert sum(top > 20 for top in requests) <= len(requests) / 5
    assert (list(answer.token_ids), list(answer.sources)) == whole(loaded, router, settings)


def whole(baco: Baco, router: str, settings: dict[str, Any]) -> tuple[list[int], list[str]]:
    """Tokens and sources where whole rows are requested, as for explanations."""
    decoder = baco.decoder()
    decoder.submit(PROMPT, router=baco.router(router), explain=True, **settings)
    tokens = []
    while decoder.busy:
        tokens += [token for chunk in decoder.step() for token in chunk.tokens]
    return [token.id for token in tokens], [str(token.source) for token in tokens]
