"""Drafts for a round: from continuations, or from a half or a draft model that runs ahead."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.engine.runner import ModelRunner
from baco.engine.sequence import Request, SequenceState
from baco.engine.speculative.cost_model import (
    MAX_DRAFT_TOKENS,
    PLAIN,
    AcceptanceStats,
    DraftPlanner,
    Plan,
)
from baco.engine.speculative.ngram import NgramTable
from baco.engine.speculative.self_draft import Run
from baco.engine.verify import Positions
from baco.sampling.noise import gumbel_of
from baco.sampling.sampler import draw
from baco.source import Source

# Drafts from continuations end where the chance that all of them stand falls below this.
_LEAST_CHANCE = 0.1
# Where no draft paid, none is looked for in a round for every so many rows: looking costs the more
# the more rows there are, and tells the more.
_ROWS_A_PAUSE = 4
# Tokens of prompts that are taken up in one round.
_TAKEN_UP = 1024
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
        reads_on: the other half is to read the last drafts too,
        beyond: and says so much of what comes after them, float32 [B, V].
    """

    positions: Positions
    decided: list[int]
    runner: str | None = None
    rows: Tensor | None = None
    sure: list[list[float]] = field(default_factory=list)
    partition: Tensor | None = None
    read_last_draft: bool = False
    bonus_logits: Tensor | None = None


def _other(half: str | None) -> Source:
    return "base" if half == "aligned" else "aligned"


class Proposer:
    """Drafts tokens for the rows of a batch, as far as it pays.

    Args:
        reader: reads the rows.
        batch: the rows.
        banned: what the base may never say, bool [V].
        planner: says what pays; None to draft nothing: every round is one position a row.
    """

    def __init__(
        self, reader: ModelRunner, batch: Batch, banned: Tensor, planner: DraftPlanner | None
    ) -> None:
        self._runner, self._batch, self._banned = reader, batch, banned
        self._planner = planner
        self._records: dict[SequenceState, AcceptanceStats] = {}
        self._continuations: dict[Request, NgramTable] = {}
        self._guesses: list[list[int]] = []
        self._paused = 0  # rounds to come
        # Where all drafts of all rows stood: what the half that checked them would say next.
        self._beyond: dict[SequenceState, int] = {}

    def draft(self, positions: int = MAX_DRAFT_TOKENS + 1) -> Draft:
        """The draft of one round, of so many positions of each row at most."""
        rows = self._batch.rows
        self._guesses = [[]] * len(rows)
        if self._planner is not None:
            self._take_up_prompts()
        if self._planner is None or self._paused:
            self._paused = max(0, self._paused - 1)
            return self._known(self._guesses)
        room = {name: min(positions - 1, self._runner.room(name)) for name in self._runner.stores}
        most = min(room[half] for half in self._runner.needed())
        self._guesses = [self._guess(row, most) for row in rows]
        plan = self._planner.plan(
            [self._record(row) for row in rows],
            [len(guess) for guess in self._guesses],
            self._runner.needed(),
            self._base_share(),
            room,
        )
        if plan.runner is not None:
            return self._run_ahead(plan, min(MAX_DRAFT_TOKENS, most, room[plan.runner]))
        if plan == PLAIN:
            self._paused = len(rows) // _ROWS_A_PAUSE
        return self._known([guess[: plan.steps] for guess in self._guesses])

    def pause(self) -> None:
        """Draft nothing in the next round."""
        self._paused = max(1, self._paused)

    def learn(self, draft: Draft, before: Sequence[int], accepted: Sequence[int]) -> None:
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
                record.update_self_draft(draft.runner, accepted[at], draft.decided[at], sure)
            tried = min(len(guess), len(said))
            right = next((i for i in range(tried) if guess[i] != said[i]), tried)
            record.update_ngram(right, tried)
            self._shared(row.request).learn(row.tokens, len(said))
        self._beyond = self._look_beyond(draft, accepted)
        self._forget()

    def _look_beyond(self, draft: Draft, accepted: Sequence[int]) -> dict[SequenceState, int]:
        """What the half that checked would say next, where all drafts of all rows stood."""
        if draft.bonus_logits is None or list(accepted) != draft.decided:
            return {}
        logits = self._shaped(_other(draft.runner), draft.bonus_logits)
        token = draw(logits, self._batch.draws, self._batch.keys()[:, 0])
        return dict(zip(self._batch.rows, token.tolist(), strict=True))

    def _guess(self, row: SequenceState, room: int) -> list[int]:
        """What continuations draft for a row, up to ``room`` tokens, as far as there is a chance
        that it stands.
        """
        request, at = row.request, len(row.tokens)
        params, chance, most = request.params, self._record(row).known, 0
        bound = min(MAX_DRAFT_TOKENS, room, row.limit - at - 1)
        while most < bound and chance ** (most + 1) > _LEAST_CHANCE:
            most += 1

        def noise(ahead: int, token: int) -> float:
            return gumbel_of(request.noise_seed, row.sample, at + ahead, token)

        return self._shared(request).draft(row.tokens, most, noise, params.temperature)

    def _known(self, drafts: Sequence[Sequence[int]]) -> Draft:
        """Drafts of any lengths, as they are."""
        counts = [len(draft) for draft in drafts]
        most = max(counts)
        padded = [[*draft, *[0] * (most - len(draft))] for draft in drafts]
        drafted = tensor_on(self._batch.device, padded, torch.int64)
        positions = Positions.of([count + 1 for count in counts], drafted.view(len(drafts), most))
        return Draft(positions, counts)

    def _run_ahead(self, plan: Plan, most: int) -> Draft:
        """Let one half, or the draft model, speak alone for some tokens, at most ``most``.

        On a CPU it stops as soon as what it is unsure of makes one more draft a bad bargain; on
        other devices that would mean to wait for it at every token.
        """
        assert plan.runner is not None
        assert self._planner is not None
        batch, needed = self._batch, self._runner.needed()
        lone = plan.runner == "draft"
        looks = batch.device.type == "cpu" and not lone
        run = Run(plan.runner, [self._record(row) for row in batch.rows], looks)
        fresh = torch.empty(len(batch), 0, dtype=torch.int64, device=batch.device)
        if looks and all(row in self._beyond for row in batch.rows):
            self._start(run)
        while len(run.tokens) < (most if looks else plan.steps):
            if run.tokens:
                if looks and not self._planner.worth_a_step(run, needed):
                    break
                fresh = run.tokens[-1][:, None]
            counts = [fresh.shape[1]] * len(batch)
            logits = self._runner.read(plan.runner, fresh, counts, 1)[:, 0]
            run.say(logits, self._drawn(run, logits))
        if lone:
            return Draft(run.positions(more=1), run.counts, plan.runner)
        on = looks and self._planner.bonus_pays(run, _other(plan.runner))
        return Draft(
            run.positions(), run.counts, plan.runner, run.logits, run.sure, run.partition, on
        )

    def _start(self, run: Run) -> None:
        """Say one token of every row, and two where the first are what the half that checked the
        last round expected: then the rows after them have been read with them.
        """
        rows = self._batch.rows
        expected = torch.tensor([[self._beyond[row]] for row in rows])
        logits = self._runner.read(run.runner, expected, [1] * len(rows), 2)
        token = self._drawn(run, logits[:, 0])
        run.say(logits[:, 0], token)
        right = (token == expected[:, 0]).tolist()
        for record, one in zip(run.records, right, strict=True):
            record.update_bonus(one)
        if all(right):
            run.say(logits[:, 1], self._drawn(run, logits[:, 1]))
        else:
            self._runner.forget(run.runner)

    def _drawn(self, run: Run, logits: Tensor) -> Tensor:
        """A token of every row [B], after those it said; logits [B, V] stay as they are."""
        keys = self._batch.keys()[:, len(run.tokens)]
        return draw(self._shaped(run.runner, logits), self._batch.draws, keys)

    def _shaped(self, runner: str, logits: Tensor) -> Tensor:
        """What a runner draws from: its logits [B, V], which stay as they are, less what it may not
        say, biased as the rows want it.
        """
        if runner == "base":
            logits = logits.masked_fill(self._banned, -torch.inf)
        elif self._batch.draws.biased is not None:
            logits = logits.clone()
        return self._batch.draws.bias(logits)

    def _record(self, row: SequenceState) -> AcceptanceStats:
        return self._records.setdefault(row, AcceptanceStats())

    def _shared(self, request: Request) -> NgramTable:
        return self._continuations.setdefault(request, NgramTable())

    def _take_up_prompts(self) -> None:
        """Look for continuations in the rows' prompts, a bounded number of tokens a round."""
        left = _TAKEN_UP
        for request in self._batch.requests:
            left -= self._shared(request).take_up(request.aligned_ids, left)
            if left <= 0:
                break

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
