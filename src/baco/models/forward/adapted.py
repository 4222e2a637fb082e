"""A `DenseForward` under a low-rank adapter (LoRA, Hu et al. 2021).

The weights are those of the base model. To the output of an adapted linear layer, the adapter adds
scale · B A x. This is done for the rows of the model with the adapter alone, so that one forward
can read rows of both models.

It knows the layers of `peft`. It knows nothing of caches but where a plan splits the rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from baco.kv_cache.slots import SlotCache
from baco.models.forward.decoder_layers import Layer, Linear
from baco.models.forward.dense import DenseForward

# The split changes only when rows join or leave; prompts are read without one.
_MAX_SPLITS = 4
# The adapted layers of a decoder layer that read the same input, in the order of fused ones.
_GROUPS = {
    "qkv": ("self_attn", (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))),
    "out": ("self_attn", (("o_proj",),)),
    "gate_up": ("mlp", (("gate_proj", "up_proj"), ("gate_up_proj",))),
    "down": ("mlp", (("down_proj",),)),
}
LINEARS = {name for _, kinds in _GROUPS.values() for names in kinds for name in names}


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to the output of linear layers that read the same input.

    Attributes:
        down: A of each layer, stacked: [rank, in].
        up: scale · B of each layer, in its columns of the output: [rank, out].
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, layers: Sequence[Any], dtype: torch.dtype) -> Self | None:
        """Of fused layers, some of which are wrapped by PEFT; None where none is."""
        outputs = [layer.out_features for layer in layers]
        first, downs, ups = 0, [], []
        for layer, width in zip(layers, outputs, strict=True):
            if is_adapted(layer):
                (name,) = layer.active_adapters
                downs.append(layer.lora_A[name].weight.detach())
                up = layer.lora_B[name].weight.detach().t() * layer.scaling[name]
                ups.append(nn.functional.pad(up, (first, sum(outputs) - first - width)))
            first += width
        if not downs:
            return None
        return cls(torch.cat(downs).to(dtype), torch.cat(ups).to(dtype).contiguous())


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """A linear layer with what an adapter adds to it for all of ``size`` rows of tokens but the
    first ``split``.
    """

    linear: Linear
    added: LowRank
    split: int
    size: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens [B * T, in] → [B * T, out]."""
        output, first = self.linear(tokens), tokens.shape[0] // self.size * self.split
        low = nn.functional.linear(tokens[first:], self.added.down)
        output[first:].addmm_(low, self.added.up)
        return output


class AdaptedForward:
    """The forward of a base model and its adapter; implements `baco.kv_cache.batched.Forward`.

    Where a plan splits the rows, those before the split are read without the adapter.

    Args:
        dense: the forward of the base model.
        added: for each layer, what the adapter adds to the linear layers of that name.
    """

    def __init__(self, dense: DenseForward, added: Sequence[dict[str, LowRank]]) -> None:
        self.dense, self._added = dense, added
        # By split and number of rows; that is 1 without a split.
        self._adapted: dict[tuple[int, int], DenseForward] = {}

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The forward of a PEFT model; None where its base model or its adapter is not supported,
        or its layers are not fused.
        """
        if why_not_adapted(model):
            return None
        with without_wrappers(model) as base:
            dense = DenseForward.of(base)
        return None if dense is None else cls(dense, _added(model, dense.dtype))

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; return the raw logits after the last ``keep``."""
        first = cache.plan.split or 0
        split = first, tokens.shape[0] if first else 1
        if split not in self._adapted:
            if len(self._adapted) == _MAX_SPLITS:
                del self._adapted[next(iter(self._adapted))]
            self._adapted[split] = self._adapt(*split)
        return self._adapted[split](tokens, cache, keep)

    def _adapt(self, split: int, size: int) -> DenseForward:
        def adapted(layer: Layer, added: dict[str, LowRank]) -> Layer:
            linear = {
                name: AdaptedLinear(getattr(layer, name), own, split, size)
                for name, own in added.items()
            }
            return replace(layer, **linear)  # type: ignore[arg-type]

        pairs = zip(self.dense.layers, self._added, strict=True)
        return self.dense.with_layers([adapted(layer, added) for layer, added in pairs])


def dense_forward(model: Any, *, adapter_off: bool) -> DenseForward | AdaptedForward | None:
    """The own forward of a model, with its adapter if it has one and that is not off; None where
    the model is not supported.
    """
    if not hasattr(model, "peft_config"):
        return DenseForward.of(model)
    if not adapter_off:
        return AdaptedForward.of(model)
    with without_wrappers(model) as base:
        return DenseForward.of(base)


def is_adapted(layer: Any) -> bool:
    """Is it a linear layer that a low-rank adapter is put around?"""
    from peft.tuners.lora import Linear as LoraLinear

    return type(layer) is LoraLinear


def why_not_mixed(model: Any) -> str | None:
    """Why one forward cannot read rows with and without a PEFT model's adapter: the predicate of a
    sentence about the adapter; None if it can.
    """
    from peft import LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(model.base_model, LoraModel) or len(model.peft_config) != 1:
        return "is not a single low-rank adapter"
    (config,) = model.peft_config.values()
    if getattr(config, "layer_replication", None):
        return "repeats layers"
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return "brings embeddings or layers of its own"
        if not isinstance(module, BaseTunerLayer):
            continue
        if not is_adapted(module) or module.lora_variant or module.merged:
            return "is not of plain low-rank products"
        if any(module.lora_bias.values()) or len(module.active_adapters) != 1:
            return "is not of plain low-rank products"
    return None


def why_not_adapted(model: Any) -> str | None:
    """Why an `AdaptedForward` does not support the adapter of a PEFT model, in the same form."""
    known = {
        id(getattr(getattr(layer, parent, None), name, None))
        for layer in getattr(model.get_base_model().get_decoder(), "layers", ())
        for parent, groups in _GROUPS.values()
        for names in groups
        for name in names
    }
    reason = why_not_mixed(model)
    others = (m for m in model.modules() if is_adapted(m) and id(m) not in known)
    return reason or ("changes embeddings or the head" if any(others) else None)


def _added(model: Any, dtype: torch.dtype) -> list[dict[str, LowRank]]:
    layers = []
    for layer in model.get_base_model().get_decoder().layers:
        added: dict[str, LowRank] = {}
        for group, (part, kinds) in _GROUPS.items():
            parent = getattr(layer, part)
            names = next(names for names in kinds if hasattr(parent, names[0]))
            own = LowRank.of([getattr(parent, name) for name in names], dtype)
            if own is not None:
                added[group] = own
        layers.append(added)
    return layers


@contextmanager
def without_wrappers(model: Any) -> Iterator[Any]:
    """In this block, the linear layers of a PEFT model's base model are in their own places, where
    they may be replaced. Afterwards the adapter is around them again.
    """
    base = model.get_base_model()
    wrapped = [
        (parent, name, child)
        for parent in base.modules()
        for name, child in parent.named_children()
        if is_adapted(child)
    ]
    config = base.__dict__.pop("peft_config", None)
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer)
    try:
        yield base
    finally:
        for parent, name, child in wrapped:
            child.base_layer = getattr(parent, name)
            setattr(parent, name, child)
        if config is not None:
            base.peft_config = config
