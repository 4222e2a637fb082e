"""Keys and values of many sequences, each at its own length, for one half of a pair.

Two stores with one set of verbs (`Store`). `SlotStore` keeps a row per sequence in preallocated
tensors and runs all rows in one forward. `NativeStore` leaves the cache to the model, and runs row
by row: for architectures whose state is not keys and values (state-space models, ALiBi). They know
token ids and positions; they know nothing of routers, draws or text.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# A long prompt is read in pieces, so that the mask of one piece stays small.
PREFILL_PIECE = 512
# Room is made in steps: small enough to waste little, wide enough that copying is rare.
_COLUMN_STEP = 64


def columns_for(columns: int) -> int:
    """How many columns are made where so many are needed."""
    return -(-columns // _COLUMN_STEP) * _COLUMN_STEP


class Store(Protocol):
    """What the engine asks of a cache. Rows are numbered from 0 without holes.

    Attributes:
        rewinds: whether what was read can be forgotten again; without it nothing can be drafted.
        lengths: tokens that each row holds.
        forwards, tokens: how often the model ran, and on how many tokens of rows.
    """

    rewinds: bool
    lengths: list[int]
    forwards: int
    tokens: int

    def prefill(self, ids: Sequence[int]) -> Any:
        """Read a prompt once; the result can be admitted as any number of rows."""

    def admit(self, prefix: Any, count: int) -> None:
        """Append ``count`` rows that continue ``prefix``; None for rows that are never read."""

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order; the others leave."""

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        """Read the last ``counts[r]`` of the tokens [B, T] of every row r, what stands before is
        padding; the raw logits after each row's last ``keep``: [B, keep, width].
        """

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget what was read beyond ``lengths``, row by row."""

    def bytes_per_token(self, prefix: Any) -> int:
        """Memory that one more token of one row takes."""


@dataclass(slots=True)
class Plan:
    """Where the tokens of one forward go.

    A row reads ``counts[r]`` tokens, flush right in T columns; the padding before them goes to one
    column behind all rows, where nothing looks and a next token is written first.

    Attributes:
        lengths: tokens each row held before.
        counts: tokens each row reads now.
        columns: of the cache, int64 [B, T].
        width: columns of the cache that take part.
    """

    lengths: list[int]
    counts: list[int]
    columns: Tensor
    rows: Tensor  # [B, 1]
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], counts: Sequence[int], span: int) -> Self:
        """The plan of one forward over ``span`` columns of tokens."""
        start, count = torch.tensor(lengths)[:, None], torch.tensor(counts)[:, None]
        offset = torch.arange(span) - (span - count)  # [B, T], below 0 for padding
        end = max(map(sum, zip(lengths, counts, strict=True)))
        columns = torch.where(offset < 0, end, start + offset)
        rows = torch.arange(len(lengths))[:, None]
        width = end + (min(counts) < span)
        return cls(list(lengths), list(counts), columns, rows, width)

    @property
    def start(self) -> int | None:
        """The column where all rows go on without padding, or None: then they differ."""
        first, span = self.lengths[0], self.columns.shape[1]
        same = self.lengths.count(first) == len(self.lengths)
        return first if same and self.counts.count(span) == len(self.counts) else None


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, heads, columns, width of a head] each."""

    def __init__(self, cache: "SlotCache") -> None:
        super().__init__()
        # A cycle would keep the tensors of a prompt until the garbage collector comes by.
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> "SlotCache":
        """The cache that it is a layer of."""
        cache = self._cache()
        assert cache is not None
        return cache

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
        batch, start, span = len(plan.lengths), plan.start, plan.columns.shape[1]
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if start is not None:
                store[:batch, :, start : start + span] = new
            else:
                at = (plan.rows.to(new.device), slice(None), plan.columns.to(new.device))
                store[at] = new.transpose(1, 2)
        return self.keys[:batch, :, : plan.width], self.values[:batch, :, : plan.width]

    def resize(self, rows: int, columns: int) -> None:
        """Change to ``rows`` and ``columns``, keeping what fits."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            kept = old[:rows, :, :columns]
            new[: kept.shape[0], :, : kept.shape[2]] = kept
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
        own: Any = weakref.ref(self)
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(own()))
        self.rows, self.columns = rows, columns
        self.plan = Plan.of([0], [0], 0)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows and columns, and for no more where more of either is made:
        many short rows and then one long one never take the room of many long ones.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        self.rows, self.columns = rows, columns_for(columns)
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
    """All rows in one forward, each at its own length, in tensors that are written in place.

    Args:
        model: called as ``transformers`` calls a causal LM.
        form: of its masks.
        context: tokens its positions go up to.
    """

    rewinds = True

    def __init__(self, model: Any, form: MaskForm, context: int = 2**30) -> None:
        self.model, self.form, self.context = model, form, context
        self.cache = SlotCache(0, 0)
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def prefill(self, ids: Sequence[int]) -> tuple[SlotCache, int]:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), PREFILL_PIECE):
            piece = torch.tensor([list(ids[start : start + PREFILL_PIECE])])
            self._forward(cache, Plan.of([start], [piece.shape[1]], piece.shape[1]), piece, 1)
        return cache, len(ids)

    def admit(self, prefix: tuple[SlotCache, int] | None, count: int) -> None:
        source, length = prefix or (SlotCache(0, 0), 0)
        first, last = len(self.lengths), len(self.lengths) + count
        self.cache.reserve(last, max([length, *self.lengths]) + 1)
        for mine, theirs in zip(self._layers_like(source), source.layers, strict=True):
            mine.keys[first:last, :, :length] = theirs.keys[:, :, :length]
            mine.values[first:last, :, :length] = theirs.values[:, :, :length]
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

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        plan = Plan.of(self.lengths, counts, tokens.shape[1])
        self.cache.reserve(len(self.lengths), plan.width)
        logits = self._forward(self.cache, plan, tokens, keep)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.tokens += sum(counts)
        return logits

    def rewind(self, lengths: Sequence[int]) -> None:
        # What lies beyond is never looked at and will be written over.
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def bytes_per_token(self, prefix: tuple[SlotCache, int]) -> int:
        layers = [layer for layer in prefix[0].layers if layer.is_initialized]
        stores = [store for layer in layers for store in (layer.keys, layer.values)]
        return sum(s.shape[1] * s.shape[3] * s.element_size() for s in stores)

    def _forward(self, cache: SlotCache, plan: Plan, tokens: Tensor, keep: int) -> Tensor:
        cache.plan = plan
        device = self.model.device
        self.forwards += 1
        output = self.model(
            input_ids=tokens.to(device),
            # Padding may stand beyond what a table of positions holds.
            position_ids=plan.columns.clamp(max=self.context - 1).to(device),
            attention_mask=self.form.masks(plan, device, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[:, -keep:]
        return logits


_CACHE_NAMES = ("past_key_values", "cache_params", "state")


class NativeStore:
    """The model's own cache, one a row, one forward a row: slow, and right for any causal LM."""

    rewinds = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def prefill(self, ids: Sequence[int]) -> tuple[dict[str, Any], int]:
        return (self._read({}, list(ids))[1] if ids else {}), len(ids)

    def admit(self, prefix: tuple[dict[str, Any], int] | None, count: int) -> None:
        state, length = prefix or ({}, 0)
        self.rows += [copy.deepcopy(state) for _ in range(count)]
        self.lengths += [length] * count

    def reorder(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in order]
        self.lengths = [self.lengths[row] for row in order]

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        rows: list[Tensor | None] = []
        for index, (ids, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            if count == 0:  # a row that this half never reads
                rows.append(None)
                continue
            found = []
            for token in ids[-count:]:  # such a state may take no more than one token at a time
                logits, self.rows[index] = self._read(self.rows[index], [token])
                found.append(logits)
            logits = torch.stack(found[-keep:])
            rows.append(torch.nn.functional.pad(logits, (0, 0, keep - len(logits), 0)))
            self.lengths[index] += count
            self.tokens += count
        some = next(row for row in rows if row is not None)
        return torch.stack([torch.zeros_like(some) if row is None else row for row in rows])

    def rewind(self, lengths: Sequence[int]) -> None:
        if any(now > kept for now, kept in zip(self.lengths, lengths, strict=True)):
            raise ValueError("a model's own cache cannot be rewound")

    def bytes_per_token(self, prefix: Any) -> int:  # noqa: ARG002
        return 0  # unknown: such a state need not grow with the text at all

    def _read(self, state: dict[str, Any], ids: list[int]) -> tuple[Tensor, dict[str, Any]]:
        tokens = torch.tensor([ids], device=self.model.device)
        self.forwards += 1
        output = self.model(input_ids=tokens, use_cache=True, **state)
        kept = {name: output[name] for name in _CACHE_NAMES if output.get(name) is not None}
        return output.logits[0, -1], kept
