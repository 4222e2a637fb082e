"""KV caches that llama.cpp holds: `LlamaCppKVCache`, and `JointLlamaCppKVCache` for one model under
two prompts.

Logits are views of the library's memory where the rows allow it, and are overwritten by the next
call of the same context.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baco.kv_cache.prefix_cache import BLOCK
from baco.kv_cache.protocol import RowSize, finish
from baco.models.caches.per_row import extend_rows
from baco.models.llama_cpp.context import LlamaContext, LlamaSequence, mask_bytes

# What a row takes is measured on texts of these lengths.
_SHORT, _LONG = 2, 66


@dataclass(slots=True, eq=False)
class LlamaPrefix:
    """A prompt that was read."""

    sequence: LlamaSequence

    @property
    def length(self) -> int:
        """Its number of tokens."""
        return self.sequence.length


class LlamaCppKVCache:
    """The rows of one model, each a sequence of a context of llama.cpp.

    Rows refer to the cells of their prompt and hold only the tokens after it. The state of a
    recurrent model cannot be rolled back, except by the last token alone: the logits after it are
    kept, and returned when it is read again.

    Args:
        context: of the library; caches may share it.
        known: replaces ids that the model does not have.
        models: how many models have rows in the context.
        size: of a row, as `row_size` measures it.
    """

    static_shapes = True

    def __init__(
        self,
        context: LlamaContext,
        known: Callable[[Tensor], Tensor],
        *,
        models: int = 1,
        size: RowSize | None = None,
    ) -> None:
        self.context, self.known, self._models, self._size = context, known, models, size
        self.can_roll_back = self.can_cut = not context.weights.recurrent
        self.rows: list[LlamaSequence] = []
        self.lengths: list[int] = []
        self._last: list[Tensor | None] = []  # the logits after each row's last token
        self.forwards = self.tokens = 0

    def prefill(
        self,
        ids: Sequence[int],
        samples: int = 1,  # noqa: ARG002
        *,
        begun: LlamaPrefix | None = None,
    ) -> Generator[int, None, LlamaPrefix]:
        prefix = begun or LlamaPrefix(self.context.new_sequence())
        self.context.reserve(len(ids) - prefix.length)
        known = self.known(torch.tensor(list(ids), dtype=torch.int64)).tolist()
        for start in range(prefix.length, len(ids), self.context.chunk):
            chunk = known[start : start + self.context.chunk]
            self.context.read([(prefix.sequence, chunk, 0)])
            self.forwards += 1
            yield len(chunk)
        return prefix

    def copy_prefix(self, prefix: LlamaPrefix | None, count: int) -> None:
        for _ in range(count):
            row = self.context.new_sequence(is_row=True)
            if prefix is not None and prefix.length:
                self.context.share(prefix.sequence, row)
            self.rows.append(row)
            self.lengths.append(row.length)
            self._last.append(None)

    def shares_prefix(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return self.can_roll_back

    def prefix_variant(self, tokens: int) -> int:  # noqa: ARG002
        return 0

    def copy_block(
        self, source: LlamaPrefix | int, start: int, stop: int
    ) -> NDArray[np.uint8] | None:
        sequence = self.rows[source] if isinstance(source, int) else source.sequence
        whole = (start, stop) == (0, sequence.length)
        return self.context.save(sequence, start, stop) if self.can_roll_back or whole else None

    def load_blocks(
        self, blocks: Sequence[NDArray[np.uint8]], tokens: int, room: int
    ) -> LlamaPrefix:
        prefix = LlamaPrefix(self.context.new_sequence())
        self.context.reserve(room + BLOCK)
        for block in blocks:
            self.context.load(prefix.sequence, block)
        if prefix.length > tokens:
            self.context.cut(prefix.sequence, tokens)
        return prefix

    def expect_drafts(self, tokens: int) -> None:
        """Whether tokens can be removed does not depend on it."""

    def extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        if not self.can_roll_back:
            self.tokens += sum(counts)
            return extend_rows(self.known(tokens), counts, keep, self._extend_row)
        (logits,) = read_rows(self.context, [self], [tokens], [counts], keep)
        return logits

    def _extend_row(self, row: int, ids: Sequence[int], keep: int) -> Tensor:
        sequence, again = self.rows[row], self.rows[row].length - self.lengths[row]
        unread, logits = ids[again:], list[Tensor]()
        if again:
            last = self._last[row]
            assert last is not None
            logits.append(last[None])
        if unread:
            rows = self.context.read([(sequence, unread, min(keep, len(unread)))])
            self.forwards += 1
            logits.append(torch.from_numpy(rows.copy()))
        kept = torch.cat(logits)[-keep:]
        self._last[row], self.lengths[row] = kept[-1], sequence.length
        return kept

    def roll_back(self, lengths: Sequence[int]) -> None:
        for row, (now, kept) in enumerate(zip(self.lengths, lengths, strict=True)):
            if now <= kept:
                continue
            if self.can_roll_back:
                self.context.cut(self.rows[row], kept)
            elif self.rows[row].length > kept + 1 or self._last[row] is None:
                raise ValueError("the state of a recurrent model cannot be rolled back")
            self.lengths[row] = kept

    def drop(self, *, kept: Sequence[int]) -> None:
        for row in set(range(len(self.rows))).difference(kept):
            self.rows[row].free()
        self.rows = [self.rows[row] for row in kept]
        self.lengths = [self.lengths[row] for row in kept]
        self._last = [self._last[row] for row in kept]
        if not kept:
            self.context.reserved[self] = 0
            self.context.forget_if_idle()

    def score(self, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:
        text = self.context.new_sequence()
        self.context.reserve(len(ids))
        known = self.known(torch.tensor(list(ids), dtype=torch.int64)).tolist()
        for start in range(0, len(ids), chunk):
            part = known[start : start + chunk]
            self.forwards += 1
            yield torch.from_numpy(self.context.read([(text, part, len(part))]))
        text.free()

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:  # noqa: ARG002
        for row in ended:
            self.context.cut(self.rows[row], 0)
            self.lengths[row] = 0
        self.context.renew()

    def row_size(self) -> RowSize:
        short, long = (
            len(self.context.save(finish(self.prefill([1] * tokens)).sequence, 0, tokens))
            for tokens in (_SHORT, _LONG)
        )
        per_token = -(-(long - short) // (_LONG - _SHORT)) + mask_bytes(self.context.chunk)
        fixed = 0 if self.can_roll_back else short
        # All of it exists twice while the context grows.
        return RowSize(fixed, per_token, fixed, per_token)

    def allocated_bytes(self) -> int:
        size = self._size or self.row_size()
        return (size.per_token * self.context.cells) // self._models

    def preallocate(self, rows: int, columns: int) -> None:
        self.context.reserved[self] = rows * columns
        self.context.reserve(0)

    def shrink(self, columns: int) -> None:
        self.context.reserved[self] = len(self.rows) * columns
        self.context.shrink()


class JointLlamaCppKVCache:
    """The rows of one model under two prompts, in one context, read by one call of the library.

    Attributes:
        first, second: the rows under each prompt; row r of both is row r of the batch.
    """

    def __init__(
        self,
        context: LlamaContext,
        known: tuple[Callable[[Tensor], Tensor], ...],
        size: RowSize | None = None,
    ) -> None:
        self.first, self.second = (
            LlamaCppKVCache(context, ids, models=2, size=size) for ids in known
        )

    def extend(
        self,
        tokens: tuple[Tensor, Tensor],
        counts: tuple[Sequence[int], Sequence[int]],
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        """As `baco.kv_cache.joint.JointKVCache.extend`."""
        caches = (self.first, self.second)
        first, second = read_rows(self.first.context, caches, tokens, counts, keep)
        return first, second


def read_rows(
    context: LlamaContext,
    caches: Sequence[LlamaCppKVCache],
    tokens: Sequence[Tensor],
    counts: Sequence[Sequence[int]],
    keep: int,
) -> list[Tensor]:
    """Read more tokens of the rows of some caches in one context.

    Args:
        context: of the caches.
        caches: of models that can be rolled back.
        tokens, counts: of each cache, as for `KVCache.extend`.
        keep: as for `KVCache.extend`.

    Returns:
        The logits of each cache's rows.
    """
    reads: list[tuple[LlamaSequence, Sequence[int], int]] = []
    for cache, own, numbers in zip(caches, tokens, counts, strict=True):
        rows = zip(cache.rows, cache.known(own).tolist(), numbers, strict=True)
        reads += [(row, ids[-count:], min(keep, count)) for row, ids, count in rows if count]
    logits, start, parts = context.read(reads), 0, list[Tensor]()
    for cache, numbers in zip(caches, counts, strict=True):
        cache.lengths = [row.length for row in cache.rows]
        cache.tokens += sum(numbers)
        cache.forwards += 1
        outputs = [min(keep, count) for count in numbers]
        stop = start + sum(outputs)
        aligned = _right_aligned(logits[start:stop], outputs, keep)
        parts.append(torch.from_numpy(aligned))
        start = stop
    return parts


def _right_aligned(
    logits: NDArray[np.float32], outputs: Sequence[int], keep: int
) -> NDArray[np.float32]:
    """Logits of rows one after the other, as [B, keep, width]: a view where all rows have ``keep``,
    else a copy with zeros before them.
    """
    shape = (len(outputs), keep, logits.shape[1])
    if len(logits) == len(outputs) * keep:
        return logits.reshape(shape)
    aligned, start = np.zeros(shape, np.float32), 0
    for row, count in enumerate(outputs):
        aligned[row, keep - count :] = logits[start : start + count]
        start += count
    return aligned
