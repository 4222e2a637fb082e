"""Cached keys and values of a model whose rotary factors depend on how long a text is.

Cached keys hold the factors that they were read with. So a row that grows beyond the original
length is read again from its first token, once, with the long factors.
"""

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from baco.kv_cache.batched import CPU_PIECE, BatchedKVCache, Forward, read_through
from baco.kv_cache.shared_prefix import Prefix
from baco.kv_cache.slots import CacheSize
from baco.models.rope import LongRope


class LongRopeKVCache:
    """A `BatchedKVCache` whose rows are each read with the factors of their own length.

    Args:
        forward: of the model; it reads row r with the long factors where its plan says so.
        rope: of the model.
        piece: tokens of a prompt that are read at once.
    """

    can_roll_back = True

    def __init__(self, forward: Forward, rope: LongRope, *, piece: int = CPU_PIECE) -> None:
        self._slots, self._rope = BatchedKVCache(forward, piece=piece), rope
        self._texts: list[list[int]] = []  # what each row has read
        self._long: list[bool] = []  # the factors that its cached keys hold

    @property
    def lengths(self) -> list[int]:
        return self._slots.lengths

    @property
    def forwards(self) -> int:
        return self._slots.forwards

    @property
    def tokens(self) -> int:
        return self._slots.tokens

    def shares(self, tokens: int, samples: int) -> bool:
        return self._slots.shares(tokens, samples)

    def reading(
        self, ids: Sequence[int], samples: int = 1
    ) -> Generator[int, None, tuple[Prefix, list[int]]]:
        # The next token decides: no row of logits is wanted before it.
        long = self._rope.is_long(len(ids) + 1)
        prefix = yield from self._slots.reading(ids, samples, long=long)
        return prefix, list(ids)

    def prefill(self, ids: Sequence[int], samples: int = 1) -> tuple[Prefix, list[int]]:
        return read_through(self.reading(ids, samples))

    def after_each(self, ids: Sequence[int], piece: int) -> Iterator[Tensor]:
        return self._slots.after_each(ids, piece, long=self._rope.is_long(len(ids) + 1))

    def admit(self, prefix: tuple[Prefix, list[int]] | None, count: int) -> None:
        read, text = prefix or (None, [])
        self._slots.admit(read, count)
        self._texts += [list(text) for _ in range(count)]
        self._long += [self._rope.is_long(len(text) + 1)] * count

    def reorder(self, order: Sequence[int]) -> None:
        self._slots.reorder(order)
        self._texts = [self._texts[row] for row in order]
        self._long = [self._long[row] for row in order]

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        span = tokens.shape[1]
        new = [row[span - count :] for row, count in zip(tokens.tolist(), counts, strict=True)]
        # Tokens up to the original length are read with the short factors, those beyond it after
        # the row's change to the long ones.
        before = [
            min(len(ids), max(0, self._rope.original_length - length)) or len(ids)
            for ids, length in zip(new, self.lengths, strict=True)
        ]
        logits = self._read([ids[:split] for ids, split in zip(new, before, strict=True)], keep)
        beyond = [ids[split:] for ids, split in zip(new, before, strict=True)]
        if any(beyond):
            later = self._read(beyond, keep)
            for row, ids in enumerate(beyond):
                count = min(len(ids), keep)
                logits[row] = torch.cat((logits[row, count:], later[row, keep - count :]))
        return logits

    def _read(self, new: Sequence[Sequence[int]], keep: int) -> Tensor:
        """Read tokens of every row, none of which crosses the original length meanwhile."""
        for row, ids in enumerate(new):
            length = self.lengths[row]
            if ids and self._long[row] != self._rope.is_long(length + 1):
                self._long[row] = not self._long[row]
                prefix = self._slots.prefill(self._texts[row], long=self._long[row])
                self._slots.replace(row, prefix)
            self._texts[row] += ids
        span = max(keep, *map(len, new))
        fills = [list(ids[:1]) or [0] for ids in new]  # what another token says may be damaged
        padded = torch.tensor(
            [fill * (span - len(ids)) + list(ids) for fill, ids in zip(fills, new, strict=True)]
        )
        return self._slots.read(padded, [len(ids) for ids in new], keep, long=self._long)

    def roll_back(self, lengths: Sequence[int]) -> None:
        self._slots.roll_back(lengths)
        for text, length in zip(self._texts, lengths, strict=True):
            del text[length:]

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        self._slots.clean(going, ended)

    def size(self) -> CacheSize:
        return self._slots.size()

    def held(self) -> int:
        return self._slots.held()

    def shrink(self, columns: int) -> None:
        self._slots.shrink(columns)
