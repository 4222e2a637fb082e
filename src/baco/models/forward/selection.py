"""The choice of a model's forward and KV cache, by trial on a small model of its architecture.

A trial and not a table of architectures: there are many, and one that reads its mask or its
positions in another way must not decode wrongly without an error. The rows of a batch must read as
they do alone.
"""

import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from baco.kv_cache.batched import BatchedKVCache, Forward
from baco.kv_cache.protocol import KVCache, finish
from baco.kv_cache.recurrent import RecurrentKVCache, has_states
from baco.kv_cache.slots import SlotCache
from baco.models.caches.long_rope import LongRopeKVCache
from baco.models.caches.per_row import PerRowKVCache
from baco.models.context import text_config
from baco.models.forward.adapted import (
    AdaptedForward,
    dense_forward,
    why_not_adapted,
    without_wrappers,
)
from baco.models.forward.decoder_layers import describe, fuse_layers, is_fused
from baco.models.forward.dense import DenseForward
from baco.models.forward.masked import MaskedForward, MaskForm, has_own_window
from baco.models.forward.own_positions import OwnPositions
from baco.models.forward.recurrent import RecurrentForward
from baco.models.loading import explain_errors
from baco.models.rope import LongRope
from baco.models.trial import (
    Readings,
    architecture,
    close,
    reads_right,
    small_model,
    without_adapter,
)

log = logging.getLogger("baco")

# Tokens of a chunk of a prompt in a trial, fewer than its prompts have.
_TRIED_CHUNK = 7
# The kind of a `DenseForward` in `Readings.batched`.
OWN = "own"
# The results of architectures that were tried, by architecture and whether layers are fused.
_TRIED: dict[tuple[str | None, bool], Readings] = {}
# Nats between a plain forward and another right one; rounding gives some hundredths.
_MAX_DIVERGENCE = 0.5


class TriedModel(Protocol):
    """What a trial needs of a `baco.models.model.PairModel`."""

    name: str
    model: Any
    adapter_off: bool

    @property
    def prefill_chunk(self) -> int: ...

    @property
    def embedding_rows(self) -> int: ...

    @property
    def context(self) -> int: ...

    @property
    def long_rope(self) -> LongRope | None: ...

    def run(self, **inputs: Any) -> Any: ...

    def score(self, ids: Sequence[int]) -> Tensor: ...

    def to_common_vocab(self, logits: Tensor) -> Tensor: ...

    def replace_unknown_ids(self, ids: Tensor) -> Tensor: ...

    def small(self, model: Any) -> "TriedModel": ...


class ModelCall:
    """A model as caches call it: without its adapter where that is off."""

    def __init__(self, model: TriedModel) -> None:
        self._model = model
        self.device, self.dtype = model.model.device, model.model.dtype
        forward = without_adapter(model.model).forward
        self._takes_keep = "logits_to_keep" in inspect.signature(forward).parameters

    def __call__(self, **inputs: Any) -> Any:
        if not self._takes_keep:
            inputs.pop("logits_to_keep", None)
        return self._model.run(**inputs)


@dataclass(frozen=True, slots=True)
class ClampedForward:
    """A `DenseForward`, or one made of it, that gets only ids the model has an embedding for."""

    model: TriedModel
    forward: Forward

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        return self.forward(self.model.replace_unknown_ids(tokens), cache, keep)


def candidate_forwards(model: TriedModel) -> Iterator[Forward]:
    """The forwards over many rows that a model may have, the fastest first."""
    dense = dense_forward(model.model, adapter_off=model.adapter_off)
    if dense is not None:
        yield ClampedForward(model, dense)
    whole = without_adapter(model.model)
    if has_states(text_config(whole.config)):
        for continues in (True, False):
            call = ModelCall(model)
            forward = RecurrentForward.of(call, whole, model.context, continues=continues)
            if forward is not None:
                yield forward
        return
    form, rope, own = MaskForm.of(model.model.config), model.long_rope, OwnPositions.of(whole)
    if form is None or (rope is not None and not rope.modules):
        return
    if has_own_window(model.model) and not own.windows:
        return
    for candidate in (form, replace(form, mapping=not form.mapping)):
        yield MaskedForward(ModelCall(model), candidate, model.context, rope, own)


def batched_cache(model: TriedModel, forward: Forward, chunk: int | None = None) -> KVCache:
    """A new cache that runs all rows in one forward.

    Args:
        model: of the rows.
        forward: over them.
        chunk: tokens of a prompt that are read at once, in the place of the model's.
    """
    if isinstance(forward, RecurrentForward):
        chunk = (chunk or model.prefill_chunk) if forward.continues else None
        return RecurrentKVCache(forward, forward.config, chunk, forward.roll_back_costs())
    if model.long_rope is not None:
        return LongRopeKVCache(forward, model.long_rope, chunk=model.prefill_chunk)
    shares = isinstance(forward, ClampedForward) and shares_prompts(forward.forward)
    return BatchedKVCache(forward, shares=shares, chunk=model.prefill_chunk)


def shares_prompts(forward: Forward) -> bool:
    """Can rows attend to a prompt that they share, without a copy for each?"""
    return isinstance(forward, DenseForward | AdaptedForward)


def prepare(model: TriedModel) -> None:
    """Fuse the linear layers of a model that `DenseForward` reads right; leave others alone."""
    if isinstance(describe(model.model), str):
        return
    if OWN in _small_readings(model, fused=True).batched:
        fuse_layers(model.model)


def find_readings(model: TriedModel) -> Readings:
    """The ways to read rows that fit a model, tried once for every architecture."""
    fused = dense_forward(model.model, adapter_off=model.adapter_off) is not None
    # Some architectures have no smaller configuration.
    return _small_readings(model, fused=fused) or try_out(model)


def _small_readings(model: TriedModel, *, fused: bool) -> Readings:
    """The ways that fit a small model of the same architecture, with fused layers or without; none
    where there is no small model.
    """
    key = (architecture(model.model), fused)
    if key not in _TRIED:
        small, readings = small_model(model.model), Readings(frozenset(), False, False)
        if small is not None:
            if fused:
                fuse_layers(small)
            readings = try_out(model.small(small))
        if not readings:
            return readings
        _TRIED[key] = readings
    return _TRIED[key]


@torch.inference_mode()
def try_out(model: TriedModel) -> Readings:
    """Try every way to read the rows of this very model."""
    batched = frozenset(
        forward_kind(forward)
        for forward in candidate_forwards(model)
        if _reads_right(model, batched_cache(model, forward, _TRIED_CHUNK))
    )
    call = ModelCall(model)
    per_row = model.long_rope is None and _reads_right(model, PerRowKVCache(call))
    return Readings(batched, per_row, per_row and _state_continues(model, call))


@torch.inference_mode()
def fastest_forward(model: TriedModel, readings: Readings) -> Forward | None:
    """The fastest forward that reads rows of different lengths as they read alone; None for none.

    Raises:
        BacoError: the model's own forward fails, or returns damaged logits.
    """
    for forward in candidate_forwards(model):
        if forward_kind(forward) in readings.batched and _is_sane(model, forward):
            return forward
    return None


def why_not_dense(model: TriedModel) -> str:
    """Why a model is not read by a `DenseForward`: the predicate of a sentence about the model."""
    if hasattr(model.model, "peft_config"):
        reason = why_not_adapted(model.model)
        if reason is not None:
            return f"has an adapter, which {reason}"
        with without_wrappers(model.model) as base:
            description = describe(base)
    else:
        description = describe(model.model)
    if isinstance(description, str):
        return description
    if OWN not in _small_readings(model, fused=True).batched:
        return "computes something else than other models of the same parts"
    if is_fused(model.model):
        return "differs too much with it on its own weights"
    if getattr(model.model, "is_quantized", False):
        return "is quantised"
    return "is not laid out for it (packed=False)"


def why_not_together(model: TriedModel, per_row: bool) -> str:
    """Why a model's rows are not read in one forward: a clause."""
    config = text_config(without_adapter(model.model).config)
    if not per_row:
        if model.long_rope is not None:
            return "its rotary factors cannot be chosen for each row"
        return "its forward over a cache differs from its plain one, or it returns no cache"
    if MaskForm.of(config) is None and not has_states(config):
        kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ())))
        attention = getattr(config, "_attn_implementation", None)
        return f"no masks are known for {attention} attention in layers {kinds}".rstrip()
    return "rows of different lengths in one forward differ from each row alone"


def forward_kind(forward: Forward) -> str:
    """The name of a forward in `Readings.batched`."""
    if isinstance(forward, RecurrentForward):
        return "states, by several tokens" if forward.continues else "states, token by token"
    if isinstance(forward, MaskedForward):
        return "a mask for each kind of layer" if forward.form.mapping else "one mask"
    return OWN


def warn_of_slow_reading(model: TriedModel, per_row: bool) -> None:
    """Log why a model's rows are not read in one batch."""
    again = "every step reads the whole text of each row again"
    if per_row:
        reason = "takes no batch of rows of different lengths: its rows are decoded one by one"
    elif model.long_rope is None:
        reason = f"returns no state that a text can be continued from: {again}"
    else:
        length = model.long_rope.original_length
        reason = f"has other rotary factors beyond {length} tokens: {again}"
    log.warning("%s (%s) %s", model.name, type(model.model).__name__, reason)


def _reads_right(model: TriedModel, cache: KVCache) -> bool:
    rounding = 0.005 if model.model.dtype == torch.float32 else 0.1
    try:
        return reads_right(cache, model.score, model.to_common_vocab, rounding)
    except Exception as error:
        log.debug("%s does not work with %s: %s", model.name, type(cache).__name__, error)
        return False


def _state_continues(model: TriedModel, call: ModelCall) -> bool:
    """Can a state be continued by several tokens at once? Some models start anew instead."""
    text = list(range(1, 8))
    (whole,) = PerRowKVCache(call).score(text, len(text))
    try:
        *_, last = PerRowKVCache(call, 3).score(text, 3)
    except Exception as error:
        log.debug("%s reads prompts whole: %s", model.name, error)
        return False
    return close(model.to_common_vocab(whole[-1]), model.to_common_vocab(last[-1]), 1e-3)


def _is_sane(model: TriedModel, forward: Forward) -> bool:
    """Does a forward that is right for the architecture read these weights about right?"""
    # Ids from the middle: the first ones are often tokens that were never trained.
    start = model.embedding_rows // 3
    texts = [[start + token for token in text] for text in ([0, 1, 2, 3, 4], [5, 6])]
    # An error of the trial below only rules out this forward; an error here rules out the model.
    with explain_errors("the model", model.name):
        alone = [model.score(text)[-1] for text in texts]
    cache = batched_cache(model, forward)
    try:
        for text in texts:
            cache.copy_prefix(finish(cache.prefill(text[:-1])), 1)
        last = torch.tensor([[text[-1]] for text in texts])
        together = model.to_common_vocab(cache.extend(last, [1, 1], 1)[:, 0])
    except Exception as error:
        log.debug("%s does not work with %s: %s", model.name, type(forward).__name__, error)
        return False
    return all(_divergence(*pair) < _MAX_DIVERGENCE for pair in zip(alone, together, strict=True))


def _divergence(a: Tensor, b: Tensor) -> float:
    """Kullback-Leibler divergence of the distributions of two rows of logits [V], in nats."""
    first, second = (row.double().log_softmax(dim=-1) for row in (a, b))
    terms = first.exp() * (first - second)
    return float(terms[first > -math.inf].sum())
