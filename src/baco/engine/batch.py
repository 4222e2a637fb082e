"""The rows that are being decoded, as tables of tensors: one row a sequence, no holes."""

from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor

from baco.drawing import DrawTable
from baco.engine.sequence import Sequence
from baco.engine.speculation import MOST_AHEAD
from baco.noise import noise_keys
from baco.routing.routers import Router
from baco.routing.rules import HALVES, Source
from baco.routing.select import NOTHING, Switch
from baco.transfer import tensor_on

# Positions of every row whose noise keys are made at once.
_KEPT = 64


class Batch:
    """What a step needs to know of every row, on the device where tokens are drawn.

    Attributes:
        rows: the sequences, in the order of the tables.
        rules: the routers of the rows and where they may switch, each once.
        rule: which of them each row goes by, int64 [B].
        draws: the rows' sampling parameters.
        requests: of the rows, each once.
        needed: the halves that any row needs.
    """

    def __init__(self, device: Any, width: int) -> None:
        self.device, self.width = device, width
        self._ahead = torch.arange(MOST_AHEAD + 1, device=device)
        self.rows: list[Sequence] = []
        self._set([])

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, sequences: list[Sequence]) -> None:
        """Append rows."""
        self._set([*self.rows, *sequences])

    def reorder(self, order: Rows[int]) -> None:
        """Keep the rows ``order``, in that order."""
        self._set([self.rows[row] for row in order])

    def _set(self, rows: list[Sequence]) -> None:
        self.rows = rows
        params = [row.request.params for row in rows]
        self.draws = DrawTable.of(params, self.device)
        identity = [(row.request.noise_seed, row.sample) for row in rows]
        self._identity = tensor_on(self.device, identity, torch.int64).view(-1, 2)
        self.requests = list(dict.fromkeys(row.request for row in rows))
        self.needed: list[Source] = [
            half for half in HALVES if any(request.needs(half) for request in self.requests)
        ]
        every = [(row.request.router, row.request.switch) for row in rows]
        self.rules: list[tuple[Router, Switch]] = list(dict.fromkeys(every))
        self.rule = tensor_on(self.device, [self.rules.index(one) for one in every])
        self._every = torch.arange(len(rows), device=self.device)[:, None]
        self._since = [-_KEPT] * len(rows)  # tokens of each row when keys were last made
        self._keys: Tensor | None = None
        self._said: Tensor | None = None
        if self.draws.any_penalty:
            self._prompted = {half: self._count_prompts(half) > 0 for half in HALVES}
            self._said = self._count([row.tokens for row in rows])

    def previous(self) -> Tensor:
        """Last token of each answer, int64 [B]; NOTHING before the first."""
        last = [row.tokens[-1] if row.tokens else NOTHING for row in self.rows]
        return tensor_on(self.device, last, torch.int64)

    def active(self) -> Tensor:
        """The half that spoke it, bool [B], True for the base."""
        base = [bool(row.sources) and row.sources[-1] == "base" for row in self.rows]
        return tensor_on(self.device, base, torch.bool)

    def keys(self) -> Tensor:
        """The noise keys of each row's next positions, as many as a round can decide: int64
        [B, MOST_AHEAD + 1, 2].
        """
        if self._keys is None:
            lengths = [len(row.tokens) for row in self.rows]
            gone = [now - then for now, then in zip(lengths, self._since, strict=True)]
            if not gone or max(gone) + len(self._ahead) > _KEPT:
                self._since, gone = lengths, [0] * len(lengths)
                at = tensor_on(self.device, [[length] for length in lengths])
                seed, sample = self._identity[:, :1], self._identity[:, 1:]
                span = torch.arange(_KEPT, device=self.device)
                self._kept = noise_keys(seed, sample, at + span)
            ahead = tensor_on(self.device, gone)[:, None] + self._ahead
            self._keys = self._kept[self._every, ahead]
        return self._keys

    def heard(self, row: Tensor, source: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """What penalties look at, for positions [N].

        Args:
            row: of each position.
            source: the speaking half there.
            drafted: the tokens between the answer so far and the position, int64 [N, K]; the
                vocabulary's size where there is none.

        Returns:
            The tokens of that half's prompt, bool [N, V], and how often the answer said each.
        """
        assert self._said is not None
        prompted = torch.where(
            source[:, None], self._prompted["base"][row], self._prompted["aligned"][row]
        )
        said = torch.nn.functional.pad(self._said[row], (0, 1))
        said.scatter_add_(1, drafted, torch.ones_like(drafted, dtype=said.dtype))
        return prompted, said[:, :-1]

    def hear(self, before: Rows[int]) -> None:
        """Take up what the rows have said since they had ``before`` tokens each."""
        self._keys = None
        if self._said is not None:
            each = zip(self.rows, before, strict=True)
            self._said += self._count([row.tokens[had:] for row, had in each])

    def _count_prompts(self, half: Source) -> Tensor:
        return self._count([row.request.ids(half) for row in self.rows])

    def _count(self, texts: Rows[Rows[int]]) -> Tensor:
        counts = torch.zeros(len(texts), self.width, dtype=torch.int32, device=self.device)
        for row, text in enumerate(texts):
            ids = tensor_on(self.device, list(text), torch.int64)
            counts[row].scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        return counts
