"""Sparse rows as tensors that routers read: the known tokens, and the most that others can have.

A server returns the most likely tokens of a position. The remaining probability belongs to the
other tokens, none of which is likelier than the least likely one returned. One column per row
represents all unknown tokens, with the highest probability that any of them can have. A router that
reads whole rows gets one column per token of the vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from baco.backends.remote.wire import Row
from baco.text.vocabulary import Vocabulary


@dataclass(frozen=True)
class Table:
    """The tokens known at any of P positions, and both models' rows on them.

    Attributes:
        vocabulary: the pair's.
        banned: tokens that are never drawn from the base, bool [V].
        base, aligned: rows; the same ones where only one model's are known.
        others: further tokens that need a column.
        whole: have as many columns as the vocabulary has tokens.
    """

    vocabulary: Vocabulary
    banned: Tensor
    base: Sequence[Row]
    aligned: Sequence[Row]
    others: Collection[int]
    whole: bool = False

    @cached_property
    def ids(self) -> list[int]:
        """The tokens that have a column of their own."""
        ids = set(self.others)
        for row in (*self.base, *self.aligned):
            ids |= row.known.keys()
        return sorted(ids)

    @cached_property
    def column(self) -> dict[int, int]:
        """The column of each of them."""
        return {token: at for at, token in enumerate(self.ids)}

    @property
    def fillers(self) -> int:
        """The number of columns for unknown tokens."""
        return self.vocabulary.size - len(self.ids) if self.whole else 1

    def filled(self) -> tuple[Tensor, Tensor]:
        """Both models' rows: float32 [P, W], W being V where the table is whole."""
        base = torch.stack([self._filled(row) for row in self.base])
        if self.aligned is self.base:
            return base, base
        return base, torch.stack([self._filled(row) for row in self.aligned])

    @cached_property
    def words(self) -> Vocabulary:
        """The vocabulary of the columns. A filler may be any token: every source may write it."""
        whole, ids = self.vocabulary, torch.tensor(self.ids)
        more = torch.zeros(self.fillers, dtype=torch.int8)
        return Vocabulary(
            len(self.ids) + self.fillers,
            torch.cat((whole.role[ids], more)),
            torch.cat((whole.word_start[ids], more == 0)),
            torch.cat((whole.ends_word[ids], more != 0)),
            torch.cat((whole.special[ids], more != 0)),
        )

    @cached_property
    def forbidden(self) -> Tensor:
        """The columns that are never drawn from the base, bool [W]."""
        more = torch.zeros(self.fillers, dtype=torch.bool)
        return torch.cat((self.banned[torch.tensor(self.ids)], more))

    def _filled(self, row: Row) -> Tensor:
        filled = torch.full((len(self.ids) + self.fillers,), -math.inf)
        rest = row.rest(self.vocabulary.size)
        if rest and self.whole:
            filled[:] = math.log(rest / (self.vocabulary.size - len(row.known)))
        elif rest:
            filled[-1] = min(math.log(rest), row.cap)
        columns = [self.column[token] for token in row.known]
        filled[columns] = torch.tensor(list(row.known.values()))
        return filled
