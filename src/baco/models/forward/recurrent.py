"""The forward of a ``transformers`` model with recurrent layers, over rows of different lengths.

Attention layers read all columns at once, under masks. A recurrent layer has no masks: padding
would change its state. It reads the columns one after the other, or several at once where that is
possible, each for the rows that have tokens there. Between two columns its states can be saved.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from baco.kv_cache.recurrent import (
    HybridCache,
    RollBackCosts,
    has_states,
    set_states,
    states_of,
)
from baco.kv_cache.slots import ForwardPlan, SlotCache
from baco.models.context import text_config
from baco.models.forward.masked import MaskForm
from baco.models.forward.own_positions import replaced
from baco.models.forward.packed_linear import weights
from baco.models.forward.state_update import fewer_passes

log = logging.getLogger("baco")


@dataclass(frozen=True, slots=True)
class _DeviceCosts:
    """Seconds on a kind of device. Orders of magnitude, only to compare two ways to roll back.

    Attributes:
        copied: copying a byte of states into new memory.
        product: multiplying one more token with a byte of weights.
        byte: reading a byte of weights.
        layer: overhead of a layer.
    """

    copied: float
    product: float
    byte: float
    layer: float


_CPU = _DeviceCosts(1 / 3e9, 1 / 100e9, 1 / 10e9, 1e-4)
_GPU = _DeviceCosts(1 / 1e12, 1 / 4e14, 1 / 2e12, 3e-5)

# What models call a layer's mask where the layer takes none, or that of full attention.
_WITHOUT_MASK, _AS_FULL, _AS_SLIDING = ("linear_attention", "conv"), "hybrid", "hybrid_sliding"


@dataclass(frozen=True, slots=True)
class RecurrentForward:
    """A model's own forward over the rows of a `HybridCache`.

    Attributes:
        model: called as ``transformers`` calls a causal LM.
        module: the model itself.
        config: of the model that writes text.
        form: of the masks of its attention layers; None where it has none.
        layers: its recurrent modules, each with its number in the cache.
        inputs: names of arguments that the model takes.
        continues: a recurrent layer can continue a state by several tokens at once.
        context: the number of its positions.
    """

    model: Any
    module: nn.Module
    config: Any
    form: MaskForm | None
    layers: tuple[tuple[nn.Module, int], ...]
    inputs: frozenset[str]
    continues: bool
    context: int

    @classmethod
    def of(cls, call: Any, model: Any, context: int, *, continues: bool) -> Self | None:
        """That of a model; None where it has no recurrent layers whose states can be held.

        Args:
            call: calls the model.
            model: the model itself, without an adapter.
            context: the number of its positions.
            continues: as above.
        """
        config = text_config(model.config)
        if not has_states(config):
            return None
        cache = HybridCache(0, 0, config)
        attends = bool(cache.slot_layers)
        form = MaskForm.of(model.config, kinds=_kinds(config)) if attends else None
        if attends and form is None:
            return None
        inputs = frozenset(inspect.signature(model.forward).parameters)
        forward = cls(call, model, config, form, (), inputs, continues, context)
        try:
            layers = _recurrent_layers(forward)
        except Exception as error:  # whatever a model raises that this does not fit
            log.debug("%s does not write states as others do: %r", type(model).__name__, error)
            return None
        return replace(forward, layers=layers) if layers else None

    def roll_back_costs(self) -> RollBackCosts:
        """What saving states costs, and what reading tokens again does."""
        costs = _CPU if torch.device(self.model.device).type == "cpu" else _GPU
        stored = sum(size for _, _, size in weights(self.module))
        column = costs.byte * self.weight_bytes + costs.layer * len(self.layers)
        return RollBackCosts(costs.copied, costs.product * stored, column)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of its recurrent modules."""
        modules = (module for module, _ in self.layers)
        return sum(stored for module in modules for _, _, stored in weights(module))

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        assert isinstance(cache, HybridCache)
        plan, device = cache.plan, self.model.device
        name = "past_key_values" if "past_key_values" in self.inputs else "cache_params"
        inputs: dict[str, Any] = {name: cache, "use_cache": True, "logits_to_keep": keep}
        if "position_ids" in self.inputs:
            # Padding may be beyond the end of a table of positions.
            inputs["position_ids"] = plan.columns.clamp(max=self.context - 1).to(device)
        if self.form is not None:
            masks = self.form.masks(plan, device, self.model.dtype)
            full, sliding = (masks.get(f"{kind}_attention") for kind in ("full", "sliding"))
            inputs["attention_mask"] = (
                masks
                | dict.fromkeys(_WITHOUT_MASK)
                | {_AS_FULL: full, _AS_SLIDING: sliding if full is None else full}
            )
        on_cpu = torch.device(device).type == "cpu"
        modules = [module for module, _ in self.layers]
        with (
            fewer_passes(modules) if on_cpu else nullcontext(),
            self._by_part(tokens.shape[1], cache),
        ):
            output = self.model(input_ids=tokens.to(device), **inputs)
        logits: Tensor = output.logits[:, -keep:]
        return logits

    @contextmanager
    def _by_part(self, span: int, cache: HybridCache) -> Iterator[None]:
        """In this block, recurrent layers read what the cache's plan says."""
        plan = cache.plan
        even = min(plan.counts) == span
        fresh = not any(plan.lengths) and not cache.states()
        if even and not cache.save_at and (span == 1 or fresh or self.continues):
            yield
            return
        cuts = {0, *cache.save_at, *(span - count for count in plan.counts), span}
        if not self.continues:
            cuts = set(range(span + 1))
        parts = list(pairwise(sorted(cuts)))
        with ExitStack() as stack:
            for module, index in self.layers:
                stack.enter_context(_reading_by_part(module, index, cache, parts))
            yield


@contextmanager
def _reading_by_part(
    module: nn.Module, index: int, cache: HybridCache, parts: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """In this block, a recurrent module reads some columns after the other, first and last + 1 in
    ``parts``, each for the rows that have tokens there.
    """
    forward, layer, counts = module.forward, cache.layers[index], cache.plan.counts

    def by_part(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        span = hidden_states.shape[1]
        outputs = []
        for start, stop in parts:
            if start in cache.save_at:
                cache.save(start, index)
            rows = [row for row, count in enumerate(counts) if count >= span - start]
            here = hidden_states[:, start:stop]
            if len(rows) == len(counts):
                outputs.append(forward(here, *args, **kwargs))
                continue
            output = torch.zeros_like(here)
            if rows:
                states = states_of(layer)
                set_states(layer, [state[rows] for state in states], layer)
                output[rows] = forward(here[rows], *args, **kwargs)
                for state, new in zip(states, states_of(layer), strict=True):
                    state[rows] = new
                set_states(layer, states, layer)
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    with replaced(module, "forward", by_part):
        yield


def _kinds(config: Any) -> tuple[str, ...]:
    """The kinds of attention that masks are made for."""
    layers = set(getattr(config, "layer_types", None) or ())
    sliding = bool(layers & {"sliding_attention", "hybrid_sliding"})
    return ("full_attention", "sliding_attention") if sliding else ("full_attention",)


@torch.no_grad()
def _recurrent_layers(forward: RecurrentForward) -> tuple[tuple[nn.Module, int], ...]:
    """The modules that write states, each with its number in the cache: observed in one forward."""
    running: list[nn.Module] = []
    layers: dict[nn.Module, int] = {}
    cache = HybridCache(1, 2, forward.config)
    cache.plan = ForwardPlan.of([0], [2], 2)

    def observed(update: Any) -> Any:
        def call(states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            layers[running[-1]] = layer_idx
            return update(states, layer_idx, *args, **kwargs)

        return call

    cache.update_conv_state = observed(cache.update_conv_state)
    cache.update_recurrent_state = observed(cache.update_recurrent_state)
    entered = torch_modules.register_module_forward_pre_hook(
        lambda module, _: running.append(module)
    )
    left = torch_modules.register_module_forward_hook(lambda *_: _pop(running), always_call=True)
    try:
        forward(torch.tensor([[0, 1]]), cache, 1)
    finally:
        entered.remove()
        left.remove()
    return tuple(layers.items())


def _pop(running: list[nn.Module]) -> None:
    """Leave the innermost module."""
    running.pop()
