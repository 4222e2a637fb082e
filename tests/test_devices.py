"""Each model may be on a device of its own; tokens are drawn where the aligned model is.

No second device is at hand where tests run, so a stand-in plays it: tensors of its own kind that
refuse to meet others until they have been moved.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from baco import Baco, BacoError
from baco.cli import run
from baco.engine.budget import cache_bytes
from baco.engine.verify import Verifier
from baco.models.loading import placements
from baco.models.model import PairModel
from tests.pairs import PairFolder
from tests.test_engine import tokens_and_sources

PROMPT = "What do you recommend for a rainy day?"
ROUTERS = ("P-Punc:0.6", "Gap:0.02", "Rand:0.5", "Base", "Aligned", "Nudging:0.5")


class OtherDeviceTensor(torch.Tensor):
    """A tensor on another device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if func is torch.Tensor.to:
            return torch.Tensor.to(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs)
        if any(type(x) is torch.Tensor and x.dim() > 0 for x in tensors):
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")
        return cast(Any, super()).__torch_function__(func, types, args, kwargs)


class FarModel(PairModel):
    """A model with its logits on another device until they are moved."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu", 0)  # the same place by another name

    def run(self, **inputs: Any) -> Any:
        assert type(inputs["input_ids"]) is torch.Tensor
        output = super().run(**inputs)
        output.logits = output.logits.as_subclass(OtherDeviceTensor)
        return output


def far(model: PairModel) -> PairModel:
    names = ("name", "model", "tokenizer", "adapter_off", "vocab_size")
    fields = {name: getattr(model, name) for name in names}
    return FarModel(**fields, unknown_ids=model.unknown_ids.as_subclass(OtherDeviceTensor))


@pytest.fixture(scope="module")
def near(random_pair: Callable[..., PairFolder]) -> Baco:
    folder = random_pair("olmo2", noise=0.3)  # its base model owns fewer tokens
    where: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    return Baco.load(**where, dtype="float32", device="base=cpu,aligned=cpu")


def test_rows_are_moved_to_the_device_that_draws(near: Baco) -> None:
    apart = replace(near, pair=replace(near.pair, base=far(near.pair.base)))
    for router in ROUTERS:
        settings: dict[str, Any] = {"n": 3, "seed": 2, "max_tokens": 24}
        expected = near.generate(PROMPT, router=router, **settings)
        got = apart.generate(PROMPT, router=router, **settings)
        assert [tokens_and_sources(c) for c in got] == [tokens_and_sources(c) for c in expected]


def test_both_devices_start_before_either_result_is_awaited(
    near: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waited(*_: Any) -> bool:
        raise AssertionError("waited for the first model's rows")

    monkeypatch.setattr(Verifier, "one_suffices", waited)
    apart = replace(near, pair=replace(near.pair, base=far(near.pair.base)))
    (answer,) = apart.generate(PROMPT, router="P-Punc:0.6", seed=2, max_tokens=8)
    assert answer.error is None
    (answer,) = near.generate(PROMPT, router="P-Punc:0.6", seed=2, max_tokens=8)
    assert answer.error is not None
    assert "AssertionError" in answer.error


def test_the_stand_in_refuses_tensors_that_were_not_moved() -> None:
    away, here = torch.ones(2).as_subclass(OtherDeviceTensor), torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.where(here > 0, here, away)
    assert type(away.to("cpu") + here) is torch.Tensor
    assert type(cast(Any, away + away)) is OtherDeviceTensor


def test_each_model_is_placed_on_the_requested_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as if every device were there
    placed = placements("float32", "base=cuda:0,aligned=cuda:1", None, {})
    assert {model: str(place.device) for model, place in placed.items()} == {
        "base": "cuda:0",
        "aligned": "cuda:1",
    }


def test_a_missing_device_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(BacoError, match="device 'warp:3' cannot be used here"):
        Baco.load("demo", device={"aligned": "warp:3"})
    assert run(["generate", PROMPT, "--device", "left=cpu"]) == 2
    assert "device names 'left'" in capsys.readouterr().err


def test_a_share_of_memory_refers_to_the_fuller_device(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 1000, "meta": 400}
    monkeypatch.setattr("baco.engine.budget.free_bytes", lambda device: free[device.type])
    assert cache_bytes("50%", [torch.device("cpu"), torch.device("meta")]) == 200
