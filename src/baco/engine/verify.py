"""What plain decoding says at drafted positions, and how far the drafts agree with it.

The heart of lossless speculation: whatever was drafted, every position is decided from both halves'
rows by the same router and the same draw as without a draft, and what stands is the longest prefix
on which draft and draw agree, plus the first draw that does not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.routing.signals import Distribution, Signals
from baco.routing.word_boundaries import BoundaryState, mask_logits, resolve_source
from baco.sampling.noise import ROUTER, coin
from baco.sampling.sampler import draw, penalise
from baco.source import MODELS, Source
from baco.text.vocabulary import Vocabulary


@dataclass(slots=True)
class Positions:
    """The positions that one round decides: of every row the next one, and those after its drafts.

    Attributes:
        counts: how many of each row, at least 1; Q is the most of any.
        row, ahead: of each of the N positions, rows in turn, int64 [N]; ``ahead`` counts from the
            row's next token.
        drafted: int64 [B, Q - 1 or more], the drafts; what is beyond a row's own is not read.
    """

    counts: list[int]
    row: Tensor
    ahead: Tensor
    drafted: Tensor

    @classmethod
    def of(cls, counts: list[int], drafted: Tensor) -> "Positions":
        """The positions of rows with that many each."""
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        ahead = [at for count in counts for at in range(count)]
        device = drafted.device
        return cls(counts, tensor_on(device, rows), tensor_on(device, ahead), drafted)

    @property
    def most(self) -> int:
        """Q."""
        return max(self.counts)

    @property
    def even(self) -> bool:
        """Do all rows have as many?"""
        return len(self.row) == len(self.counts) * self.most

    def flat(self, rows: Tensor) -> Tensor:
        """Of rows of logits [B, K, V] after each row's last K tokens, those at the positions."""
        keep = rows.shape[1]
        if self.even and keep == self.most:
            return rows.reshape(-1, rows.shape[-1])
        count = tensor_on(rows.device, self.counts)[self.row]
        return rows[self.row, keep - count + self.ahead]

    def table(self, column: Tensor) -> Tensor:
        """Values of positions [N, ...] as [B, Q, ...], zeros where a row has no such position."""
        if self.even:
            return column.reshape(len(self.counts), self.most, *column.shape[1:])
        made = column.new_zeros(len(self.counts), self.most, *column.shape[1:])
        made[self.row, self.ahead] = column
        return made

    def previous(self, last: Tensor) -> Tensor:
        """The token before each position, where ``last`` [B] is each answer's last: int64 [N]."""
        before = torch.cat((last[:, None], self.drafted[:, : self.most - 1]), dim=1)
        return before[self.row, self.ahead]


@dataclass
class VerifyBatch:
    """The rows as they stand and the positions to decide; what several steps ask is made once.

    Attributes:
        batch: the rows.
        positions: their next positions and drafts.
        drafts: how many drafted tokens of each row have a position that decides them.
        read: the halves whose rows of logits were read; another's are stood in for by these.
    """

    batch: Batch
    positions: Positions
    drafts: list[int]
    read: list[Source] = field(default_factory=list)

    def damaged(self, whose: int) -> list[Source]:
        """The halves that were read and that `VerifyResult.damaged` names by a number."""
        return [half for at, half in enumerate(MODELS) if whose >> at & 1 and half in self.read]

    @cached_property
    def keys(self) -> Tensor:
        """The positions' noise keys, int64 [N, 2]."""
        keys, positions = self.batch.keys(), self.positions
        if positions.even:
            return keys[:, : positions.most].flatten(0, 1)
        return keys[positions.row, positions.ahead]

    @cached_property
    def previous(self) -> Tensor:
        """The token before each position, int64 [N]."""
        return self.positions.previous(self.batch.previous())

    @cached_property
    def active(self) -> Tensor:
        """Who spoke last in each row, bool [B]."""
        return self.batch.active()


@dataclass(slots=True)
class VerifyResult:
    """What a round says, as tables [B, Q]; of each row only the first ``committed`` entries count.

    Attributes:
        token, source: what plain decoding draws there; True for the base.
        logprob: of the token under its source, raw, in nats.
        damaged: whose row of logits holds NaN, +inf or nothing but -inf: 1 the base's, 2 the
            aligned model's, 3 both; else 0. int64.
        stands: how many tokens of each row are final, int64 [B], at least 1.
        agreed: how many of them were drafted so, int64 [B].
        signals: what the routers saw there, for who wants to know more.
        standing: the positions as the router saw them, [N].
        spoke: who had said the token before each, bool [N].
    """

    token: Tensor
    source: Tensor
    logprob: Tensor
    damaged: Tensor
    committed: Tensor
    accepted: Tensor
    signals: Signals
    boundary_state: BoundaryState
    previous_source: Tensor


@dataclass(slots=True)
class Choice:
    """What is drawn from at N positions, and whose tokens they will be.

    Attributes:
        logits: float [N, V], -inf where a token may not be said; to be written on.
        source: bool [N], True for the base.
        standing: the positions as the router saw them, [N].
        spoke: who had said the token before each, bool [N].
    """

    logits: Tensor
    source: Tensor
    boundary_state: BoundaryState
    previous_source: Tensor


# What of a decision differs between BACo and other ways to decode with both halves' rows.
Choose = Callable[["Verifier", VerifyBatch, Signals], Choice]


def route(law: "Verifier", verify_batch: VerifyBatch, signals: Signals) -> Choice:
    """BACo: every word from the half that its row's router names."""
    return by_standing(law, verify_batch, signals, law.stand(verify_batch, signals))


def by_standing(
    law: "Verifier", verify_batch: VerifyBatch, signals: Signals, boundary_state: BoundaryState
) -> Choice:
    """Every word from the half that is named where it begins."""
    previous_source, source, masked = resolve_sources(
        verify_batch.positions, boundary_state, verify_batch.active
    )
    logits = mask_logits(signals, source, masked, law.banned)
    return Choice(logits, source, boundary_state, previous_source)


@dataclass(frozen=True, slots=True)
class Verifier:
    """What every decision stands on, on the device where tokens are drawn.

    Attributes:
        vocabulary: word starts, word ends, roles.
        banned: tokens the base may never say, bool [V].
        choose: what a token is drawn from, and whose it is.
    """

    vocabulary: Vocabulary
    banned: Tensor
    choose: Choose = route

    def look(
        self, verify_batch: VerifyBatch, distributions: Mapping[Source, Distribution]
    ) -> Signals:
        """What the routers read at the positions."""
        base, aligned = (distributions[model] for model in MODELS)
        return Signals(base, aligned, self.vocabulary, partial(_toss, verify_batch))

    def stand(
        self, verify_batch: VerifyBatch, signals: Signals, *, ask: bool = True
    ) -> BoundaryState:
        """The positions as the routers see them; without ``ask``, all but what they say."""
        batch = verify_batch.batch
        rule = batch.rule[verify_batch.positions.row] if len(batch.rules) > 1 else None
        return BoundaryState.of(signals, verify_batch.previous, batch.rules, rule, route=ask)

    def verify(self, verify_batch: VerifyBatch, signals: Signals) -> VerifyResult:
        """Decide every position of a round; ``signals`` are both halves' rows there."""
        batch, positions = verify_batch.batch, verify_batch.positions
        choice = self.choose(self, verify_batch, signals)
        logits, source = choice.logits, choice.source
        table = batch.draws if positions.even and positions.most == 1 else None
        table = table or batch.draws.rows(positions.row)
        if table.any_penalty:
            between = self._between(positions)
            logits = penalise(logits, *batch.token_counts(positions.row, source, between), table)
        token = draw(table.bias(logits), table, verify_batch.keys)
        said = positions.table(token)
        accepted = _agreed(said, positions.drafted, verify_batch.drafts)
        most = tensor_on(accepted.device, positions.counts)
        return VerifyResult(
            said,
            positions.table(source),
            positions.table(_logprob(signals, source, token)),
            positions.table(_damaged(signals)),
            torch.minimum(accepted + 1, most),
            accepted,
            signals,
            choice.boundary_state,
            choice.previous_source,
        )

    def _between(self, positions: Positions) -> Tensor:
        """The drafts before each position, int64 [N, Q - 1]; V where there is none."""
        width = positions.most - 1
        before = torch.arange(width, device=positions.row.device) < positions.ahead[:, None]
        drafted = positions.drafted[:, :width][positions.row]
        return drafted.where(before, self.vocabulary.size)


def _toss(verify_batch: VerifyBatch) -> Tensor:
    return coin(verify_batch.keys, ROUTER)


def _logprob(signals: Signals, source: Tensor, token: Tensor) -> Tensor:
    """Of tokens [N] under their sources, raw, in nats."""
    base, aligned = (signals.of(model).logprob(token) for model in MODELS)
    return torch.where(source, base, aligned)


def _damaged(signals: Signals) -> Tensor:
    """See :class:`VerifyResult`: int64 [N]. log Σ exp of such a row is not finite."""
    base, aligned = (~signals.of(model).log_partition.isfinite() for model in MODELS)
    return base.long() + 2 * aligned


def resolve_sources(
    positions: Positions, boundary_state: BoundaryState, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Who spoke before each position, its source and its mask [N], following one from another."""
    if positions.most == 1:
        return active, *resolve_source(boundary_state, active)
    columns = boundary_state.map(positions.table)
    found = []
    for index in range(positions.most):
        source, masked = resolve_source(columns.map(partial(_column, index)), active)
        found.append((active, source, masked))
        active = source
    at = (positions.row, positions.ahead)
    previous_source, source, masked = (
        torch.stack(column, dim=1)[at] for column in zip(*found, strict=True)
    )
    return previous_source, source, masked


def _column(index: int, table: Tensor) -> Tensor:
    return table[:, index]


def _agreed(said: Tensor, drafted: Tensor, drafts: list[int]) -> Tensor:
    """How many drafts of each row are what was said, up to the first that is not: int64 [B]."""
    most = max(drafts)
    if most == 0:
        return torch.zeros(len(drafts), dtype=torch.int64, device=said.device)
    own = torch.arange(most, device=said.device) < tensor_on(said.device, drafts)[:, None]
    same = (said[:, :most] == drafted[:, :most]) & own
    return same.long().cumprod(dim=1).sum(dim=1)


def settled(
    boundary_state: BoundaryState, verify_batch: VerifyBatch, half: Source, alone: Tensor
) -> bool:
    """Do one half's rows decide every position, so that the other half need not be read?

    Args:
        standing: as seen with that half's rows in the place of both.
        round_: the positions.
        half: whose rows they are.
        alone: the row's router looks at no other half's rows, bool [B].
    """
    row, first = verify_batch.positions.row, verify_batch.positions.ahead == 0
    mine = half == "base"
    own = boundary_state.base_starts_word if mine else boundary_state.aligned_starts_word
    # Beyond a row's first position the half itself spoke last, or it had not been settled.
    previous_source = (verify_batch.active[row] == mine) | ~first
    asked = boundary_state.free | (own & previous_source)
    decided = torch.where(
        asked, alone[row] & (boundary_state.router_choice == mine), previous_source
    )
    return bool(decided.all())
