"""Sparse rows as tensors that routers read: the known tokens, and bounds on the others.

A server returns the most likely tokens of a position. The remaining probability belongs to the
other tokens, none of which is likelier than the least likely one returned. Two ways to fill it in
bound the entropy of the row. *Narrow*: on as few tokens as can hold it, each as likely as possible;
no possible row has less entropy. *Wide*: spread evenly; no possible row has more. Both keep the
most likely tokens and their probabilities. Where the router reads no entropy, one column per row
represents all unknown tokens, with the highest probability that any of them can have.
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
        whole: have as many columns as the vocabulary has tokens, for entropies.
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

    def filled(self, *, wide: bool) -> tuple[Tensor, Tensor]:
        """Both models' rows: float32 [P, W], W being V where the table is whole."""
        fill = self._wide if wide else self._narrow
        base = torch.stack([fill(row) for row in self.base])
        if self.aligned is self.base:
            return base, base
        return base, torch.stack([fill(row) for row in self.aligned])

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

    def _narrow(self, row: Row) -> Tensor:
        filled, rest = self._empty(), self._rest(row)
        if rest:
            most, free = math.exp(row.cap), self._free(row)
            full = min(int(rest / most), len(free))
            filled[free[:full]] = row.cap
            if full < len(free) and rest - full * most > 0:
                filled[free[full]] = min(math.log(rest - full * most), row.cap)
        return self._with_known(filled, row)

    def _free(self, row: Row) -> list[int]:
        """The columns that may hold the remaining probability of a row."""
        own = len(self.ids)
        if not self.whole:
            return [own]
        others = [at for at, token in enumerate(self.ids) if token not in row.known]
        return [*range(own, own + self.fillers), *others]

    def _wide(self, row: Row) -> Tensor:
        filled, rest = self._empty(), self._rest(row)
        if rest:
            filled[:] = math.log(rest / (self.vocabulary.size - len(row.known)))
        return self._with_known(filled, row)

    def _empty(self) -> Tensor:
        return torch.full((len(self.ids) + self.fillers,), -math.inf)

    def _with_known(self, filled: Tensor, row: Row) -> Tensor:
        columns = [self.column[token] for token in row.known]
        filled[columns] = torch.tensor(list(row.known.values()))
        return filled

    def _rest(self, row: Row) -> float:
        """The probability of all unknown tokens, at most what they can have despite rounding."""
        if row.cap == -math.inf:
            return 0.0
        room = (self.vocabulary.size - len(row.known)) * math.exp(row.cap)
        return min(max(0.0, 1.0 - math.fsum(map(math.exp, row.known.values()))), room)
