"""Drafts for a round: from continuations, or from a half or a draft model that runs ahead."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baco.drawing import draw
from baco.engine.batch import Batch
from baco.engine.reader import Reader
from baco.engine.sequence import Request
from baco.engine.sequence import Sequence as Answer
from baco.engine.speculation import MOST_AHEAD, Continuations, Plan, Planner, Record
from baco.engine.verdict import Positions
from baco.noise import gumbel_of
from baco.transfer import tensor_on

# Drafts from continuations end where the chance that all of them stand falls below this.
_LEAST_CHANCE = 0.1
# Tokens of every row that the base share is taken from.
_LATELY = 16


@dataclass(slots=True)
class Draft:
    """What a round is to decide.

    Attributes:
        positions: the rows' next positions and their drafts.
        decided: how many drafts of each row have a position that decides them.
        runner: who ran ahead, if anybody.
        rows: where that is a half, its rows of logits at the positions, float32 [N, V].
    """

    positions: Positions
    decided: list[int]
    runner: str | None = None
    rows: Tensor | None = None


class Drafter:
    """Drafts tokens for the rows of a batch, as far as it pays.

    Args:
        reader: reads the rows.
        batch: the rows.
        banned: what the base may never say, bool [V].
        planner: says what pays; None to draft nothing: every round is one position a row.
    """

    def __init__(
        self, reader: Reader, batch: Batch, banned: Tensor, planner: Planner | None
    ) -> None:
        self._reader, self._batch, self._banned = reader, batch, banned
        self._planner = planner
        self._records: dict[Answer, Record] = {}
        self._continuations: dict[Request, Continuations] = {}
        self._guesses: list[list[int]] = []

    def draft(self) -> Draft:
        """The draft of one round."""
        rows = self._batch.rows
        if self._planner is None:
            return self._known([[]] * len(rows))
        self._guesses = [self._guess(row) for row in rows]
        plan = self._planner.plan(
            [self._record(row) for row in rows],
            [len(guess) for guess in self._guesses],
            self._reader.needed(),
            self._base_share(),
        )
        if plan.runner is not None:
            return self._run_ahead(plan)
        return self._known([guess[: plan.steps] for guess in self._guesses])

    def learn(self, draft: Draft, before: Sequence[int], agreed: Sequence[int]) -> None:
        """Take up what a round said, and remember how its drafts fared.

        Args:
            draft: of the round.
            before: tokens each row had.
            agreed: how many drafts of each row stood.
        """
        if self._planner is None:
            return
        for at, (row, had) in enumerate(zip(self._batch.rows, before, strict=True)):
            said, record, guess = row.tokens[had:], self._record(row), self._guesses[at]
            if draft.runner is not None:
                record.saw_ahead(draft.runner, agreed[at], draft.decided[at])
            tried = min(len(guess), len(said))
            right = next((i for i in range(tried) if guess[i] != said[i]), tried)
            record.saw_known(right, tried)
            self._shared(row.request).learn(row.tokens, len(said))
        self._forget()

    def _guess(self, row: Answer) -> list[int]:
        """What continuations draft for a row, as far as there is a chance that it stands."""
        request, at = row.request, len(row.tokens)
        params, chance, most = request.params, self._record(row).known, 0
        while most < min(MOST_AHEAD, row.limit - at - 1) and chance ** (most + 1) > _LEAST_CHANCE:
            most += 1

        def noise(ahead: int, token: int) -> float:
            return gumbel_of(params.seed or 0, row.sample, at + ahead, token)

        return self._shared(request).draft(row.tokens, most, noise, params.temperature)

    def _known(self, drafts: Sequence[Sequence[int]]) -> Draft:
        """Drafts of any lengths, as they are."""
        counts = [len(draft) for draft in drafts]
        most = max(counts)
        padded = [[*draft, *[0] * (most - len(draft))] for draft in drafts]
        drafted = tensor_on(self._batch.device, padded, torch.int64)
        positions = Positions.of([count + 1 for count in counts], drafted.view(len(drafts), most))
        return Draft(positions, counts)

    def _run_ahead(self, plan: Plan) -> Draft:
        """Let one half, or the draft model, speak alone for some tokens."""
        assert plan.runner is not None
        batch, device = self._batch, self._batch.device
        size = len(batch)
        row = torch.arange(size, device=device)
        drafted = torch.empty(size, 0, dtype=torch.int64, device=device)
        rows = []
        for ahead in range(plan.steps):
            fresh = drafted[:, ahead - 1 : ahead] if ahead else drafted
            logits = self._reader.read(plan.runner, fresh, [min(ahead, 1)] * size, 1)[:, 0]
            rows.append(logits)
            if plan.runner == "base":
                logits = logits.masked_fill(self._banned, -torch.inf)
            if batch.draws.logit_bias is not None:
                logits = logits + batch.draws.logit_bias
            keys = batch.keys(row, torch.full_like(row, ahead))
            drafted = torch.cat((drafted, draw(logits, batch.draws, keys)[:, None]), dim=1)
        counts = [plan.steps] * size
        if plan.runner == "draft":
            positions = Positions.of([count + 1 for count in counts], drafted)
            return Draft(positions, counts, plan.runner)
        spoken = torch.stack(rows, dim=1).reshape(size * plan.steps, -1)
        return Draft(Positions.of(counts, drafted), counts, plan.runner, spoken)

    def _record(self, row: Answer) -> Record:
        return self._records.setdefault(row, Record())

    def _shared(self, request: Request) -> Continuations:
        if request not in self._continuations:
            made = self._continuations[request] = Continuations()
            made.learn(request.aligned_ids, len(request.aligned_ids))
        return self._continuations[request]

    def _base_share(self) -> float:
        lately = [source for row in self._batch.rows for source in row.sources[-_LATELY:]]
        return lately.count("base") / len(lately) if lately else 0.0

    def _forget(self) -> None:
        """Keep what belongs to rows that go on, however the others ended."""
        going = [row for row in self._batch.rows if row.finish_reason is None]
        if len(self._records) > len(going):
            self._records = {row: self._record(row) for row in going}
            self._continuations = {
                request: self._shared(request) for request in {row.request for row in going}
            }
