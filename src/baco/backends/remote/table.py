"""Sparse rows as tensors that routers read: what is known, and what the rest may be at most.

A server tells the most likely tokens of a position. The rest of the probability is somewhere among
the other tokens, none of which is likelier than the least that was told. Two fillings bound what
that can mean. *Narrow*: on as few tokens as can hold it, each as likely as may be; of all that the
row can be, this has the least entropy. *Wide*: spread evenly; this has the most. Both leave the
most likely tokens and their probabilities as they are. Where no entropy is in question, one column
per row stands for all that is not known, at the most that any such token can have.
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
    """The tokens that any of P positions knows of, and both halves' rows on them.

    Attributes:
        vocabulary: the pair's.
        banned: tokens the base may never say, bool [V].
        base, aligned: rows; the same where one half's are not known.
        others: further tokens that need a column.
        whole: as many columns as the vocabulary has tokens, for entropies.
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
        found = set(self.others)
        for row in (*self.base, *self.aligned):
            found |= row.known.keys()
        return sorted(found)

    @cached_property
    def column(self) -> dict[int, int]:
        """Where each of them stands."""
        return {token: at for at, token in enumerate(self.ids)}

    @property
    def fillers(self) -> int:
        """How many columns stand for tokens that are not known."""
        return self.vocabulary.size - len(self.ids) if self.whole else 1

    def filled(self, *, wide: bool) -> tuple[Tensor, Tensor]:
        """Both halves' rows: float32 [P, W], W being V where the table is whole."""
        fill = self._wide if wide else self._narrow
        base = torch.stack([fill(row) for row in self.base])
        if self.aligned is self.base:
            return base, base
        return base, torch.stack([fill(row) for row in self.aligned])

    @cached_property
    def words(self) -> Vocabulary:
        """What the columns are. A filler may be any token: it passes for whatever may be said."""
        every, ids = self.vocabulary, torch.tensor(self.ids)
        more = torch.zeros(self.fillers, dtype=torch.int8)
        return Vocabulary(
            len(self.ids) + self.fillers,
            torch.cat((every.role[ids], more)),
            torch.cat((every.word_start[ids], more == 0)),
            torch.cat((every.ends_word[ids], more != 0)),
            torch.cat((every.special[ids], more != 0)),
        )

    @cached_property
    def forbidden(self) -> Tensor:
        """The columns the base may never say, bool [W]."""
        more = torch.zeros(self.fillers, dtype=torch.bool)
        return torch.cat((self.banned[torch.tensor(self.ids)], more))

    def _narrow(self, row: Row) -> Tensor:
        made, rest = self._empty(), self._rest(row)
        if rest:
            most, free = math.exp(row.cap), self._free(row)
            full = min(int(rest / most), len(free))
            made[free[:full]] = row.cap
            if full < len(free) and rest - full * most > 0:
                made[free[full]] = min(math.log(rest - full * most), row.cap)
        return self._known(made, row)

    def _free(self, row: Row) -> list[int]:
        """The columns that a row's rest may stand in."""
        own = len(self.ids)
        if not self.whole:
            return [own]
        others = [at for at, token in enumerate(self.ids) if token not in row.known]
        return [*range(own, own + self.fillers), *others]

    def _wide(self, row: Row) -> Tensor:
        made, rest = self._empty(), self._rest(row)
        if rest:
            made[:] = math.log(rest / (self.vocabulary.size - len(row.known)))
        return self._known(made, row)

    def _empty(self) -> Tensor:
        return torch.full((len(self.ids) + self.fillers,), -math.inf)

    def _known(self, made: Tensor, row: Row) -> Tensor:
        columns = [self.column[token] for token in row.known]
        made[columns] = torch.tensor(list(row.known.values()))
        return made

    def _rest(self, row: Row) -> float:
        """The probability of all tokens that are not known; rounding must not make it more than
        they can have.
        """
        if row.cap == -math.inf:
            return 0.0
        room = (self.vocabulary.size - len(row.known)) * math.exp(row.cap)
        return min(max(0.0, 1.0 - math.fsum(map(math.exp, row.known.values()))), room)
