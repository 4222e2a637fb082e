"""A KV cache of a model whose rotary factors depend on the length of a text.

Cached keys contain the factors that they were computed with. So a row that grows beyond the
original length is read again from its first token, once, with the long factors.
"""

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from baco.kv_cache.batched import CPU_CHUNK, BatchedKVCache, Forward
from baco.kv_cache.protocol import RowSize, finish
from baco.kv_cache.slots import Prefix
from baco.models.rope import LongRope


class LongRopeKVCache:
    """A `BatchedKVCache` that reads each row with the factors of that row's length.

    Args:
        forward: of the model; it reads row r with the long factors where its plan says so.
        rope: of the model.
        chunk: tokens of a prompt that are read at once.
    """

    can_roll_back, can_cut, static_shapes = True, True, False

    def __init__(self, forward: Forward, rope: LongRope, *, chunk: int = CPU_CHUNK) -> None:
        self._rows, self._rope = BatchedKVCache(forward, chunk=chunk), rope
        self._texts: list[list[int]] = []  # what each row has read
        self._long: list[bool] = []  # the factors in each row's cached keys

    @property
    def lengths(self) -> list[int]:
        return self._rows.lengths

    @property
    def forwards(self) -> int:
        return self._rows.forwards

    @property
    def tokens(self) -> int:
        return self._rows.tokens

    def prefill(
        self, ids: Sequence[int], samples: int = 1, *, begun: Prefix | None = None
    ) -> Generator[int, None, tuple[Prefix, list[int]]]:
        # The next token decides: no logits are needed before it.
        long = self._rope.is_long(len(ids) + 1)
        prefix = yield from self._rows.prefill(ids, samples, begun=begun, long=long)
        return prefix, list(ids)

    def copy_prefix(self, prefix: tuple[Prefix, list[int]] | None, count: int) -> None:
        cached, text = prefix or (None, [])
        self._rows.copy_prefix(cached, count)
        self._texts += [list(text) for _ in range(count)]
        self._long += [self._rope.is_long(len(text) + 1)] * count

    def shares_prefix(self, tokens: int, samples: int) -> bool:
        return self._rows.shares_prefix(tokens, samples)

    def prefix_variant(self, tokens: int) -> int:
        return int(self._rope.is_long(tokens + 1))

    def copy_block(
        self, source: tuple[Prefix, list[int]] | int, start: int, stop: int
    ) -> list[tuple[Tensor, Tensor]] | None:
        if not isinstance(source, int):
            return self._rows.copy_block(source[0], start, stop)
        # After a roll back, a row may still have the factors of a longer text.
        if self._long[source] != self.prefix_variant(self.lengths[source]):
            return None
        return self._rows.copy_block(source, start, stop)

    def load_blocks(
        self, blocks: Sequence[list[tuple[Tensor, Tensor]]], tokens: int, room: int
    ) -> Prefix:
        return self._rows.load_blocks(blocks, tokens, room)

    def expect_drafts(self, tokens: int) -> None:
        """Any token can be removed."""

    def extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        span = tokens.shape[1]
        new = [row[span - count :] for row, count in zip(tokens.tolist(), counts, strict=True)]
        # Tokens up to the original length are read with the short factors; those beyond it are read
        # after the row has changed to the long ones.
        splits = [
            min(len(ids), max(0, self._rope.original_length - length)) or len(ids)
            for ids, length in zip(new, self.lengths, strict=True)
        ]
        logits = self._extend([ids[:split] for ids, split in zip(new, splits, strict=True)], keep)
        beyond = [ids[split:] for ids, split in zip(new, splits, strict=True)]
        if any(beyond):
            later = self._extend(beyond, keep)
            for row, ids in enumerate(beyond):
                count = min(len(ids), keep)
                logits[row] = torch.cat((logits[row, count:], later[row, keep - count :]))
        return logits

    def _extend(self, new: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Read tokens of every row, none of which crosses the original length meanwhile."""
        for row, ids in enumerate(new):
            length = self.lengths[row]
            if ids and self._long[row] != self._rope.is_long(length + 1):
                self._long[row] = not self._long[row]
                prefix = finish(self._rows.prefill(self._texts[row], long=self._long[row]))
                self._rows.replace(row, prefix)
            self._texts[row] += ids
        span = max(keep, *map(len, new))
        padding = [list(ids[:1]) or [0] for ids in new]  # another token's logits may be damaged
        padded = torch.tensor(
            [fill * (span - len(ids)) + list(ids) for fill, ids in zip(padding, new, strict=True)]
        )
        return self._rows.extend(padded, [len(ids) for ids in new], keep, long=self._long)

    def roll_back(self, lengths: Sequence[int]) -> None:
        self._rows.roll_back(lengths)
        for text, length in zip(self._texts, lengths, strict=True):
            del text[length:]

    def drop(self, *, kept: Sequence[int]) -> None:
        self._rows.drop(kept=kept)
        self._texts = [self._texts[row] for row in kept]
        self._long = [self._long[row] for row in kept]

    def score(self, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:
        return self._rows.score(ids, chunk, long=self._rope.is_long(len(ids) + 1))

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        self._rows.clear(running, ended)

    def row_size(self) -> RowSize:
        return self._rows.row_size()

    def allocated_bytes(self) -> int:
        return self._rows.allocated_bytes()

    def preallocate(self, rows: int, columns: int) -> None:
        """The tables move."""

    def shrink(self, columns: int) -> None:
        self._rows.shrink(columns)
