"""Proposes draft tokens, where that pays.

They come from n-grams of the prompt and its answers, or from a model that runs ahead: one of the
pair (self-drafting) or a small draft model. Tokens that an answer's structure forces are drafted
too. Answers do not depend on them.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.engine.draft import Draft, Logits, Positions
from baco.engine.runner import ModelRunner
from baco.engine.sequence import MAX_DRAFT_TOKENS, Request, SequenceState
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.engine.speculative.cost_model import NO_DRAFT, DraftPlanner, Plan
from baco.engine.speculative.ngram import NgramTable
from baco.engine.speculative.self_draft import SelfDraft
from baco.errors import BacoError, Failure
from baco.sampling.noise import gumbel_of
from baco.sampling.sampler import draw
from baco.source import Source

K = TypeVar("K")
V = TypeVar("V")

# N-gram drafts end where the probability that all their tokens are accepted falls below this.
_MIN_ACCEPTANCE = 0.1
# When no draft pays, planning pauses for one step per this many rows: its cost grows with the rows.
_ROWS_PER_PAUSED_STEP = 4
# Prompt tokens that are added to n-gram tables in one step.
_PROMPT_TOKENS_PER_STEP = 1024
# Last tokens of every row from which the base share is taken.
_RECENT_TOKENS = 16


class Proposer:
    """Drafts tokens for the rows of a batch.

    Args:
        runner: runs the drafting model.
        batch: the rows.
        banned: tokens that the base model may never write, bool [V].
        planner: picks what pays; None to draft nothing.
    """

    def __init__(
        self, runner: ModelRunner, batch: Batch, banned: Tensor, planner: DraftPlanner | None
    ) -> None:
        self._runner, self._batch, self._banned = runner, batch, banned
        self._planner = planner
        self._stats: defaultdict[SequenceState, AcceptanceStats] = defaultdict(AcceptanceStats)
        self._ngrams: defaultdict[Request, NgramTable] = defaultdict(NgramTable)
        self._ngram_drafts: list[list[int]] = []  # of each row, in this step
        self._paused_steps = 0
        self._drafts_nothing = False  # in the next step
        self._bonus: dict[SequenceState, int] = {}  # predicted tokens, where all rows have one

    def propose(self, max_positions: int = MAX_DRAFT_TOKENS + 1) -> Draft:
        """The draft of one step, with at most ``max_positions`` positions per row."""
        rows = self._batch.rows
        self._ngram_drafts = [[]] * len(rows)
        if self._planner is not None:
            self._add_prompts()
        if self._planner is None or self._drafts_nothing:
            self._drafts_nothing = False
            return self._ngram_draft(self._ngram_drafts)
        forced = self._forced(max_positions - 1) if self._batch.structured else []
        if self._paused_steps and not any(forced):
            self._paused_steps -= 1
            return self._ngram_draft(self._ngram_drafts)
        room = {
            name: min(max_positions - 1, self._runner.draft_room(name))
            for name in self._runner.caches
        }
        most = min(room[model] for model in self._batch.needed)
        self._ngram_drafts = [self._lookup(row, most) for row in rows]
        plan = self._planner.plan(
            [self._stats[row] for row in rows],
            [len(draft) for draft in self._ngram_drafts],
            self._batch.needed,
            self._base_share(),
            room,
            [len(tokens) for tokens in forced],
        )
        if plan.drafter is not None:
            return self._self_draft(plan, min(MAX_DRAFT_TOKENS, most, room[plan.drafter]))
        if plan == NO_DRAFT:
            self._paused_steps = len(rows) // _ROWS_PER_PAUSED_STEP
        drafts = self._ngram_drafts
        if any(forced):
            drafts = [own or draft for own, draft in zip(forced, drafts, strict=True)]
        return self._ngram_draft([draft[: plan.num_tokens] for draft in drafts])

    def pause(self) -> None:
        """Draft nothing in the next step."""
        self._drafts_nothing = True

    def update(
        self, draft: Draft, logits: Logits, lengths: Sequence[int], num_accepted: Sequence[int]
    ) -> None:
        """Update acceptance rates and n-grams after a step.

        Args:
            draft: of the step.
            logits: of the step.
            lengths: tokens that each row had before it.
            num_accepted: draft tokens of each row that were accepted.
        """
        if self._planner is None:
            return
        for at, (row, length) in enumerate(zip(self._batch.rows, lengths, strict=True)):
            new, guess = row.tokens[length:], self._ngram_drafts[at]
            if draft.drafter is not None:
                confidence = draft.confidence[at] if draft.confidence else []
                self._stats[row].update_self_draft(
                    draft.drafter, num_accepted[at], draft.counts[at], confidence
                )
            if guess:
                compared = min(len(guess), len(new))
                right = next((i for i in range(compared) if guess[i] != new[i]), compared)
                self._stats[row].update_ngram(right, compared)
            self._ngrams[row.request].add(row.tokens, len(new))
        self._bonus = self._predict_bonus(draft, logits, num_accepted)
        self._drop_ended_rows()

    # --- forced tokens ----------------------------------------------------------------------------

    def _forced(self, room: int) -> list[list[int]]:
        """The next tokens of each row that its structure forces. They are always accepted, so one
        forward can read them and decide the token behind them.
        """
        room = min([room, *(self._runner.draft_room(model) for model in self._batch.needed)])
        drafts = []
        for row in self._batch.rows:
            most = min(MAX_DRAFT_TOKENS, room, row.limit - len(row.tokens) - 1)
            automaton = row.automaton if most > 0 else None
            try:
                drafts.append([] if automaton is None else automaton.forced(row.answer, most))
            except BacoError as error:
                # The step gives it no token, and ends it.
                row.error = Failure("structure", str(error))
                drafts.append([])
        return drafts

    # --- n-grams ----------------------------------------------------------------------------------

    def _add_prompts(self) -> None:
        """Add the rows' prompts to the n-gram tables, a bounded number of tokens per step."""
        left = _PROMPT_TOKENS_PER_STEP
        for request in self._batch.requests:
            left -= self._ngrams[request].add_prompt(request.aligned_ids, left)
            if left <= 0:
                break

    def _lookup(self, row: SequenceState, room: int) -> list[int]:
        """The n-gram draft of a row: up to ``room`` tokens, while acceptance is likely enough."""
        request, length = row.request, len(row.tokens)
        params, rate, most = request.params, self._stats[row].ngram, 0
        bound = min(MAX_DRAFT_TOKENS, room, row.limit - length - 1)
        while most < bound and rate ** (most + 1) > _MIN_ACCEPTANCE:
            most += 1

        def noise(offset: int, token: int) -> float:
            return gumbel_of(request.noise_seed, row.sample, length + offset, token)

        return self._ngrams[request].draft(row.tokens, most, noise, params.temperature)

    def _ngram_draft(self, drafts: Sequence[Sequence[int]]) -> Draft:
        """A draft of these tokens, of any length per row."""
        counts = [len(draft) for draft in drafts]
        most = max(counts)
        padded = [[*draft, *[0] * (most - len(draft))] for draft in drafts]
        tokens = tensor_on(self._batch.device, padded, torch.int64).view(len(drafts), most)
        return Draft(self._batch, Positions.of([count + 1 for count in counts], tokens), counts)

    # --- a model that runs ahead ------------------------------------------------------------------

    def _self_draft(self, plan: Plan, most: int) -> Draft:
        """Let one model write draft tokens alone, at most ``most``.

        On a CPU it stops as soon as one more token does not pay at its confidence. On other devices
        that would wait for the device at every token, so it writes as many as planned.
        """
        assert plan.drafter is not None
        assert self._planner is not None
        batch, drafter = self._batch, plan.drafter
        sync = batch.device.type == "cpu" and drafter != "draft"
        run = SelfDraft(drafter, [self._stats[row] for row in batch.rows], sync)
        last = torch.empty(len(batch), 0, dtype=torch.int64, device=batch.device)
        if sync and all(row in self._bonus for row in batch.rows):
            self._draft_with_bonus(run)
        while len(run.tokens) < (most if sync else plan.num_tokens):
            if run.tokens:
                if sync and not self._planner.next_token_pays(run, batch.needed):
                    break
                last = run.tokens[-1][:, None]
            counts = [last.shape[1]] * len(batch)
            output = self._runner.read(drafter, last, counts, 1)
            run.append(output, 0, self._draw(run, output.logits[:, 0]))
        tokens = torch.stack(run.tokens, dim=1)
        if drafter == "draft":  # both models verify: one position more than draft tokens
            positions = Positions.of([count + 1 for count in run.counts], tokens)
            return Draft(batch, positions, run.counts, drafter)
        bonus = sync and self._planner.bonus_pays(run, _other(drafter))
        positions = Positions.of(run.counts, tokens)
        return Draft(batch, positions, run.counts, drafter, run.logits, run.confidence, bonus)

    def _draft_with_bonus(self, run: SelfDraft) -> None:
        """Feed the drafter the pending tokens and the predicted bonus tokens in one forward. If it
        draws the predicted token in every row, that forward has drafted two tokens.
        """
        bonus = torch.tensor([[self._bonus[row]] for row in self._batch.rows])
        output = self._runner.read(run.drafter, bonus, [1] * len(bonus), 2)
        token = self._draw(run, output.logits[:, 0])
        run.append(output, 0, token)
        right = (token == bonus[:, 0]).tolist()
        for stats, is_right in zip(run.stats, right, strict=True):
            stats.update_bonus(is_right)
        if all(right):
            run.append(output, 1, self._draw(run, output.logits[:, 1]))
        else:
            self._runner.forget_draft(run.drafter)

    def _predict_bonus(
        self, draft: Draft, logits: Logits, num_accepted: Sequence[int]
    ) -> dict[SequenceState, int]:
        """The bonus token of every row, if all draft tokens of all rows were accepted."""
        if logits.bonus is None or list(num_accepted) != draft.counts:
            return {}
        token = self._draw_after([], _other(draft.drafter), logits.bonus)
        return dict(zip(self._batch.rows, token.tolist(), strict=True))

    def _draw(self, run: SelfDraft, logits: Tensor) -> Tensor:
        """The next draft token of every row, int64 [B], from logits [B, V]."""
        return self._draw_after(run.tokens, run.drafter, logits)

    def _draw_after(self, drafted: Sequence[Tensor], model: str, logits: Tensor) -> Tensor:
        """A token of every row, int64 [B], after draft tokens, each [B], from logits [B, V]."""
        batch, index = self._batch, len(drafted)

        def drafts() -> list[list[int]]:
            return torch.stack((*drafted,), dim=1).tolist() if drafted else [[]] * len(batch)

        keys = batch.noise_keys()[:, index]
        shaped = self._shape(model, logits)
        if batch.structured:
            allowed = batch.allowed(drafts(), last_only=True)
            if allowed is not None:
                shaped = allowed.mask(shaped.clone() if shaped is logits else shaped)
        shaped = batch.run_samplers(shaped, None, keys, drafts, model == "base")
        return draw(shaped, batch.sampling, keys)

    def _shape(self, model: str, logits: Tensor) -> Tensor:
        """A copy of a model's logits [B, V], masked and biased as the rows' tokens are drawn."""
        if model == "base":
            logits = logits.masked_fill(self._banned, -torch.inf)
        elif self._batch.sampling.biased_tokens is not None:
            logits = logits.clone()
        return self._batch.sampling.bias(logits)

    # --- what is remembered of rows ---------------------------------------------------------------

    def _base_share(self) -> float:
        recent = [source for row in self._batch.rows for source in row.sources[-_RECENT_TOKENS:]]
        return recent.count("base") / len(recent) if recent else 0.0

    def _drop_ended_rows(self) -> None:
        running = [row for row in self._batch.rows if row.finish_reason is None]
        if len(self._stats) > len(running):
            self._stats = _only(self._stats, running)
        if len(self._ngrams) > len(self._batch.requests):
            self._ngrams = _only(self._ngrams, {row.request for row in running})


def _only(values: defaultdict[K, V], keys: Iterable[K]) -> defaultdict[K, V]:
    return defaultdict(values.default_factory, {key: values[key] for key in keys})


def _other(model: str | None) -> Source:
    return "base" if model == "aligned" else "aligned"
