"""Keys and values of many sequences in tables that are written in place, one row per sequence.

Rows have lengths of their own. `baco.kv_cache.batched` decides what is read into them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from baco.kv_cache.shared_prefix import PrefixGroup

# Tables grow in steps that grow with them: at most an eighth of the columns is unused, or a few,
# and growing token by token copies each column only a few times.
_MIN_STEP, _UNUSED_PART = 16, 8


def columns_for(columns: int) -> int:
    """How many columns are allocated where this many are needed."""
    step = max(_MIN_STEP, (1 << columns.bit_length()) // (2 * _UNUSED_PART))
    return -(-columns // step) * step


@dataclass(slots=True)
class ForwardPlan:
    """Where the tokens of one forward are written.

    A row reads ``counts[r]`` tokens, right-aligned in T columns. The padding before them goes to
    one column behind all rows, which no token attends to and a later token overwrites.

    Attributes:
        lengths: tokens that each row held before.
        columns: of the cache, int64 [B, T].
        width: the number of columns of the cache that take part.
        first_row: of the cache's tables; the forward's rows are this one and those behind it.
        split: where one forward reads the rows of two models, how many rows belong to the first
            model; these come first. None where all rows belong to one model.
        shared_prefixes: the shared prompts that rows continue. Column 0 of such a row holds the
            first token after its prompt.
        prefix_lengths: the number of tokens of each row's shared prompt, int64 [B]; None where no
            row has one.
        long: whether each row is read with the long factors of its rotary embedding, [B].
        counts: tokens that each row reads.
    """

    lengths: list[int]
    columns: Tensor
    width: int
    first_row: int = 0
    split: int | None = None
    shared_prefixes: Sequence[PrefixGroup] = ()
    prefix_lengths: Tensor | None = None
    long: Sequence[bool] = ()
    counts: Sequence[int] = ()
    _slots: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], counts: Sequence[int], span: int) -> Self:
        """The plan of one forward over ``span`` columns of tokens."""
        end = max(map(sum, zip(lengths, counts, strict=True)))
        if min(counts) == span > 0:
            columns = torch.tensor([[length + at for at in range(span)] for length in lengths])
            return cls(list(lengths), columns.view(-1, span), end, counts=counts)
        start, count = torch.tensor(lengths)[:, None], torch.tensor(counts)[:, None]
        offset = torch.arange(span) - (span - count)  # [B, T], below 0 for padding
        columns = torch.where(offset < 0, end, start + offset)
        return cls(list(lengths), columns, end + 1, counts=counts)

    def slots(self, heads: int, columns: int, device: torch.device) -> Tensor:
        """Flat indices of the tokens in a cache of this many heads and columns: int64
        [B * T * heads].
        """
        if (device, heads) not in self._slots:
            first = torch.arange(len(self.lengths) * heads).view(-1, 1, heads) * columns
            slots = first + self.columns[:, :, None]
            self._slots[device, heads] = slots.flatten().to(device)
        return self._slots[device, heads]


def _resized(old: Tensor, rows: int, columns: int, *, centred: bool) -> Tensor:
    new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
    kept_rows, kept_columns = min(rows, len(old)), min(columns, old.shape[2])
    source, target = (((size - kept_rows) // 2 if centred else 0) for size in (len(old), rows))
    kept = old[source : source + kept_rows, :, :kept_columns]
    new[target : target + kept_rows, :, :kept_columns] = kept
    return new


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [rows, heads, columns, width of a head] each."""

    def __init__(self, cache: "ReferenceType[SlotCache]") -> None:
        super().__init__()
        # Weak: a reference cycle would keep gigabytes until Python's garbage collector runs.
        self._cache = cache

    @property
    def cache(self) -> "SlotCache":
        """The cache that this is a layer of."""
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def table(like: Tensor) -> Tensor:
            size = (self.cache.rows, like.shape[1], self.cache.columns, like.shape[3])
            return like.new_zeros(size)

        self.keys, self.values = table(key_states), table(value_states)
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
        keys, values = self.keys[plan.first_row :], self.values[plan.first_row :]
        for table, new in ((keys, key_states), (values, value_states)):
            width = new.shape[3]
            table.view(-1, width).index_copy_(0, slots, new.transpose(1, 2).reshape(-1, width))
        return keys[:rows, :, : plan.width], values[:rows, :, : plan.width]

    def resize(self, rows: int, columns: int) -> None:
        """Change to ``rows`` and ``columns``, keeping what fits."""
        if not self.is_initialized:
            return
        # One after the other, so that only one of them exists twice at a time.
        centred = self.cache.centred
        self.keys = _resized(self.keys, rows, columns, centred=centred)
        self.values = _resized(self.values, rows, columns, centred=centred)

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
        centred: rows are added and removed at both ends, as many at each.
        preallocated: the fewest rows and columns that the tables have; (0, 0) without a minimum.
    """

    def __init__(self, rows: int, columns: int, *, centred: bool = False) -> None:
        own = ref(self)
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(own))
        self.rows, self.columns, self.centred = rows, columns, centred
        self.preallocated = (0, 0)
        self.plan = ForwardPlan.of([0], [0], 0)

    @property
    def slot_layers(self) -> list[Any]:
        """The layers with keys and values."""
        return list(self.layers)

    def layer(self, index: int) -> Any:
        """The layer ``index`` of `slot_layers`, created where it does not exist yet."""
        while len(self.layers) <= index:
            self.layers.append(SlotLayer(ref(self)))
        return self.layers[index]

    def tables(self, layers: int, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of this many layers, created where they do not exist yet, from the
        plan's first row on.

        Args:
            layers: of the model.
            like: of the dtype, device, heads and width of a head: [., heads, ., width].
        """
        own = [self.layer(index) for index in range(layers)]
        for layer in own:
            if not layer.is_initialized:
                layer.lazy_initialization(like, like)
        keys, values = [layer.keys for layer in own], [layer.values for layer in own]
        first = self.plan.first_row
        if first:
            keys, values = ([table[first:] for table in tables] for tables in (keys, values))
        return keys, values

    def initialized(self) -> list[Any]:
        """The layers that have tables."""
        return [layer for layer in self.slot_layers if layer.is_initialized]

    def reserve(self, rows: int, columns: int) -> None:
        """Resize the tables to these rows and columns where they are too small, or far too long.

        Memory follows the current batch, not the largest ever seen, and short rows are not read at
        the width of a long one that has left.
        """
        rows, columns = max(rows, self.preallocated[0]), max(columns, self.preallocated[1])
        if rows <= self.rows and columns <= self.columns <= 2 * columns + 4 * _MIN_STEP:
            return
        self._resize(rows, columns)

    def preallocate(self, rows: int, columns: int) -> None:
        """Have room for this many rows and columns from now on, so that tables do not move."""
        self.preallocated = rows, columns
        self.reserve(rows, columns)

    def shrink(self, rows: int, columns: int) -> None:
        """Have room for exactly this many rows and columns, or for fewer if there are fewer."""
        rows, columns = min(rows, self.rows), min(columns_for(columns), self.columns)
        if self.preallocated != (0, 0):
            self.preallocated = rows, columns
        if (rows, columns) != (self.rows, self.columns):
            self._resize(rows, columns)

    def _resize(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns_for(columns)
        for layer in self.slot_layers:
            layer.resize(self.rows, self.columns)


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A prompt that was read.

    Attributes:
        cache: its keys and values, in one row.
        length: its number of tokens.
        shared: rows that continue it attend to this cache instead of a copy.
    """

    cache: SlotCache
    length: int
    shared: bool = False

    def group(self, rows: slice | Tensor) -> PrefixGroup:
        """The rows of a batch that share this prompt."""
        layers = self.cache.initialized()
        keys, values = [layer.keys[0] for layer in layers], [layer.values[0] for layer in layers]
        return PrefixGroup(rows, self.length, keys, values)
