"""Drafts for a round: from continuations, or from a half or a draft model that runs ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.drawing import draw, most_likely
from baco.engine.batch import Batch
from baco.engine.reader import Reader
from baco.engine.sequence import Request
from baco.engine.sequence import Sequence as Answer
from baco.engine.speculation import MOST_AHEAD, PLAIN, Continuations, Plan, Planner, Record
from baco.engine.verdict import Positions
from baco.noise import gumbel_of
from baco.routing.routers import Source
from baco.routing.signals import log_partition
from baco.transfer import tensor_on

# Drafts from continuations end where the chance that all of them stand falls below this.
_LEAST_CHANCE = 0.1
# Where no draft paid, none is looked for in a round for every so many rows: looking costs the more
# the more rows there are, and tells the more.
_ROWS_A_PAUSE = 4
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
        sure: of each row, the greatest probability that the runner saw at each draft, as far as it
            was looked at.
        partition: log Σ exp over its rows [N], as far as it was looked at.
    """

    positions: Positions
    decided: list[int]
    runner: str | None = None
    rows: Tensor | None = None
    sure: list[list[float]] = field(default_factory=list)
    partition: Tensor | None = None


@dataclass(slots=True)
class _Watch:
    """How sure a half is of what it drafts while it runs ahead.

    Attributes:
        runner: the half.
        records: of the rows.
        sure: the greatest probability it saw at each draft, of each row.
        chances: that all drafts of a row stand.
        partitions: log Σ exp over the rows of logits of each draft, [B] each.
        gain: tokens that the round is expected to give.
    """

    runner: str
    records: list[Record]
    sure: list[list[float]] = field(init=False)
    chances: list[float] = field(init=False)
    partitions: list[Tensor] = field(default_factory=list)
    gain: float = 0.0

    def __post_init__(self) -> None:
        self.sure = [[] for _ in self.records]
        self.chances = [1.0] * len(self.records)

    def goes_on(self, logits: Tensor, planner: Planner, halves: Sequence[Source]) -> bool:
        """Is one more draft worth its cost, after those that logits [B, V] were the last of?"""
        top = logits.gather(1, most_likely(logits)[:, None])[:, 0]
        self.partitions.append(log_partition(logits, top))
        greatest = (top - self.partitions[-1]).exp().tolist()
        self.gain += sum(self.chances)
        for at, (record, sure) in enumerate(zip(self.records, greatest, strict=True)):
            self.sure[at].append(sure)
            self.chances[at] *= record.chance(self.runner, sure)
        steps = len(self.sure[0])
        return planner.worth_a_step(self.runner, self.chances, steps, self.gain, halves)


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
        self._paused = 0  # rounds to come

    def draft(self) -> Draft:
        """The draft of one round."""
        rows = self._batch.rows
        self._guesses = [[]] * len(rows)
        if self._planner is None or self._paused:
            self._paused = max(0, self._paused - 1)
            return self._known(self._guesses)
        self._guesses = [self._guess(row) for row in rows]
        plan = self._planner.plan(
            [self._record(row) for row in rows],
            [len(guess) for guess in self._guesses],
            self._reader.needed(),
            self._base_share(),
        )
        if plan.runner is not None:
            return self._run_ahead(plan)
        if plan == PLAIN:
            self._paused = len(rows) // _ROWS_A_PAUSE
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
                sure = draft.sure[at] if draft.sure else []
                record.saw_ahead(draft.runner, agreed[at], draft.decided[at], sure)
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
        """Let one half, or the draft model, speak alone for some tokens.

        On a CPU it stops as soon as what it is unsure of makes one more draft a bad bargain; on
        other devices that would mean to wait for it at every token.
        """
        assert plan.runner is not None
        assert self._planner is not None
        batch, device = self._batch, self._batch.device
        size, lone = len(batch), plan.runner == "draft"
        keys = batch.keys()
        drafted = torch.empty(size, 0, dtype=torch.int64, device=device)
        rows: list[Tensor] = []
        looks = device.type == "cpu" and not lone
        watch = _Watch(plan.runner, [self._record(one) for one in batch.rows])
        while len(rows) < (MOST_AHEAD if looks else plan.steps):
            fresh = drafted[:, -1:]
            logits = self._reader.read(plan.runner, fresh, [fresh.shape[1]] * size, 1)[:, 0]
            token = draw(self._shaped(plan.runner, logits), batch.draws, keys[:, len(rows)])
            rows.append(logits)
            drafted = torch.cat((drafted, token[:, None]), dim=1)
            if looks and not watch.goes_on(logits, self._planner, self._reader.needed()):
                break
        counts = [len(rows)] * size
        if lone:
            positions = Positions.of([count + 1 for count in counts], drafted)
            return Draft(positions, counts, plan.runner)
        spoken = torch.stack(rows, dim=1).reshape(size * len(rows), -1)
        known = torch.stack(watch.partitions, dim=1).flatten() if looks else None
        positions = Positions.of(counts, drafted)
        return Draft(positions, counts, plan.runner, spoken, watch.sure, known)

    def _shaped(self, runner: str, logits: Tensor) -> Tensor:
        """What a runner draws from: its logits [B, V], which stay as they are, less what it may not
        say, biased as the rows want it.
        """
        if runner == "base":
            logits = logits.masked_fill(self._banned, -torch.inf)
        elif self._batch.draws.biased is not None:
            logits = logits.clone()
        return self._batch.draws.bias(logits)

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
