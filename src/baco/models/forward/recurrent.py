"""The forward of a ``transformers`` model with recurrent layers, over rows of different lengths.

Attention layers read all columns at once, under masks. A recurrent layer has no masks: padding
would change its state. It reads the columns one after the other, each for the rows that have a
token there, so that states can also be saved before tokens that may be rejected. Where all rows
read as many tokens and none may be rejected, it reads them at once.
"""

import inspect
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from baco.kv_cache.recurrent import HybridCache, has_states, set_states, states_of
from baco.kv_cache.slots import ForwardPlan, SlotCache
from baco.models.context import text_config
from baco.models.forward.masked import MaskForm
from baco.models.forward.own_positions import replaced
from baco.models.forward.packed_linear import weights
from baco.models.forward.state_update import fewer_passes

log = logging.getLogger("baco")

# What models call a layer's mask where the layer takes none, or that of full attention.
_WITHOUT_MASK, _AS_FULL, _AS_SLIDING = ("linear_attention", "conv"), "hybrid", "hybrid_sliding"


@dataclass(frozen=True, slots=True)
class RecurrentForward:
    """A model's own forward over the rows of a `HybridCache`.

    Attributes:
        model: called as ``transformers`` calls a causal LM.
        config: of the model that writes text.
        form: of the masks of its attention layers; None where it has none.
        layers: its recurrent modules, each with its number in the cache.
        inputs: names of arguments that the model takes.
        continues: a recurrent layer can continue a state by several tokens at once.
        context: the number of its positions.
    """

    model: Any
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
        forward = cls(call, config, form, (), inputs, continues, context)
        try:
            layers = _recurrent_layers(forward)
        except Exception as error:  # whatever a model raises that this does not fit
            log.debug("%s does not write states as others do: %r", type(model).__name__, error)
            return None
        return cls(call, config, form, layers, inputs, continues, context) if layers else None

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
            self._by_column(tokens.shape[1], cache),
        ):
            output = self.model(input_ids=tokens.to(device), **inputs)
        logits: Tensor = output.logits[:, -keep:]
        return logits

    @contextmanager
    def _by_column(self, span: int, cache: HybridCache) -> Iterator[None]:
        """In this block, recurrent layers read what the cache's plan says."""
        plan = cache.plan
        even = min(plan.counts) == span
        fresh = not any(plan.lengths) and not cache.states()
        if even and not cache.saves and (span == 1 or fresh or self.continues):
            yield
            return
        whole = span - cache.saves if even and self.continues else 0
        with ExitStack() as stack:
            for module, index in self.layers:
                stack.enter_context(_reading_by_column(module, index, cache, plan, whole))
            yield


@contextmanager
def _reading_by_column(
    module: nn.Module, index: int, cache: HybridCache, plan: ForwardPlan, whole: int
) -> Iterator[None]:
    """In this block, a recurrent module reads its first ``whole`` columns at once, and each later
    one for the rows that have a token there.
    """
    forward, layer = module.forward, cache.layers[index]

    def by_column(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        span = hidden_states.shape[1]
        outputs = [forward(hidden_states[:, :whole], *args, **kwargs)] if whole else []
        for column in range(whole, span):
            if column >= span - cache.saves:
                cache.save(column, index)
            rows = [row for row, count in enumerate(plan.counts) if count >= span - column]
            here = hidden_states[:, column : column + 1]
            if len(rows) == len(plan.counts):
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

    with replaced(module, "forward", by_column):
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
