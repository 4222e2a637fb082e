"""The rows that are being decoded, as tables of tensors: one row a sequence, no holes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.sequence import Request, SequenceState
from baco.engine.speculative.cost_model import MAX_DRAFT_TOKENS
from baco.routing.router import Router
from baco.routing.word_boundaries import NO_TOKEN, Switch
from baco.sampling.noise import noise_keys
from baco.sampling.sampler import DrawTable
from baco.source import MODELS, Source

# Tables of counts shrink where they have room for more than so many times the rows.
_MOST_IDLE = 4
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
        self._ahead = torch.arange(MAX_DRAFT_TOKENS + 1, device=device)
        self.rows: list[SequenceState] = []
        self._counts: TokenCounts | None = None  # where any row has penalties
        self._set([])

    def __len__(self) -> int:
        return len(self.rows)

    def admit(self, sequences: list[SequenceState]) -> None:
        """Append rows."""
        if self._counts is None and any(row.request.params.penalises for row in sequences):
            self._counts = TokenCounts(self.device, self.width)
            self._counts.admit(0, self.rows)
        if self._counts is not None:
            self._counts.admit(len(self.rows), sequences)
        self._set([*self.rows, *sequences])

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order."""
        self._set([self.rows[row] for row in order])
        if not self.draws.any_penalty:
            self._counts = None
        elif self._counts is not None:
            self._counts.reorder(order)

    def _set(self, rows: list[SequenceState]) -> None:
        self.rows = rows
        params = [row.request.params for row in rows]
        self.draws = DrawTable.of(params, self.device)
        identity = [(row.request.noise_seed, row.sample) for row in rows]
        self._identity = tensor_on(self.device, identity, torch.int64).view(-1, 2)
        self.requests = list(dict.fromkeys(row.request for row in rows))
        self.needed: list[Source] = [
            half for half in MODELS if any(request.needs(half) for request in self.requests)
        ]
        every = [(row.request.router, row.request.switch) for row in rows]
        self.rules: list[tuple[Router, Switch]] = list(dict.fromkeys(every))
        self.rule = tensor_on(self.device, [self.rules.index(one) for one in every])
        self._every = torch.arange(len(rows), device=self.device)[:, None]
        self._since = [-_KEPT] * len(rows)  # tokens of each row when keys were last made
        self._keys: Tensor | None = None

    def previous(self) -> Tensor:
        """Last token of each answer, int64 [B]; NOTHING before the first."""
        last = [row.tokens[-1] if row.tokens else NO_TOKEN for row in self.rows]
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

    def token_counts(self, row: Tensor, source: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        """What penalties look at, for positions [N].

        Args:
            row: of each position.
            source: the speaking half there.
            drafted: the tokens between the answer so far and the position, int64 [N, K]; the
                vocabulary's size where there is none.

        Returns:
            The tokens of that half's prompt, bool [N, V], and how often the answer said each.
        """
        assert self._counts is not None
        base, aligned = (self._counts.in_prompt[half][row] for half in MODELS)
        prompted = torch.where(source[:, None], base, aligned)
        said = torch.nn.functional.pad(self._counts.in_answer[row], (0, 1))
        said.scatter_add_(1, drafted, torch.ones_like(drafted, dtype=said.dtype))
        return prompted, said[:, :-1]

    def advance(self, before: Sequence[int]) -> None:
        """Take up what the rows have said since they had ``before`` tokens each."""
        self._keys = None
        if self._counts is not None:
            self._counts.add(0, self.rows, before)


class TokenCounts:
    """What penalties look at, in tables of a row for each row of the batch.

    Rows are counted when they join and as they grow, never again. Those without penalties stay
    empty: nothing looks at them.

    Attributes:
        in_answer: how often the answer has each token, int32 [B or more, V].
        in_prompt: by half, the tokens of the prompt as it reads it, bool [B or more, V].
    """

    def __init__(self, device: Any, width: int) -> None:
        self.device, self.width = device, width
        self.in_answer = torch.zeros(0, width, dtype=torch.int32, device=device)
        self.in_prompt = {
            half: torch.zeros(0, width, dtype=torch.bool, device=device) for half in MODELS
        }

    def admit(self, first: int, rows: Sequence[SequenceState]) -> None:
        """Count rows that join, from row ``first`` on."""
        self._reserve(first + len(rows))
        like: dict[Request, int] = {}  # the first row of each prompt
        for at, row in enumerate(rows, first):
            self.in_answer[at] = 0
            known = like.setdefault(row.request, at)
            for half, table in self.in_prompt.items():
                if known != at:
                    table[at] = table[known]
                    continue
                table[at] = False
                if row.request.params.penalises:
                    ids = tensor_on(self.device, list(row.request.ids(half)), torch.int64)
                    table[at].index_fill_(0, ids, True)
        self.add(first, rows, [0] * len(rows))

    def add(self, first: int, rows: Sequence[SequenceState], before: Sequence[int]) -> None:
        """Count what the answers of rows, from row ``first`` on, got since ``before`` tokens."""
        each = enumerate(zip(rows, before, strict=True), first)
        places = [
            at * self.width + token
            for at, (row, had) in each
            if row.request.params.penalises
            for token in row.tokens[had:]
        ]
        index = tensor_on(self.device, places, torch.int64)
        self.in_answer.view(-1).scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def reorder(self, order: Sequence[int]) -> None:
        """Keep the rows ``order``, in that order."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (list(column) for column in zip(*moved, strict=True))
            for table in (self.in_answer, *self.in_prompt.values()):
                table[new] = table[old]
        if len(order) * _MOST_IDLE < len(self.in_answer):
            self._resize(len(order))

    def _reserve(self, rows: int) -> None:
        if rows > len(self.in_answer):
            self._resize(max(rows, len(self.in_answer) * 5 // 4))

    def _resize(self, rows: int) -> None:
        def resized(table: Tensor) -> Tensor:
            made = table.new_zeros(rows, self.width)
            made[: len(table)] = table[:rows]
            return made

        self.in_answer = resized(self.in_answer)
        self.in_prompt = {half: resized(table) for half, table in self.in_prompt.items()}
