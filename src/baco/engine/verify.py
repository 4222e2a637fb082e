"""Verification: route, mask and sample every position of a draft, and accept what agrees.

This is why speculative decoding is lossless here. Whatever was drafted, every position is decided
by the same router and the same draw as without a draft. The longest prefix on which draft tokens
and drawn tokens agree is accepted, plus the first drawn token that disagrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.engine.draft import Draft, Logits, Positions
from baco.routing.combiners import BASE, MIXED
from baco.routing.router import RuleRouter, is_stateful
from baco.routing.signals import Signals
from baco.routing.word_boundaries import BoundaryState, mask_logits, resolve_source
from baco.sampling.noise import ROUTER, coin
from baco.sampling.sampler import draw, penalise
from baco.source import MODELS, Source
from baco.text.vocabulary import Vocabulary

# Bits of `VerifyResult.damaged`.
_DAMAGED: dict[Source, int] = {"base": 1, "aligned": 2}
# Takes the place of a router that decides nothing.
_UNDECIDED = RuleRouter(None)


@dataclass(slots=True)
class Choice:
    """What N tokens are drawn from.

    Attributes:
        logits: float [N, V], -inf for tokens that may not be written. Drawing overwrites them.
        source: bool [N], True for the base model.
        boundary_state: of the positions.
        active: the active source at each position, bool [N].
        mixed: where a row comes from both models, bool [N], and the log-probabilities of the rows
            that combiners made, [N, V]; None without combiners.
    """

    logits: Tensor
    source: Tensor
    boundary_state: BoundaryState
    active: Tensor
    mixed: Tensor | None = None
    combined: Tensor | None = None


@dataclass(slots=True)
class VerifyResult:
    """What was drawn, [B, Q]. Only the first ``num_committed`` entries of each row count.

    Attributes:
        token, source: the drawn tokens, and whether the base model is their source.
        logprob: raw log-probability of each token under its source, in nats.
        damaged: the models whose logits hold NaN, +inf or nothing but -inf there, as bits (see
            :func:`damaged_models`); int64.
        num_accepted: draft tokens of each row that are accepted, int64 [B].
        num_committed: tokens of each row that are final, int64 [B], at least 1.
        signals: what the routers read at the positions, [N].
        choice: what the tokens were drawn from; its logits have been overwritten.
    """

    token: Tensor
    source: Tensor
    logprob: Tensor
    damaged: Tensor
    num_accepted: Tensor
    num_committed: Tensor
    signals: Signals
    choice: Choice


# Replaces routing in methods that no router can express, such as mixed logits.
Choose = Callable[["Verifier", Draft, Signals], Choice]


def route(verifier: "Verifier", draft: Draft, signals: Signals) -> Choice:
    """BACo: the routers of the rows pick the source of every word, and combiners mix the models."""
    in_order = draft.batch.stateful and draft.positions.most > 1
    state_of = _state_in_order if in_order else Verifier.boundary_state
    boundary_state = state_of(verifier, draft, signals)
    choice = choose_by(verifier, draft, signals, boundary_state)
    if draft.batch.combinations:
        _combine(verifier, draft, signals, choice)
    return choice


def _combine(verifier: "Verifier", draft: Draft, signals: Signals, choice: Choice) -> None:
    """Put the rows that combiners make into the place of those that were chosen."""
    batch, positions = draft.batch, draft.positions
    index = batch.router_index[positions.row]
    mixed = torch.zeros_like(choice.source)
    combined = torch.zeros_like(choice.logits)
    for number, combination in batch.combinations.items():
        rows = (index == number).nonzero()[:, 0]
        row = combination.next_rows(signals, rows, verifier.banned, verifier.ends)
        choice.logits[rows] = combined[rows] = row.logits
        choice.source[rows] = row.source == BASE
        mixed[rows] = row.source == MIXED
    choice.mixed, choice.combined = mixed, combined


def choose_by(
    verifier: "Verifier", draft: Draft, signals: Signals, boundary_state: BoundaryState
) -> Choice:
    """The sources that follow from the boundaries and the router's choices there."""
    active, source, word_starts_only = resolve_sources(
        draft.positions, boundary_state, draft.active
    )
    logits = mask_logits(signals, source, word_starts_only, verifier.banned)
    return Choice(logits, source, boundary_state, active)


def _state_in_order(verifier: "Verifier", draft: Draft, signals: Signals) -> BoundaryState:
    """The boundaries, for routers that read the sources of the tokens before a position."""
    positions, num_base = draft.positions, signals.past.num_base
    for offset in range(1, positions.most):
        state = verifier.boundary_state(draft, signals)
        _, source, _ = resolve_sources(positions, state, draft.active)
        at = (positions.offset == offset).nonzero()[:, 0]
        num_base[at] = num_base[at - 1] + source[at - 1]
    return verifier.boundary_state(draft, signals)


@dataclass(frozen=True, slots=True)
class Verifier:
    """Decides positions, on the device where tokens are drawn.

    Attributes:
        vocabulary: word starts, word ends, roles.
        banned: tokens that the base model may never write, bool [V].
        choose: what tokens are drawn from, and their sources.
        ends: the end tokens of both models.
    """

    vocabulary: Vocabulary
    banned: Tensor
    choose: Choose = route
    ends: tuple[int, ...] = ()

    def verify(self, draft: Draft, logits: Logits) -> VerifyResult:
        """Draw a token at every position, and accept the draft tokens that agree."""
        batch, positions = draft.batch, draft.positions
        signals = self.signals(draft, logits)
        choice = self.choose(self, draft, signals)
        if self.choose is not route and batch.thinking is not None:
            # The base model has not read these rows.
            thinking = batch.thinking[positions.row]
            choice.source = choice.source & ~thinking
            choice.logits = torch.where(thinking[:, None], signals.aligned, choice.logits)
        if signals.allowed is not None:
            choice.logits = signals.allowed.mask(choice.logits)
        params = batch.sampling if positions.uniform and positions.most == 1 else None
        params = params or batch.sampling.rows(positions.row)
        biased = choice.logits
        if params.any_penalty:
            drafted = self._drafted_before(positions)
            counts = batch.token_counts(positions.row, choice.source, drafted)
            if batch.reads_history:
                before = positions.drafted_before()
                batch.count_in_windows(counts, positions.row, choice.source, before)
            biased = penalise(biased, *counts, params)
        if batch.reads_history:
            batch.run_dry(biased, positions.row, choice.source, positions.drafted_before())
        biased = batch.run_samplers(
            params.bias(biased),
            positions.row,
            draft.noise_keys,
            positions.drafted_before,
            choice.source,
        )
        token = draw(biased, params, draft.noise_keys)
        tokens = positions.pad(token)
        num_accepted = _num_accepted(tokens, positions.draft_tokens, draft.counts)
        most = tensor_on(num_accepted.device, positions.counts)
        base, aligned = (signals.of(model).logprob(token) for model in MODELS)
        logprob = torch.where(choice.source, base, aligned)
        if choice.mixed is not None:
            assert choice.combined is not None
            of_both = choice.combined.gather(1, token[:, None])[:, 0]
            logprob = logprob.where(~choice.mixed, of_both)
        return VerifyResult(
            tokens,
            positions.pad(choice.source),
            positions.pad(logprob),
            positions.pad(_damaged(logits)),
            num_accepted,
            torch.minimum(num_accepted + 1, most),
            signals,
            choice,
        )

    def signals(self, draft: Draft, logits: Logits) -> Signals:
        """What the routers read; a model that did not run is replaced by the other one."""
        base, aligned = logits.of.get("base"), logits.of.get("aligned")
        coins = partial(_coins, draft)
        either = base or aligned
        assert either is not None
        past = draft.past() if draft.batch.stateful else None
        return Signals(
            base or either,
            aligned or either,
            self.vocabulary,
            coins,
            past=past,
            allowed=draft.allowed,
            ran=frozenset(logits.of),
        )

    def boundary_state(
        self, draft: Draft, signals: Signals, *, route: bool = True
    ) -> BoundaryState:
        """The boundaries of the positions, and with ``route`` what the routers pick there.

        Where a model did not run, no router that reads it decides anything: none is run.
        """
        batch, routers = draft.batch, draft.batch.routers
        index = batch.router_index[draft.positions.row] if len(routers) > 1 else None
        if len(signals.ran) < len(MODELS):
            routers = [
                (router if router.reads <= signals.ran else _UNDECIDED, switch)
                for router, switch in routers
            ]
        return BoundaryState.of(signals, draft.previous, routers, index, route=route)

    def wants_both(self, batch: Batch) -> bool:
        """Whether both models' logits are wanted, whatever they are."""
        return (
            self.choose is not route
            or bool(batch.combinations)
            or any(row.request.explain for row in batch.rows)
        )

    def one_suffices(self, draft: Draft, model: Source, logits: Logits) -> bool:
        """Whether one model's logits decide every position, so that the other need not run."""
        batch, positions = draft.batch, draft.positions
        reads_only = [
            router.reads <= {model} and not is_stateful(router) for router, _ in batch.routers
        ]
        routed = tensor_on(self.banned.device, reads_only)[batch.router_index]
        state = self.boundary_state(draft, self.signals(draft, logits), route=any(reads_only))
        is_base = model == "base"
        starts_word = state.base_starts_word if is_base else state.aligned_starts_word
        # After a row's first position the model is active itself, or the first was not decided.
        active = (draft.active[positions.row] == is_base) | (positions.offset > 0)
        boundary = state.free | (starts_word & active)
        picked = routed[positions.row] & (state.router_choice == is_base)
        return bool(torch.where(boundary, picked, active).all())

    def _drafted_before(self, positions: Positions) -> Tensor:
        """The draft tokens before each position, int64 [N, Q - 1]; V in the place of others."""
        width = positions.most - 1
        before = torch.arange(width, device=positions.row.device) < positions.offset[:, None]
        draft_tokens = positions.draft_tokens[:, :width][positions.row]
        return draft_tokens.where(before, self.vocabulary.size)


def resolve_sources(
    positions: Positions, boundary_state: BoundaryState, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Resolve the positions of each row in order: the source of one is active at the next.

    Args:
        boundary_state: of the N positions.
        active: the active source at each row's first position, bool [B].

    Returns:
        The active source, the source, and whether it may write only word starts; all bool [N].
    """
    if positions.most == 1:
        return active, *resolve_source(boundary_state, active)
    table = boundary_state.map(positions.pad)
    columns = []
    for offset in range(positions.most):
        source, word_starts_only = resolve_source(table.map(partial(_column, offset)), active)
        columns.append((active, source, word_starts_only))
        active = source
    at = (positions.row, positions.offset)
    actives, sources, masks = (
        torch.stack(column, dim=1)[at] for column in zip(*columns, strict=True)
    )
    return actives, sources, masks


def damaged_models(bits: int) -> list[Source]:
    """The models named by an entry of `VerifyResult.damaged`."""
    return [model for model in MODELS if bits & _DAMAGED[model]]


def _column(index: int, table: Tensor) -> Tensor:
    return table[:, index]


def _coins(draft: Draft) -> Tensor:
    return coin(draft.noise_keys, ROUTER)


def _damaged(logits: Logits) -> Tensor:
    """See `VerifyResult.damaged`: int64 [N]. log Σ exp of damaged logits is not finite."""
    flags = [
        ~distribution.log_partition.isfinite() * _DAMAGED[model]
        for model, distribution in logits.of.items()
    ]
    return torch.stack(flags).sum(dim=0)


def _num_accepted(tokens: Tensor, draft_tokens: Tensor, counts: list[int]) -> Tensor:
    """How many draft tokens of each row equal the drawn ones, up to the first other: int64 [B]."""
    most = max(counts)
    if most == 0:
        return torch.zeros(len(counts), dtype=torch.int64, device=tokens.device)
    drafted = torch.arange(most, device=tokens.device) < tensor_on(tokens.device, counts)[:, None]
    agrees = (tokens[:, :most] == draft_tokens[:, :most]) & drafted
    return agrees.long().cumprod(dim=1).sum(dim=1)
