"""A step waits for the device at most twice, with any router and sampling, recorded or not."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baco import Baco
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import KVCache
from baco.kv_cache.slots import SlotCache
from baco.models.forward.cuda_graphs import CudaGraphForward, Step
from baco.models.forward.dense import DenseForward
from baco.models.forward.selection import ClampedForward
from baco.models.model import PairModel
from tests.fake_device import FAR, FakeDeviceTensor, Waits, near
from tests.pairs import PairFolder
from tests.test_engine import tokens_and_sources

PROMPT = "What do you recommend for a rainy day?"


class FarModel(PairModel):
    """A model on the device: its tokens and its rows of logits are there."""

    @property
    def device(self) -> torch.device:
        return FAR

    def new_cache(self) -> KVCache:
        store = super().new_cache()
        assert isinstance(store, BatchedKVCache)
        if store.static_shapes:
            return store
        forward = store.forward

        def there(tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
            read = tokens.near if isinstance(tokens, FakeDeviceTensor) else tokens
            return FakeDeviceTensor(forward(read, cache, keep))

        store.forward = there
        return store


def far(model: PairModel) -> PairModel:
    assert model.can_roll_back  # tried out on the host
    far_model = FarModel(**{field.name: getattr(model, field.name) for field in fields(model)})
    far_model.__dict__["_forward"] = model._forward
    far_model.unknown_ids = FakeDeviceTensor(model.unknown_ids)
    far_model.__dict__["_has_unknown_ids"] = model._has_unknown_ids
    return far_model


class FarDense(DenseForward):
    """A `DenseForward` on the device."""

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        return self.read(*self.inputs(near(tokens), cache), keep)

    def read(self, tokens: Tensor, columns: Tensor, *rest: Any, **more: Any) -> Tensor:
        return FakeDeviceTensor(super().read(near(tokens), near(columns), *rest, **more))


class Reruns:
    """Runs the step itself instead of a recording."""

    def __init__(self) -> None:
        self.runs = 0

    def record(self, step: Step) -> Step:
        def run() -> None:
            self.runs += 1
            step()

        return run

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forget(self) -> None: ...


def recorded(model: PairModel, recorder: Reruns) -> PairModel:
    """A model on the device after `compile`."""
    far_model = far(model)
    forward = model._forward
    assert isinstance(forward, ClampedForward)
    lean: Any = copy.copy(forward.forward)
    lean.__class__ = FarDense
    far_model.__dict__["_forward"] = ClampedForward(far_model, CudaGraphForward(lean, recorder))
    return far_model


@pytest.fixture(scope="module")
def here(random_pair: Callable[..., PairFolder]) -> Baco:
    folder = random_pair("llama", noise=0.2)
    return Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")


@pytest.fixture(scope="module")
def there(here: Baco) -> Baco:
    pair = replace(here.pair, base=far(here.pair.base), aligned=far(here.pair.aligned))
    return replace(here, pair=pair)


def steps(baco: Baco, **settings: Any) -> Iterator[tuple[int, list[Any]]]:
    """Waits of every step in which no row joins or leaves; at the end the completions."""
    decoder = Decoder(baco.pair, Engine(baco.pair, memory="64MiB"))
    decoder.submit(PROMPT, **settings)
    done: list[Any] = []
    while decoder.busy:
        Waits.seen.clear()
        running = decoder.engine.running
        chunks = decoder.step()
        done += [chunk.completion for chunk in chunks if chunk.completion is not None]
        if running == decoder.engine.running == settings["n"]:
            yield sum(Waits.seen.values()), done
    yield 0, done


@pytest.mark.parametrize("router", ["P-Punc:0.6", "H-FC:2", "Rand:0.5", "Aligned", "Nudging:0.5"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"top_k": 20}, {"top_p": 0.9}])
def test_a_step_waits_for_the_device_at_most_twice(
    here: Baco, there: Baco, router: str, sampling: dict[str, Any]
) -> None:
    at_most_twice(here, there, router, sampling)


@pytest.mark.parametrize("router", ["P-Punc:0.6", "Rand:0.5", "Aligned"])
def test_a_step_with_cuda_graphs_waits_at_most_twice(here: Baco, router: str) -> None:
    recorder = Reruns()
    base, aligned = (recorded(model, recorder) for model in (here.pair.base, here.pair.aligned))
    there = replace(here, pair=replace(here.pair, base=base, aligned=aligned))
    at_most_twice(here, there, router, {})
    assert recorder.runs > 10


def at_most_twice(here: Baco, there: Baco, router: str, sampling: dict[str, Any]) -> None:
    endless = dict.fromkeys(here.pair.end_ids, -100.0)
    settings = {"n": 3, "seed": 1, "max_tokens": 40, "logit_bias": endless, **sampling}
    expected = here.generate(PROMPT, router=router, **settings)
    with Waits():
        seen = list(steps(there, router=there.router(router), **settings))
    waits, done = [count for count, _ in seen[:-1]], seen[-1][1]
    assert len(waits) > 4
    assert max(waits) <= 2
    assert min(waits) >= 1
    assert [
        tokens_and_sources(completion)[:2]
        for completion in sorted(done, key=lambda completion: completion.sample)
    ] == [tokens_and_sources(completion)[:2] for completion in expected]


def test_every_transfer_from_the_device_is_counted() -> None:
    with Waits():
        tensor = torch.zeros(2, 3, device=FAR)
        for transfer in (
            tensor.tolist,
            lambda: bool((tensor > 0).any()),
            tensor[0, 0].item,
            tensor.cpu,
            tensor.nonzero,
            lambda: tensor[tensor > 0],
            lambda: torch.tensor([1], device=FAR),
            lambda: torch.ones(2).to(FAR),
        ):
            Waits.seen.clear()
            transfer()
            assert sum(Waits.seen.values()) == 1
        Waits.seen.clear()
        assert type(torch.ones(3).to(FAR, non_blocking=True) + tensor) is FakeDeviceTensor
        assert sum(Waits.seen.values()) == 0
        with pytest.raises(RuntimeError, match="meets"):
            torch.where(torch.ones(2, 3) > 0, tensor, tensor)
