"""Keys and values of many sequences, each at its own length, for one half of a pair.

`SlotStore` keeps a row per sequence in preallocated tensors and runs all rows in one forward; its
verbs (`Store`) are those of `baco.engine.native.NativeStore` too. They know token ids and
positions; they know nothing of routers, draws or text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from baco.engine.prefixes import Group, Prefix, grouped, pays
from baco.transfer import tensor_on

# A long prompt is read in pieces, so that the mask of one piece stays small.
PREFILL_PIECE = 512
# Room is made in steps that grow with what is there: at most an eighth of it lies idle, or a few
# columns, and growing token by token copies each column only a few times.
_LEAST_STEP, _MOST_IDLE = 16, 8


def columns_for(columns: int) -> int:
    """How many columns are made where so many are needed."""
    step = max(_LEAST_STEP, (1 << columns.bit_length()) // (2 * _MOST_IDLE))
    return -(-columns // step) * step


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

    def prefill(self, ids: Sequence[int], samples: int = 1) -> Any:
        """Read a prompt once; the result can be admitted as any number of rows, ``samples`` in
        all.
        """

    def shares(self, tokens: int, samples: int) -> bool:
        """Is a prompt of so many tokens held once for so many samples, or copied for each?"""

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


class Forward(Protocol):
    """A model's forward over the rows of a cache."""

    def __call__(self, tokens: Tensor, cache: "SlotCache", keep: int) -> Tensor:
        """Read tokens [B, T] into the cache as its plan says; the raw logits after the last
        ``keep`` columns: [B, keep, width].
        """


@dataclass(slots=True)
class Plan:
    """Where the tokens of one forward go.

    A row reads ``counts[r]`` tokens, flush right in T columns; the padding before them goes to one
    column behind all rows, where nothing looks and a next token is written first.

    Attributes:
        lengths: tokens each row held before.
        columns: of the cache, int64 [B, T].
        width: columns of the cache that take part.
        behind: the shared prompts that rows go on from; those rows' columns count from their end.
        before: tokens of its shared prompt for each row, int64 [B]; None where none has any.
    """

    lengths: list[int]
    columns: Tensor
    width: int
    behind: Sequence[Group] = ()
    before: Tensor | None = None
    _slots: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], counts: Sequence[int], span: int) -> Self:
        """The plan of one forward over ``span`` columns of tokens."""
        end = max(map(sum, zip(lengths, counts, strict=True)))
        if min(counts) == span > 0:
            at = range(span)
            columns = torch.tensor([[length + ahead for ahead in at] for length in lengths])
            return cls(list(lengths), columns.view(-1, span), end)
        start, count = torch.tensor(lengths)[:, None], torch.tensor(counts)[:, None]
        offset = torch.arange(span) - (span - count)  # [B, T], below 0 for padding
        columns = torch.where(offset < 0, end, start + offset)
        return cls(list(lengths), columns, end + 1)

    def slots(self, heads: int, columns: int, device: torch.device) -> Tensor:
        """The tokens' places in a cache of so many heads and columns, laid end to end: int64
        [B * T * heads].
        """
        if (device, heads) not in self._slots:
            first = torch.arange(len(self.lengths) * heads).view(-1, 1, heads) * columns
            slots = first + self.columns[:, :, None]
            self._slots[device, heads] = slots.flatten().to(device)
        return self._slots[device, heads]


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, heads, columns, width of a head] each."""

    def __init__(self, cache: "ReferenceType[SlotCache]") -> None:
        super().__init__()
        # Weak: a cache and its layers would be a ring, and its gigabytes would outlive the engine
        # until Python looks for rings.
        self._cache = cache

    @property
    def cache(self) -> "SlotCache":
        """The cache that this is a layer of."""
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def room(like: Tensor) -> Tensor:
            size = (self.cache.rows, like.shape[1], self.cache.columns, like.shape[3])
            return like.new_zeros(size)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, heads, T, width] at the plan's columns; return all columns read so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        plan, (rows, heads) = self.cache.plan, key_states.shape[:2]
        slots = plan.slots(heads, self.cache.columns, key_states.device)
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            width = new.shape[3]
            store.view(-1, width).index_copy_(0, slots, new.transpose(1, 2).reshape(-1, width))
        return self.keys[:rows, :, : plan.width], self.values[:rows, :, : plan.width]

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
    """A ``transformers`` cache whose rows have lengths of their own.

    Attributes:
        rows, columns: of its tables.
        held: the least that they have of each; (0, 0) where nobody asked for more than is read.
    """

    def __init__(self, rows: int, columns: int) -> None:
        own = ref(self)
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(own))
        self.rows, self.columns = rows, columns
        self.held = (0, 0)
        self.plan = Plan.of([0], [0], 0)

    def layer(self, index: int) -> Any:
        """The layer ``index``, made where it is not yet there."""
        while len(self.layers) <= index:
            self.layers.append(SlotLayer(ref(self)))
        return self.layers[index]

    def tables(self, layers: int, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of so many layers, made where they are not yet there.

        Args:
            layers: of the model.
            like: of the dtype, device, heads and width of a head: [., heads, ., width].
        """
        own = [self.layer(index) for index in range(layers)]
        for layer in own:
            if not layer.is_initialized:
                layer.lazy_initialization(like, like)
        return [layer.keys for layer in own], [layer.values for layer in own]

    def reserve(self, rows: int, columns: int) -> None:
        """Have room for so many rows and columns, and for no more of either where that changes:
        many short rows and then one long one never take the room of many long ones, and what a long
        row took is not gone through for short ones.
        """
        rows, columns = max(rows, self.held[0]), max(columns, self.held[1])
        if rows <= self.rows and columns <= self.columns <= 2 * columns + 4 * _LEAST_STEP:
            return
        self.rows, self.columns = rows, columns_for(columns)
        for layer in self.layers:
            layer.resize(self.rows, self.columns)

    def hold(self, rows: int, columns: int) -> None:
        """Have room for so many rows and columns until told otherwise, whatever is read: tables
        stay where they are.
        """
        self.held = rows, columns
        self.reserve(rows, columns)


class SlotStore:
    """All rows in one forward, each at its own length, in tensors that are written in place.

    Args:
        forward: of the model.
        cache: to go on with, where the forward wants tables that stay where they are.
        shares: it attends to a prompt that rows have in common where that lies.
    """

    rewinds = True

    def __init__(
        self, forward: Forward, cache: SlotCache | None = None, *, shares: bool = False
    ) -> None:
        self.forward = forward
        self.stays, self._shares = cache is not None, shares
        self.cache = SlotCache(0, 0) if cache is None else cache
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0
        self._shared: list[Prefix | None] = []  # of each row
        self._behind: tuple[list[Group], Tensor] | None = None  # the same, for a forward

    def shares(self, tokens: int, samples: int) -> bool:
        return self._shares and pays(tokens, samples)

    def prefill(self, ids: Sequence[int], samples: int = 1) -> Prefix:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), PREFILL_PIECE):
            piece = torch.tensor([list(ids[start : start + PREFILL_PIECE])])
            self._forward(cache, Plan.of([start], [piece.shape[1]], piece.shape[1]), piece, 1)
        return Prefix(cache, len(ids), self.shares(len(ids), samples))

    def admit(self, prefix: Prefix | None, count: int) -> None:
        prefix = prefix or Prefix(SlotCache(0, 0), 0)
        first, last = len(self.lengths), len(self.lengths) + count
        own = 0 if prefix.shared else prefix.length
        self.cache.reserve(last, max([*self._own(), own]) + 1)
        for mine, theirs in zip(self._layers_like(prefix.cache), prefix.cache.layers, strict=True):
            mine.keys[first:last, :, :own] = theirs.keys[:, :, :own]
            mine.values[first:last, :, :own] = theirs.values[:, :, :own]
        self.lengths += [prefix.length] * count
        self._shared += [prefix if prefix.shared else None] * count
        self._behind = None

    def _own(self) -> list[int]:
        """Tokens of each row in its own columns."""
        pairs = zip(self.lengths, self._shared, strict=True)
        return [length - prefix.length if prefix else length for length, prefix in pairs]

    def _layers_like(self, source: SlotCache) -> list[Any]:
        layers = [self.cache.layer(index) for index in range(len(source.layers))]
        for mine, theirs in zip(layers, source.layers, strict=True):
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
        return layers

    def reorder(self, order: Sequence[int]) -> None:
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (list(column) for column in zip(*moved, strict=True))
            own = self._own()
            width = max(own[row] for row in old)
            for layer in self.cache.layers:
                if layer.is_initialized:
                    layer.keys[new, :, :width] = layer.keys[old, :, :width]
                    layer.values[new, :, :width] = layer.values[old, :, :width]
        self.lengths = [self.lengths[row] for row in order]
        self._shared = [self._shared[row] for row in order]
        self._behind = None
        if not order and not self.stays:
            self.cache = SlotCache(0, 0)  # an idle server holds no table of its busiest hour

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        plan = Plan.of(self._own(), counts, tokens.shape[1])
        plan.behind, plan.before = self._prompts()
        self.cache.reserve(len(self.lengths), plan.width)
        logits = self._forward(self.cache, plan, tokens, keep)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.tokens += sum(counts)
        return logits

    def rewind(self, lengths: Sequence[int]) -> None:
        # What lies beyond is never looked at and will be written over.
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def bytes_per_token(self, prefix: Prefix) -> int:
        layers = [layer for layer in prefix.cache.layers if layer.is_initialized]
        stores = [store for layer in layers for store in (layer.keys, layer.values)]
        return sum(s.shape[1] * s.shape[3] * s.element_size() for s in stores)

    def _prompts(self) -> tuple[Sequence[Group], Tensor | None]:
        """The rows' shared prompts, and how many tokens of such stand before each row's own."""
        if not any(self._shared):
            return (), None
        if self._behind is None:
            one = next(prefix for prefix in self._shared if prefix)
            device = one.cache.layer(0).keys.device
            before = [prefix.length if prefix else 0 for prefix in self._shared]
            self._behind = grouped(self._shared, device), tensor_on(device, before)
        return self._behind

    def _forward(self, cache: SlotCache, plan: Plan, tokens: Tensor, keep: int) -> Tensor:
        cache.plan = plan
        self.forwards += 1
        return self.forward(tokens, cache, keep)
