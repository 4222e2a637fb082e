"""A KV cache that runs all rows in one forward: `BatchedKVCache`.

It knows token ids and positions. It knows nothing of routers, sampling or text.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.kv_cache.protocol import RowSize, finish
from baco.kv_cache.shared_prefix import PrefixGroup, row_index, sharing_pays
from baco.kv_cache.slots import ForwardPlan, Prefix, SlotCache

# A prompt is read in chunks of this many tokens, and rows are decoded between two of them. A chunk
# takes as long as several steps of one row, but fewer than ten. A CPU is limited by arithmetic
# after a few dozen tokens; a GPU reads some hundred tokens while it reads the weights once.
CPU_CHUNK, CHUNK = 64, 512


def prefill_chunk(device: torch.device) -> int:
    """Tokens of one chunk of a prompt on a device."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


class Forward(Protocol):
    """A model's forward over the rows of a cache."""

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache as its plan says; return the raw logits after the last
        ``keep`` columns, [B, keep, width].
        """


class BatchedKVCache:
    """All rows in one forward, each at its own length, in tensors that are written in place.

    Args:
        forward: of the model.
        cache: to reuse, where the forward needs tables that stay at their addresses.
        shares: the forward can attend to a prompt that rows share without copying it.
        chunk: tokens of a prompt that are read at once.
    """

    can_roll_back = True

    def __init__(
        self,
        forward: Forward,
        cache: SlotCache | None = None,
        *,
        shares: bool = False,
        chunk: int = CPU_CHUNK,
    ) -> None:
        self.forward, self.chunk = forward, chunk
        self.static_shapes, self._shares = cache is not None, shares
        self.cache = SlotCache(0, 0) if cache is None else cache
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0
        self._shared: list[Prefix | None] = []  # of each row
        self._groups: tuple[list[PrefixGroup], Tensor] | None = None  # made of these for a forward

    def prefill(
        self, ids: Sequence[int], samples: int = 1, *, long: bool = False
    ) -> Generator[int, None, Prefix]:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), self.chunk):
            chunk = ids[start : start + self.chunk]
            self._read_alone(cache, start, chunk, 1, long)
            yield len(chunk)
        return Prefix(cache, len(ids), self.shares_prefix(len(ids), samples))

    def copy_prefix(self, prefix: Prefix | None, count: int) -> None:
        prefix = prefix or Prefix(SlotCache(0, 0), 0)
        first, last = len(self.lengths), len(self.lengths) + count
        self._write(prefix, slice(first, last), last)
        self.lengths += [prefix.length] * count
        self._shared += [prefix if prefix.shared else None] * count
        self._groups = None

    def replace(self, row: int, prefix: Prefix) -> None:
        """Let a row hold ``prefix`` in place of what it holds."""
        self._write(prefix, slice(row, row + 1), len(self.lengths))
        self.lengths[row] = prefix.length

    def shares_prefix(self, tokens: int, samples: int) -> bool:
        return self._shares and sharing_pays(tokens, samples)

    def extend(
        self, tokens: Tensor, counts: Sequence[int], keep: int, *, long: Sequence[bool] = ()
    ) -> Tensor:
        plan = ForwardPlan.of(self._own_lengths(), counts, tokens.shape[1])
        plan.long = long
        plan.shared_prefixes, plan.prefix_lengths = self._shared_prefixes()
        self.cache.reserve(len(self.lengths), plan.width)
        logits = self._forward(self.cache, plan, tokens, keep)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.tokens += sum(counts)
        return logits

    def roll_back(self, lengths: Sequence[int]) -> None:
        # No token attends to the columns beyond, and later tokens overwrite them.
        self.lengths = [min(pair) for pair in zip(self.lengths, lengths, strict=True)]

    def drop(self, *, kept: Sequence[int]) -> None:
        moved = [(new, old) for new, old in enumerate(kept) if new != old]
        if moved:
            new, old = (list(column) for column in zip(*moved, strict=True))
            own = self._own_lengths()
            width = max(own[row] for row in old)
            for layer in self.cache.initialized():
                layer.keys[new, :, :width] = layer.keys[old, :, :width]
                layer.values[new, :, :width] = layer.values[old, :, :width]
        self.lengths = [self.lengths[row] for row in kept]
        self._shared = [self._shared[row] for row in kept]
        self._groups = None
        if not kept and not self.static_shapes:
            self.cache = SlotCache(0, 0)  # an idle server keeps no tables of its busiest hour

    def score(self, ids: Sequence[int], chunk: int, *, long: bool = False) -> Iterator[Tensor]:
        cache = SlotCache(1, len(ids))
        for start in range(0, len(ids), chunk):
            own = ids[start : start + chunk]
            yield self._read_alone(cache, start, own, len(own), long)[0]

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        own = self._own_lengths()
        kept = [(row, own[row]) for row in running] + [(row, 0) for row in ended]
        for layer in self.cache.initialized():
            for row, columns in kept:
                layer.keys[row, :, columns:] = 0
                layer.values[row, :, columns:] = 0

    def row_size(self) -> RowSize:
        layers = finish(self.prefill([1, 2])).cache.initialized()
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        per_token = [t.shape[1] * t.shape[3] * t.element_size() for t in tensors]
        return RowSize(0, sum(per_token), 0, max(per_token))

    def allocated_bytes(self) -> int:
        layers = self.cache.initialized()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def preallocate(self, rows: int, columns: int) -> None:
        if self.static_shapes:
            self.cache.preallocate(rows, columns)

    def shrink(self, columns: int) -> None:
        self.cache.shrink(len(self.lengths), columns)

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

    def _write(self, prefix: Prefix, rows: slice, count: int) -> None:
        """Copy a prompt, unless it is shared, into some of ``count`` rows."""
        own = 0 if prefix.shared else prefix.length
        self.cache.reserve(count, max([*self._own_lengths(), own]) + 1)
        for target, source in zip(self._layers_like(prefix), prefix.cache.layers, strict=True):
            target.keys[rows, :, :own] = source.keys[:, :, :own]
            target.values[rows, :, :own] = source.values[:, :, :own]

    def _layers_like(self, prefix: Prefix) -> list[Any]:
        sources = prefix.cache.layers
        layers = [self.cache.layer(index) for index in range(len(sources))]
        for target, source in zip(layers, sources, strict=True):
            if not target.is_initialized:
                target.lazy_initialization(source.keys, source.values)
        return layers

    def _own_lengths(self) -> list[int]:
        """Tokens of each row in its own columns, without a shared prompt."""
        pairs = zip(self.lengths, self._shared, strict=True)
        return [length - prefix.length if prefix else length for length, prefix in pairs]

    def _shared_prefixes(self) -> tuple[Sequence[PrefixGroup], Tensor | None]:
        """The rows by shared prompt, and the number of shared tokens before each row's own."""
        if not any(self._shared):
            return (), None
        if self._groups is None:
            rows_of: dict[Prefix, list[int]] = {}
            for row, prefix in enumerate(self._shared):
                if prefix is not None:
                    rows_of.setdefault(prefix, []).append(row)
            device = next(iter(rows_of)).cache.layer(0).keys.device
            lengths = [prefix.length if prefix else 0 for prefix in self._shared]
            groups = [prefix.group(row_index(rows, device)) for prefix, rows in rows_of.items()]
            self._groups = groups, tensor_on(device, lengths)
        return self._groups
