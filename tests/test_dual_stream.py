"""Both forwards at once on one device: ordered where necessary, and only where both run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from baco import Baco
from baco.engine.dual_stream import DualStream
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.runner import SkipStats
from baco.outputs import Completion
from baco.source import Source
from tests.fake_cuda_graphs import CUDA, Cuda, FakeStream, Races
from tests.test_cuda_graphs import PROMPT, ROUTERS
from tests.test_engine import tokens_and_sources


@pytest.fixture
def crossed(monkeypatch: pytest.MonkeyPatch) -> list[FakeStream]:
    """The streams that tensors were recorded on."""
    seen: list[FakeStream] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: seen.append(stream))
    return seen


class Counted(DualStream):
    """Counts its uses."""

    times = 0

    def run(
        self, first: Callable[[], Tensor], second: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        self.times += 1
        return super().run(first, second)


class NeverSkips(SkipStats):
    """Statistics by which one model's logits never suffice."""

    def rarely_sufficient(self, model: Source) -> bool:
        return True


def decode(
    baco: Baco, cuda: Cuda, *, always: bool = False, **settings: Any
) -> tuple[list[Completion], Engine, Counted]:
    decoder = baco.decoder()
    assert isinstance(decoder.engine, IsolatingEngine)
    engine = decoder.engine.engine
    assert isinstance(engine, Engine)
    assert engine._runner._dual_stream is None  # on a CPU
    assert engine._runner.has_static_shapes(("base", "aligned"))
    dual = engine._runner._dual_stream = Counted(CUDA, cuda, FakeStream())
    if always:
        engine._runner._skips = NeverSkips()
    router = baco.router(settings.pop("router"))
    decoder.submit(PROMPT, router=router, **settings)
    done: list[Completion] = []
    while decoder.busy:
        done += [c.completion for c in decoder.step() if c.completion is not None]
    return sorted(done, key=lambda c: c.sample), engine, dual


@pytest.mark.parametrize("router", ROUTERS)
def test_no_tensor_is_used_on_both_streams_without_order(
    recorded: Baco, plain: Baco, cuda: Cuda, crossed: list[FakeStream], router: str
) -> None:
    for seed, n in ((1, 1), (2, 3)):
        settings: dict[str, Any] = {"n": n, "seed": seed, "max_tokens": 16, "router": router}
        with Races(cuda) as races:
            done, _, dual = decode(recorded, cuda, always=True, **settings)
        assert races.unordered == []
        assert [tokens_and_sources(c) for c in done] == [
            tokens_and_sources(c) for c in plain.generate(PROMPT, **settings)
        ]
        if router != "Aligned":  # one model never runs
            assert dual.times > 0
            assert races.streams[dual._stream] > 0
            assert crossed[-dual.times :] == [cuda.main] * dual.times


@torch.inference_mode()
def test_the_race_detector_finds_unordered_work() -> None:
    cuda = Cuda()
    side, shared = FakeStream(), torch.zeros(3)

    def touched(*, waits: bool, works: Callable[[], Any]) -> list[str]:
        with Races(cuda) as races:
            cuda.main.wait_stream(side)
            shared.add_(1)
            if waits:
                side.wait_stream(cuda.main)
            with cuda.stream(side):
                works()
        return list(races.unordered)

    for works in (lambda: shared + 1, lambda: shared.mul_(2), partial(torch.exp, shared[1:])):
        assert touched(waits=False, works=works)
        assert not touched(waits=True, works=works)
    assert not touched(waits=False, works=lambda: torch.ones(2) + 1)


def test_both_forwards_wait_for_earlier_work_and_not_for_each_other(
    crossed: list[FakeStream],
) -> None:
    cuda, side = Cuda(), FakeStream()
    dual = DualStream(CUDA, cuda, side)
    clocks: dict[str, dict[FakeStream, int]] = {}

    def work(name: str) -> Tensor:
        stream = cuda.current_stream()
        stream.clock[stream] += 1
        clocks[name] = dict(stream.clock)
        return torch.tensor([len(clocks)])

    work("before")
    one, other = dual.run(partial(work, "one"), partial(work, "other"))
    work("after")
    assert (int(one), int(other)) == (2, 3)
    assert clocks["one"] == {cuda.main: 2}
    assert clocks["other"] == {side: 1, cuda.main: 1}  # after what came before alone
    assert clocks["after"] == {cuda.main: 3, side: 1}
    assert crossed == [cuda.main]


def test_a_model_that_cannot_matter_is_still_skipped(recorded: Baco, cuda: Cuda) -> None:
    settings: dict[str, Any] = {"n": 1, "seed": 1, "max_tokens": 60, "router": "P:0.0001"}
    settings["logit_bias"] = dict.fromkeys(recorded.pair.end_ids, -100.0)
    _, engine, dual = decode(replace(recorded), cuda, **settings)
    assert dual.times < 3
    assert engine.stats.forwards["base"] < engine.stats.forwards["aligned"]


@pytest.mark.usefixtures("crossed")
def test_both_models_run_concurrently_if_one_rarely_suffices(recorded: Baco, cuda: Cuda) -> None:
    settings: dict[str, Any] = {"n": 8, "seed": 1, "max_tokens": 60, "router": "Rand:0.5"}
    settings["logit_bias"] = dict.fromkeys(recorded.pair.end_ids, -100.0)
    _, _, dual = decode(recorded, cuda, **settings)
    assert dual.times > 10


@pytest.mark.usefixtures("crossed")
def test_with_explain_both_models_run_concurrently(recorded: Baco, cuda: Cuda) -> None:
    settings: dict[str, Any] = {"n": 1, "seed": 1, "max_tokens": 12, "router": "P:0.5"}
    _, engine, dual = decode(recorded, cuda, explain=True, **settings)
    assert dual.times > 0
    assert engine._runner._skips == SkipStats()  # not checked, nor counted


def test_a_rare_success_is_checked_for_again_now_and_then() -> None:
    stats, checked = SkipStats(), []
    for _ in range(200):
        rare = stats.rarely_sufficient("base")
        stats.update("base", None if rare else False)
        checked.append(not rare)
    assert not stats.rarely_sufficient("aligned")
    checks = [at for at, was_checked in enumerate(checked) if was_checked]
    assert 10 < len(checks) < 40
    assert checks[-1] > 150
    for _ in range(3):
        stats.update("base", True)
    assert not stats.rarely_sufficient("base")
