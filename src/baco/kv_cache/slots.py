"""Keys and values of many sequences, a row for each, at lengths of their own.

They are written in place; `baco.kv_cache.batched` says what is read into them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from baco.kv_cache.shared_prefix import Group

# Room is made in steps that grow with what is there: at most an eighth of it lies idle, or a few
# columns, and growing token by token copies each column only a few times.
_LEAST_STEP, _MOST_IDLE = 16, 8


def columns_for(columns: int) -> int:
    """How many columns are made where so many are needed."""
    step = max(_LEAST_STEP, (1 << columns.bit_length()) // (2 * _MOST_IDLE))
    return -(-columns // step) * step


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Bytes that one row of a model's cache takes.

    Attributes:
        fixed: whatever its length.
        token: for each token of it.
        tensor_fixed, tensor_token: the same of its largest tensor, which is there twice while the
            cache grows.
    """

    fixed: int
    token: int
    tensor_fixed: int
    tensor_token: int

    @classmethod
    def between(cls, one: Sequence[int], many: Sequence[int], tokens: int) -> Self:
        """The size of a cache whose tensors take ``one`` bytes each with one token and ``many``
        with so many ``tokens``, where it grows no faster than along a straight line.
        """
        token = max(0, -(-(sum(many) - sum(one)) // (tokens - 1)))
        largest = -(-max(many, default=0) // tokens) if token else 0
        return cls(max(0, sum(one) - token), token, max(one, default=0), largest)

    def row(self, tokens: int) -> int:
        """Bytes of a row of so many tokens; 0 for a row that is never read."""
        return self.fixed + self.token * tokens if tokens else 0

    def tensor(self, tokens: int) -> int:
        """Bytes of the largest tensor of such a row."""
        return self.tensor_fixed + self.tensor_token * tokens if tokens else 0


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
        long: the row is read with the long factors of a rotary embedding that has such, [B].
    """

    lengths: list[int]
    columns: Tensor
    width: int
    behind: Sequence[Group] = ()
    before: Tensor | None = None
    long: Sequence[bool] = ()
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


def _resized(old: Tensor, rows: int, columns: int) -> Tensor:
    new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
    kept = old[:rows, :, :columns]
    new[: kept.shape[0], :, : kept.shape[2]] = kept
    return new


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
        # One after the other: only one of them is there twice at a time.
        self.keys = _resized(self.keys, rows, columns)
        self.values = _resized(self.values, rows, columns)

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
        self._resize(rows, columns)

    def shrink(self, rows: int, columns: int) -> None:
        """Have room for just so many rows and columns, or for what there is if that is less."""
        rows, columns = min(rows, self.rows), min(columns_for(columns), self.columns)
        if self.held != (0, 0):
            self.held = rows, columns
        if (rows, columns) != (self.rows, self.columns):
            self._resize(rows, columns)

    def _resize(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns_for(columns)
        for layer in self.layers:
            layer.resize(self.rows, self.columns)

    def hold(self, rows: int, columns: int) -> None:
        """Have room for so many rows and columns until told otherwise, whatever is read: tables
        stay where they are.
        """
        self.held = rows, columns
        self.reserve(rows, columns)
