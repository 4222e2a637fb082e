"""The rows that are being decoded, as tables of tensors: one row a sequence, no holes."""

from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor

from baco.drawing import DrawTable
from baco.engine.sequence import Sequence
from baco.noise import COIN, noise_keys, uniform
from baco.routing.select import NOTHING


class Batch:
    """What one step needs to know of every row, on the device where tokens are drawn.

    Attributes:
        rows: the sequences, in the order of the tables.
        previous: last token of each answer, int64 [B]; NOTHING before the first.
        active: the half that spoke it, bool [B], True for the base.
        draws: the rows' sampling parameters.
    """

    def __init__(self, device: Any, width: int) -> None:
        self.device, self.width = device, width
        self.rows: list[Sequence] = []
        self.previous = torch.empty(0, dtype=torch.int64, device=device)
        self.active = torch.empty(0, dtype=torch.bool, device=device)
        self._identity = torch.empty(0, 2, dtype=torch.int64, device=device)  # seed, sample
        self._seen: tuple[Tensor, Tensor] | None = None
        self._said: Tensor | None = None
        self.draws = DrawTable.of([], device)

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, sequences: list[Sequence]) -> None:
        """Append rows for fresh sequences of one request."""
        count, params = len(sequences), sequences[0].request.params
        self.rows += sequences
        self.previous = torch.cat((self.previous, self.previous.new_full((count,), NOTHING)))
        self.active = torch.cat((self.active, self.active.new_zeros(count)))
        identity = torch.tensor([[params.seed, s.sample] for s in sequences], device=self.device)
        self._identity = torch.cat((self._identity, identity))
        self._set_draws()
        if self.draws.any_penalty:
            self._seen = self._read_seen()

    def reorder(self, order: Rows[int]) -> None:
        """Keep the rows ``order``, in that order."""
        self.rows = [self.rows[row] for row in order]
        index = torch.tensor(list(order), dtype=torch.int64, device=self.device)
        self.previous, self.active = self.previous[index], self.active[index]
        self._identity = self._identity[index]
        if self._seen is not None:
            assert self._said is not None
            self._seen = (self._seen[0][index], self._seen[1][index])
            self._said = self._said[index]
        self._set_draws()

    def keys(self) -> Tensor:
        """The noise keys of the position each row is at: int64 [B, 2]."""
        position = torch.tensor([len(row.tokens) for row in self.rows], device=self.device)
        return noise_keys(self._identity[:, 0], self._identity[:, 1], position)

    def coin(self, keys: Tensor) -> Tensor:
        """A uniform per row, for routers that toss one: float32 [B]."""
        return uniform(keys, keys.new_full((len(keys),), COIN))

    def seen(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the speaking half's prompt, bool [B, V]; how often the answer said each."""
        assert self._seen is not None
        assert self._said is not None
        return torch.where(source[:, None], *self._seen), self._said

    def advance(self, token: Tensor, source: Tensor) -> None:
        """Every row said ``token`` [B] from ``source`` [B]."""
        self.previous, self.active = token, source
        if self._seen is not None:
            assert self._said is not None
            self._said.scatter_add_(
                1, token[:, None], torch.ones_like(token, dtype=torch.int32)[:, None]
            )

    def _set_draws(self) -> None:
        params = [row.request.params for row in self.rows]
        self.draws = DrawTable.of(params, self.device, self.width)

    def _read_seen(self) -> tuple[Tensor, Tensor]:
        tables = []
        for half in ("base_ids", "aligned_ids"):
            table = torch.zeros(len(self), self.width, dtype=torch.bool, device=self.device)
            for index, row in enumerate(self.rows):
                table[index, list(getattr(row.request, half))] = True
            tables.append(table)
        self._said = torch.zeros(len(self), self.width, dtype=torch.int32, device=self.device)
        for index, row in enumerate(self.rows):
            for token in row.tokens:
                self._said[index, token] += 1
        return tables[0], tables[1]
