"""Keys and values of many sequences, each at its own length, for one half of a pair.

Two stores with one set of verbs (`Store`). `SlotStore` keeps a row per sequence in preallocated
tensors and runs all rows in one forward. `NativeStore` leaves the cache to the model, and runs row
by row: for architectures whose state is not keys and values (state-space models, ALiBi). They know
token ids and positions; they know nothing of routers, draws or text.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# A long prompt is read in pieces, so that the mask of one piece stays small.
PREFILL_PIECE = 512
_COLUMN_STEP = 64


class Store(Protocol):
    """What the engine asks of a cache. Rows are numbered from 0 without holes."""

    def prefill(self, ids: Sequence[int]) -> Any:
        """Read a prompt once; the result can be admitted as any number of rows."""

    def admit(self, prefix: Any, count: int) -> None:
        """Append ``count`` rows that continue ``prefix``."""

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order; the others leave."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token per row, int64 [B]; the next token's raw logits, [B, width]."""

    def bytes_per_token(self, prefix: Any) -> int:
        """Memory that one more token of one row takes."""


@dataclass(slots=True)
class Plan:
    """Where the tokens of one forward go: ``count`` new columns after each row's ``lengths``."""

    lengths: list[int]
    count: int
    rows: Tensor = field(init=False)  # [B, 1]
    columns: Tensor = field(init=False)  # [B, T]
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.lengths))[:, None]
        self.columns = torch.tensor(self.lengths)[:, None] + torch.arange(self.count)
        self.width = max(self.lengths) + self.count

    @property
    def aligned_start(self) -> int | None:
        """The common length of all rows, or None: then columns differ from row to row."""
        first = self.lengths[0]
        return first if self.lengths.count(first) == len(self.lengths) else None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, heads, columns, width of a head] each."""

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.cache.rows, self.cache.columns
        self.keys = key_states.new_zeros(rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(
            rows, value_states.shape[1], columns, value_states.shape[3]
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, heads, T, width] at the plan's columns; return all columns read so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        plan = self.cache.plan
        batch, start = len(plan.lengths), plan.aligned_start
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if start is not None:
                store[:batch, :, start : start + plan.count] = new
            else:
                at = (plan.rows.to(new.device), slice(None), plan.columns.to(new.device))
                store[at] = new.transpose(1, 2)
        return self.keys[:batch, :, : plan.width], self.values[:batch, :, : plan.width]

    def resize(self, rows: int, columns: int) -> None:
        """Grow to ``rows`` and ``columns``, keeping what is there."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        return self.cache.plan.width, 0

    def get_seq_length(self) -> int:
        return max(self.cache.plan.lengths, default=0)

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """A ``transformers`` cache whose rows have lengths of their own."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))
        self.rows, self.columns = rows, columns
        self.plan = Plan([0], 0)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows and columns; room once made stays."""
        if rows <= self.rows and columns <= self.columns:
            return
        if columns > self.columns:
            # In steps that grow with the length, so that a long answer is copied few times.
            columns = max(columns + _COLUMN_STEP, self.columns * 3 // 2)
        self.rows, self.columns = max(rows, self.rows), max(columns, self.columns)
        for layer in self.layers:
            layer.resize(self.rows, self.columns)


@dataclass(frozen=True, slots=True)
class MaskForm:
    """How a model wants its 4-D masks.

    Attributes:
        kinds: the kinds of attention in it, ``full_attention`` and ``sliding_attention``.
        window: of sliding attention, in tokens.
        mapping: one mask per kind in a dict, or just the one mask.
        additive: added to the scores (eager attention), or a bool per pair (SDPA).
    """

    kinds: tuple[str, ...]
    window: int | None
    mapping: bool
    additive: bool

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """Read off a model's configuration; None where its attention is of another kind."""
        text = config.get_text_config()
        implementation = getattr(text, "_attn_implementation", None)
        window = getattr(text, "sliding_window", None)
        layers = getattr(text, "layer_types", None)
        kinds = tuple(dict.fromkeys(layers or [f"{'sliding' if window else 'full'}_attention"]))
        if implementation not in ("sdpa", "eager"):
            return None
        if not set(kinds) <= {"full_attention", "sliding_attention"}:
            return None
        return cls(kinds, window, layers is not None, implementation == "eager")

    def masks(self, plan: Plan, device: Any, dtype: torch.dtype) -> Any:
        """Which cached columns every new token sees: [B, 1, T, width], or a dict of such."""
        at = plan.columns.to(device)[:, None, :, None]  # [B, 1, T, 1]
        column = torch.arange(plan.width, device=device)
        causal = column <= at
        made: dict[str, Tensor] = {}
        for kind in self.kinds:
            seen = causal
            if kind == "sliding_attention" and self.window is not None:
                seen = causal & (column > at - self.window)
            if self.additive:
                seen = torch.zeros_like(seen, dtype=dtype).masked_fill(
                    ~seen, torch.finfo(dtype).min
                )
            made[kind] = seen
        return made if self.mapping else made[self.kinds[0]]


class SlotStore:
    """All rows in one forward, each at its own length, in tensors that are written in place."""

    def __init__(self, model: Any, form: MaskForm) -> None:
        self.model, self.form = model, form
        self.cache = SlotCache(0, 0)
        self.lengths: list[int] = []

    def prefill(self, ids: Sequence[int]) -> tuple[SlotCache, int]:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), PREFILL_PIECE):
            piece = torch.tensor([list(ids[start : start + PREFILL_PIECE])])
            self._forward(cache, [start], piece)
        return cache, len(ids)

    def admit(self, prefix: tuple[SlotCache, int], count: int) -> None:
        source, length = prefix
        first, last = len(self.lengths), len(self.lengths) + count
        self.cache.reserve(last, length + 1)
        for mine, theirs in zip(self._layers_like(source), source.layers, strict=True):
            mine.keys[first:last, :, :length] = theirs.keys
            mine.values[first:last, :, :length] = theirs.values
        self.lengths += [length] * count

    def _layers_like(self, source: SlotCache) -> list[Any]:
        while len(self.cache.layers) < len(source.layers):
            self.cache.layers.append(SlotLayer(self.cache))
        for mine, theirs in zip(self.cache.layers, source.layers, strict=False):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
        return list(self.cache.layers[: len(source.layers)])

    def reorder(self, order: Sequence[int]) -> None:
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (list(column) for column in zip(*moved, strict=True))
            width = max(self.lengths[row] for row in old)
            for layer in self.cache.layers:
                if layer.is_initialized:
                    layer.keys[new, :, :width] = layer.keys[old, :, :width]
                    layer.values[new, :, :width] = layer.values[old, :, :width]
        self.lengths = [self.lengths[row] for row in order]

    def step(self, tokens: Tensor) -> Tensor:
        self.cache.reserve(len(self.lengths), max(self.lengths) + 1)
        logits = self._forward(self.cache, self.lengths, tokens[:, None])
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def bytes_per_token(self, prefix: tuple[SlotCache, int]) -> int:
        layers = [layer for layer in prefix[0].layers if layer.is_initialized]
        stores = [store for layer in layers for store in (layer.keys, layer.values)]
        return sum(s.shape[1] * s.shape[3] * s.element_size() for s in stores)

    def _forward(self, cache: SlotCache, lengths: list[int], tokens: Tensor) -> Tensor:
        """Read ``tokens`` [B, T] after ``lengths``; the last token's logits, [B, width]."""
        plan = cache.plan = Plan(list(lengths), tokens.shape[1])
        device = self.model.device
        output = self.model(
            input_ids=tokens.to(device),
            position_ids=plan.columns.to(device),
            attention_mask=self.form.masks(plan, device, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


_CACHE_NAMES = ("past_key_values", "cache_params", "state")


class NativeStore:
    """The model's own cache, one a row, one forward a row: slow, and right for any causal LM."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[dict[str, Any]] = []

    def prefill(self, ids: Sequence[int]) -> dict[str, Any]:
        return self._read({}, list(ids))[1] if ids else {}

    def admit(self, prefix: dict[str, Any], count: int) -> None:
        self.rows += [copy.deepcopy(prefix) for _ in range(count)]

    def reorder(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in order]

    def step(self, tokens: Tensor) -> Tensor:
        read = [
            self._read(row, [token]) for row, token in zip(self.rows, tokens.tolist(), strict=True)
        ]
        self.rows = [state for _, state in read]
        return torch.stack([logits for logits, _ in read])

    def bytes_per_token(self, prefix: dict[str, Any]) -> int:  # noqa: ARG002
        return 0  # unknown: such a state need not grow with the text at all

    def _read(self, state: dict[str, Any], ids: list[int]) -> tuple[Tensor, dict[str, Any]]:
        tokens = torch.tensor([ids], device=self.model.device)
        output = self.model(input_ids=tokens, use_cache=True, **state)
        kept = {name: output[name] for name in _CACHE_NAMES if output.get(name) is not None}
        return output.logits[0, -1], kept
