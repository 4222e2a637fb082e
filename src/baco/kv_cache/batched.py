"""What one half of a pair has read of many sequences, and how it reads on.

`BatchedKVCache` keeps a row per sequence in one cache and runs all rows in one forward; its verbs
(`KVCache`) are those of `baco.models.caches.per_row.PerRowKVCache` too. They know token ids and
positions; they know nothing of routers, draws or text.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.kv_cache.shared_prefix import Group, Prefix, grouped, pays
from baco.kv_cache.slots import CacheSize, Plan, SlotCache

T = TypeVar("T")

# A prompt is read in pieces of so many tokens, and rows are decoded between two of them. A piece
# takes as long as several steps of one row, but fewer than ten: a CPU multiplies while it reads the
# weights, and is soon busy with that alone; a GPU reads some hundred tokens in that time.
CPU_PIECE, PIECE = 64, 512


def piece_for(device: torch.device) -> int:
    """Tokens of a piece on a device."""
    return CPU_PIECE if device.type == "cpu" else PIECE


def read_through(reading: Generator[int, None, T]) -> T:
    """What a reading comes to, all its pieces read at once."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            done: T = end.value
            return done


class KVCache(Protocol):
    """What the engine asks of a cache. Rows are numbered from 0 without holes.

    Attributes:
        rewinds: whether what was read can be forgotten again; without it nothing can be drafted.
        lengths: tokens that each row holds.
        forwards, tokens: how often the model ran, and on how many tokens of rows.
    """

    can_roll_back: bool

    @property
    def lengths(self) -> list[int]: ...

    @property
    def forwards(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def reading(self, ids: Sequence[int], samples: int = 1) -> Generator[int, None, Any]:
        """Read a prompt once, piece by piece: yields how many tokens each piece had. What it
        returns can be admitted as any number of rows, ``samples`` in all.
        """

    def prefill(self, ids: Sequence[int], samples: int = 1) -> Any:
        """The same, all pieces at once."""

    def after_each(self, ids: Sequence[int], piece: int) -> Iterator[Tensor]:
        """Read a text beside all rows: the raw logits after each of its tokens, [T, width], in
        pieces of so many tokens where the model can read on.
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

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Forget what was read beyond ``lengths``, row by row."""

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        """Clear what rows that go on hold beyond what they have read, and all of ended ones."""

    def size(self) -> CacheSize:
        """What a row takes, measured on a few tokens."""

    def held(self) -> int:
        """Bytes of its tables, which may have room for more rows, or longer ones, than there are;
        0 where every row takes just what it needs.
        """

    def shrink(self, columns: int) -> None:
        """Hold no more than its rows need, each of so many tokens of its own at most."""


class Forward(Protocol):
    """A model's forward over the rows of a cache."""

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache as its plan says; the raw logits after the last
        ``keep`` columns: [B, keep, width].
        """


class BatchedKVCache:
    """All rows in one forward, each at its own length, in tensors that are written in place.

    Args:
        forward: of the model.
        cache: to go on with, where the forward wants tables that stay where they are.
        shares: it attends to a prompt that rows have in common where that lies.
        piece: tokens of a prompt that are read at once.
    """

    can_roll_back = True

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache | None = None,
        *,
        shares: bool = False,
        piece: int = CPU_PIECE,
    ) -> None:
        self.forward, self.piece = forward, piece
        self.stays, self._shares = cache is not None, shares
        self.cache = SlotCache(0, 0) if cache is None else cache
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0
        self._shared: list[Prefix | None] = []  # of each row
        self._behind: tuple[list[Group], Tensor] | None = None  # the same, for a forward

    def shares(self, tokens: int, samples: int) -> bool:
        return self._shares and pays(tokens, samples)

    def reading(
        self, ids: Sequence[int], samples: int = 1, *, long: bool = False
    ) -> Generator[int, None, Prefix]:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), self.piece):
            own = ids[start : start + self.piece]
            self._read_alone(cache, start, own, 1, long)
            yield len(own)
        return Prefix(cache, len(ids), self.shares(len(ids), samples))

    def prefill(self, ids: Sequence[int], samples: int = 1, *, long: bool = False) -> Prefix:
        return read_through(self.reading(ids, samples, long=long))

    def after_each(self, ids: Sequence[int], piece: int, *, long: bool = False) -> Iterator[Tensor]:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), piece):
            own = ids[start : start + piece]
            yield self._read_alone(cache, start, own, len(own), long)[0]

    def _read_alone(
        self, cache: SlotCache, start: int, ids: Sequence[int], keep: int, long: bool
    ) -> Tensor:
        """Read tokens of one row that has a cache to itself."""
        plan = Plan.of([start], [len(ids)], len(ids))
        plan.long = [long]
        return self._forward(cache, plan, torch.tensor([list(ids)]), keep)

    def admit(self, prefix: Prefix | None, count: int) -> None:
        prefix = prefix or Prefix(SlotCache(0, 0), 0)
        first, last = len(self.lengths), len(self.lengths) + count
        self._copy(prefix, slice(first, last), last)
        self.lengths += [prefix.length] * count
        self._shared += [prefix if prefix.shared else None] * count
        self._behind = None

    def replace(self, row: int, prefix: Prefix) -> None:
        """Let a row hold what was read into ``prefix`` in the place of what it holds."""
        self._copy(prefix, slice(row, row + 1), len(self.lengths))
        self.lengths[row] = prefix.length

    def _copy(self, prefix: Prefix, rows: slice, count: int) -> None:
        """Copy a prompt, unless it is shared, into some of ``count`` rows."""
        own = 0 if prefix.shared else prefix.length
        self.cache.reserve(count, max([*self._own(), own]) + 1)
        for mine, theirs in zip(self._layers_like(prefix.cache), prefix.cache.layers, strict=True):
            mine.keys[rows, :, :own] = theirs.keys[:, :, :own]
            mine.values[rows, :, :own] = theirs.values[:, :, :own]

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

    def read(
        self, tokens: Tensor, counts: Sequence[int], keep: int, *, long: Sequence[bool] = ()
    ) -> Tensor:
        plan = Plan.of(self._own(), counts, tokens.shape[1])
        plan.long = long
        plan.behind, plan.before = self._prompts()
        self.cache.reserve(len(self.lengths), plan.width)
        logits = self._forward(self.cache, plan, tokens, keep)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.tokens += sum(counts)
        return logits

    def roll_back(self, lengths: Sequence[int]) -> None:
        # What lies beyond is never looked at and will be written over.
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        own = self._own()
        kept = [(row, own[row]) for row in going] + [(row, 0) for row in ended]
        for layer in (layer for layer in self.cache.layers if layer.is_initialized):
            for row, columns in kept:
                layer.keys[row, :, columns:] = 0
                layer.values[row, :, columns:] = 0

    def size(self) -> CacheSize:
        layers = [layer for layer in self.prefill([1, 2]).cache.layers if layer.is_initialized]
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        each = [t.shape[1] * t.shape[3] * t.element_size() for t in tensors]
        return CacheSize(0, sum(each), 0, max(each))

    def held(self) -> int:
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def shrink(self, columns: int) -> None:
        self.cache.shrink(len(self.lengths), columns)

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
