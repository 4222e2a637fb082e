"""A KV cache that runs all rows in one forward: `BatchedKVCache`.

It knows token ids and positions. It knows nothing of routers, sampling or text.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.kv_cache.protocol import RowSize, finish
from baco.kv_cache.shared_prefix import PrefixGroup, row_index, sharing_pays
from baco.kv_cache.slots import ForwardPlan, Prefix, SlotCache

T = TypeVar("T")

# A prompt is read in chunks of this many tokens, and rows are decoded between two of them. A chunk
# takes as long as several steps of one row, but fewer than ten. A CPU is limited by arithmetic
# after a few dozen tokens; a GPU reads some hundred tokens while it reads the weights once.
CPU_CHUNK, CHUNK = 64, 512


def prefill_chunk(device: torch.device) -> int:
    """Tokens of one chunk of a prompt on a device."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


# Makes the tables of this many rows and columns.
NewCache = Callable[[int, int], SlotCache]

# Keys and values of one layer: [heads, tokens, width of a head] each.
_LayerBlock = tuple[Tensor, Tensor]


class Forward(Protocol):
    """A model's forward over the rows of a cache."""

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache as its plan says; return the raw logits after the last
        ``keep`` columns, [B, keep, width].
        """


class Tables(Protocol):
    """The tables of a `SlotCache` that rows of one model are in. These rows are adjacent.

    Attributes:
        reverse: the rows are in descending order.
        models: how many models have rows in these tables.
    """

    reverse: bool
    models: int

    @property
    def cache(self) -> SlotCache: ...

    def first(self, rows: int) -> int:
        """The first row of the tables that is taken where there are ``rows`` rows."""

    def reserve(self, rows: int, columns: int) -> None:
        """As `SlotCache.reserve`, before tokens are written."""

    def shrink(self, rows: int, columns: int) -> None:
        """As `SlotCache.shrink`; columns in use are kept."""

    def drop(self, rows: int) -> None:
        """Take note that only this many rows are left; without any, the tables may be freed."""


class OwnTables:
    """Tables that hold the rows of one model alone."""

    reverse, models = False, 1

    def __init__(
        self, cache: SlotCache, new_cache: NewCache = SlotCache, *, static: bool = False
    ) -> None:
        self.cache, self._new_cache, self._static = cache, new_cache, static

    def first(self, rows: int) -> int:  # noqa: ARG002
        return 0

    def reserve(self, rows: int, columns: int) -> None:
        self.cache.reserve(rows, columns)

    def shrink(self, rows: int, columns: int) -> None:
        self.cache.shrink(rows, columns)

    def drop(self, rows: int) -> None:
        if not rows and not self._static:
            self.cache = self._new_cache(0, 0)  # an idle server keeps no tables of its busiest hour


class BatchedKVCache:
    """All rows in one forward, each at its own length, in tensors that are written in place.

    Args:
        forward: of the model.
        cache: to reuse, where the forward needs tables that stay at their addresses.
        tables: for the rows, if they are to be in tables with others.
        new_cache: makes tables of some rows and columns.
        shares: the forward can attend to a prompt that rows share without copying it.
        chunk: tokens of a prompt that are read at once.
    """

    can_roll_back = can_cut = True

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache | None = None,
        *,
        tables: Tables | None = None,
        new_cache: NewCache = SlotCache,
        shares: bool = False,
        chunk: int = CPU_CHUNK,
    ) -> None:
        self.forward, self.chunk = forward, chunk
        self.static_shapes, self._shares = cache is not None, shares
        self._new_cache = new_cache
        own = new_cache(0, 0) if cache is None else cache
        self._tables = tables or OwnTables(own, new_cache, static=self.static_shapes)
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0
        self._shared: list[Prefix | None] = []  # of each row
        # What `_shared_prefixes` last returned, after the number of rows that it was for.
        self._groups: tuple[int, list[PrefixGroup], Tensor] | None = None

    @property
    def cache(self) -> SlotCache:
        """The tables."""
        return self._tables.cache

    def prefill(
        self,
        ids: Sequence[int],
        samples: int = 1,
        *,
        begun: Prefix | None = None,
        long: bool = False,
    ) -> Generator[int, None, Prefix]:
        new = begun or Prefix(self._new_cache(1, len(ids)), 0)
        cache, first = new.cache, new.length
        for start in range(first, len(ids), self.chunk):
            chunk = ids[start : start + self.chunk]
            self._read_alone(cache, start, chunk, 1, long)
            yield len(chunk)
        return Prefix(cache, len(ids), self.shares_prefix(len(ids), samples))

    def copy_prefix(self, prefix: Prefix | None, count: int) -> None:
        prefix = prefix or Prefix(self._new_cache(0, 0), 0)
        first, last = len(self.lengths), len(self.lengths) + count
        self._write(prefix, range(first, last), last)
        self.lengths += [prefix.length] * count
        self._shared += [prefix if prefix.shared else None] * count
        self._groups = None

    def replace(self, row: int, prefix: Prefix) -> None:
        """Let a row hold ``prefix`` in place of what it holds."""
        self._write(prefix, range(row, row + 1), len(self.lengths))
        self.lengths[row] = prefix.length

    def shares_prefix(self, tokens: int, samples: int) -> bool:
        return self._shares and sharing_pays(tokens, samples)

    def prefix_variant(self, tokens: int) -> int:  # noqa: ARG002
        return 0

    def copy_block(self, source: Prefix | int, start: int, stop: int) -> list[_LayerBlock]:
        if isinstance(source, Prefix):
            parts = [(source.cache, 0, start, stop)]
        else:
            shared = self._shared[source]
            split = shared.length if shared else 0
            (row,) = self._in_tables([source])
            parts = [(self.cache, row, max(start, split) - split, max(stop, split) - split)]
            if shared and start < split:
                parts.insert(0, (shared.cache, 0, start, min(stop, split)))
        block = []
        for layers in zip(*(cache.slot_layers for cache, *_ in parts), strict=True):
            columns = [
                (layer.keys[row, :, a:b], layer.values[row, :, a:b])
                for layer, (_, row, a, b) in zip(layers, parts, strict=True)
            ]
            keys, values = zip(*columns, strict=True)
            block.append((torch.cat(keys, dim=1), torch.cat(values, dim=1)))  # copies one part too
        return block

    def load_blocks(self, blocks: Sequence[list[_LayerBlock]], tokens: int, room: int) -> Prefix:
        cache, start = self._new_cache(1, room), 0
        for block in blocks:
            for index, (keys, values) in enumerate(block):
                layer = cache.layer(index)
                if not layer.is_initialized:
                    layer.lazy_initialization(keys[None], values[None])
                columns = min(keys.shape[1], tokens - start)
                layer.keys[0, :, start : start + columns] = keys[:, :columns]
                layer.values[0, :, start : start + columns] = values[:, :columns]
            start += columns
        return Prefix(cache, tokens)

    def expect_drafts(self, tokens: int) -> None:
        """Any token can be removed."""

    def extend(
        self, tokens: Tensor, counts: Sequence[int], keep: int, *, long: Sequence[bool] = ()
    ) -> Tensor:
        (logits,) = extend_adjacent([self], self.forward, [tokens], [counts], keep, long)
        return logits

    def roll_back(self, lengths: Sequence[int]) -> None:
        # No token attends to the columns beyond, and later tokens overwrite them.
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def drop(self, *, kept: Sequence[int]) -> None:
        moved = [(new, old) for new, old in enumerate(kept) if new != old]
        if moved:
            own = self._own_lengths()
            width = max(own[row] for _, row in moved)
            new, old = (self._in_tables(column) for column in zip(*moved, strict=True))
            for layer in self.cache.initialized():
                layer.keys[new, :, :width] = layer.keys[old, :, :width]
                layer.values[new, :, :width] = layer.values[old, :, :width]
        self.lengths = [self.lengths[row] for row in kept]
        self._shared = [self._shared[row] for row in kept]
        self._groups = None
        self._tables.drop(len(kept))

    def score(self, ids: Sequence[int], chunk: int, *, long: bool = False) -> Iterator[Tensor]:
        cache = self._new_cache(1, len(ids))
        for start in range(0, len(ids), chunk):
            own = ids[start : start + chunk]
            yield self._read_alone(cache, start, own, len(own), long)[0]

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        own = self._own_lengths()
        columns_of = [own[row] for row in running] + [0 for _ in ended]
        rows = self._in_tables([*running, *ended])
        for layer in self.cache.initialized():
            for row, columns in zip(rows, columns_of, strict=True):
                layer.keys[row, :, columns:] = 0
                layer.values[row, :, columns:] = 0

    def row_size(self) -> RowSize:
        layers = finish(self.prefill([1, 2])).cache.initialized()
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        per_token = [t.shape[1] * t.shape[3] * t.element_size() for t in tensors]
        return RowSize(0, sum(per_token), 0, max(per_token))

    def allocated_bytes(self) -> int:
        layers = self.cache.initialized()
        both: int = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return both // self._tables.models

    def preallocate(self, rows: int, columns: int) -> None:
        if self.static_shapes:
            self.cache.preallocate(rows, columns)

    def shrink(self, columns: int) -> None:
        self._tables.shrink(len(self.lengths), columns)

    def _read_alone(
        self, cache: SlotCache, start: int, ids: Sequence[int], keep: int, long: bool
    ) -> Tensor:
        """Read tokens of a single row that has its own cache."""
        plan = ForwardPlan.of([start], [len(ids)], len(ids))
        plan.long = [long]
        return self._forward(cache, plan, torch.tensor([list(ids)]), keep)

    def _forward(self, cache: SlotCache, plan: ForwardPlan, tokens: Tensor, keep: int) -> Tensor:
        cache.plan = plan
        self.forwards += 1
        return self.forward(tokens, cache, keep)

    def _write(self, prefix: Prefix, rows: range, count: int) -> None:
        """Copy a prompt, unless it is shared, into adjacent ones of ``count`` rows."""
        own = 0 if prefix.shared else prefix.length
        self._tables.reserve(count, max([*self._own_lengths(), own]) + 1)
        places = sorted(self._in_tables(rows))
        at = slice(places[0], places[-1] + 1) if places else slice(0, 0)
        for target, source in self._layers_like(prefix):
            target.keys[at, :, :own] = source.keys[:, :, :own]
            target.values[at, :, :own] = source.values[:, :, :own]

    def _in_tables(self, rows: Sequence[int]) -> list[int]:
        """The rows of the tables that hold these rows."""
        if self._tables.reverse:  # the last of n rows is the first one that is taken
            last = self._tables.first(0) - 1
            return [last - row for row in rows]
        first = self._tables.first(0)
        return [first + row for row in rows]

    def _layers_like(self, prefix: Prefix) -> list[tuple[Any, Any]]:
        """Layers of the tables, each with the layer of a prompt that is copied into it."""
        layers = []
        for index, source in enumerate(prefix.cache.slot_layers):
            if source.is_initialized:
                target = self.cache.layer(index)
                if not target.is_initialized:
                    target.lazy_initialization(source.keys, source.values)
                layers.append((target, source))
        return layers

    def _own_lengths(self) -> list[int]:
        """Tokens of each row in its own columns, without a shared prompt."""
        pairs = zip(self.lengths, self._shared, strict=True)
        return [length - prefix.length if prefix else length for length, prefix in pairs]

    def _shared_prefixes(self, before: int) -> tuple[Sequence[PrefixGroup], Tensor | None]:
        """The groups of rows that share a prompt, and the length of each row's shared prompt.

        Args:
            before: how many rows of the forward come before these.
        """
        if not any(self._shared):
            return (), None
        if self._groups is None or self._groups[0] != before:
            rows_of: dict[Prefix, list[int]] = {}
            shared = self._in_order(self._shared)
            for row, prefix in enumerate(shared, before):
                if prefix is not None:
                    rows_of.setdefault(prefix, []).append(row)
            device = next(iter(rows_of)).cache.layer(0).keys.device
            lengths = [prefix.length if prefix else 0 for prefix in shared]
            groups = [prefix.group(row_index(rows, device)) for prefix, rows in rows_of.items()]
            self._groups = before, groups, tensor_on(device, lengths)
        return self._groups[1:]

    def _in_order(self, values: Sequence[T]) -> Sequence[T]:
        """Values of the rows in the order of the tables, or the other way round."""
        return values[::-1] if self._tables.reverse else values

    def _rows_in_order(self, rows: Tensor) -> Tensor:
        """`_in_order` for a tensor [B, ...]."""
        return rows.flip(0) if self._tables.reverse and len(rows) > 1 else rows


def extend_adjacent(
    caches: Sequence[BatchedKVCache],
    forward: Forward,
    tokens: Sequence[Tensor],
    counts: Sequence[Sequence[int]],
    keep: int,
    long: Sequence[bool] = (),
) -> list[Tensor]:
    """Read more tokens of the rows of one cache, or of two whose rows are adjacent, in one forward.

    Args:
        caches: in the order of their rows in the tables, which they share.
        forward: of both models.
        tokens, counts: of each cache, as for `KVCache.extend`; all of one width T.
        keep: as for `KVCache.extend`.
        long: see `ForwardPlan`.

    Returns:
        The logits of each cache's rows.
    """
    lengths: list[int] = []
    all_counts: list[int] = []
    first = []  # the first row of each cache in the forward
    for cache, own in zip(caches, counts, strict=True):
        first.append(len(lengths))
        lengths += cache._in_order(cache._own_lengths())
        all_counts += cache._in_order(own)
    plan = ForwardPlan.of(lengths, all_counts, tokens[0].shape[1])
    plan.long = long
    rows = [len(cache.lengths) for cache in caches]
    for cache, size in zip(caches, rows, strict=True):
        cache._tables.reserve(size, plan.width)
    plan.first_row = caches[0]._tables.first(rows[0])
    if len(caches) > 1:
        plan.split = rows[0]
    prefixes = [cache._shared_prefixes(before) for cache, before in zip(caches, first, strict=True)]
    plan.shared_prefixes = [group for groups, _ in prefixes for group in groups]
    plan.prefix_lengths = _joined_lengths(prefixes, rows)
    ordered = [cache._rows_in_order(own) for cache, own in zip(caches, tokens, strict=True)]
    joined = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    slots = caches[0].cache
    slots.plan = plan
    logits = forward(joined, slots, keep)
    for cache, own in zip(caches, counts, strict=True):
        pairs = zip(cache.lengths, own, strict=True)
        cache.lengths = [length + count for length, count in pairs]
        cache.tokens += sum(own)
        cache.forwards += 1
    parts = (logits[start : start + count] for start, count in zip(first, rows, strict=True))
    return [cache._rows_in_order(part) for cache, part in zip(caches, parts, strict=True)]


def _joined_lengths(
    prefixes: Sequence[tuple[Sequence[PrefixGroup], Tensor | None]], rows: Sequence[int]
) -> Tensor | None:
    """The lengths of shared prompts of the rows of some caches; None where none has any."""
    if len(prefixes) == 1:
        return prefixes[0][1]
    some = next((lengths for _, lengths in prefixes if lengths is not None), None)
    if some is None:
        return None
    pairs = zip(prefixes, rows, strict=True)
    return torch.cat([some.new_zeros(n) if own is None else own for (_, own), n in pairs])
