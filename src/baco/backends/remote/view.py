"""A drafted span as the shared rules see it: the rows that servers returned, and the router."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from baco.backends.remote.table import Table
from baco.backends.remote.wire import Row
from baco.engine.sequence import Request, Why
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.routing.router import Router, RuleRouter
from baco.routing.rules import STRUCTURE
from baco.routing.signals import Distribution, Signals
from baco.routing.word_boundaries import NO_TOKEN, BoundaryState, mask_logits, resolve_source
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.source import MODELS, Source

OTHER: dict[Source, Source] = {"base": "aligned", "aligned": "base"}


def needed_quantity(router: Router) -> str:
    """What a router needs of a row: ``nothing``, the ``top`` token, its probability (``max``), the
    ``entropy``, or ``all`` of it.
    """
    if router.only is not None:
        return "nothing"
    if not isinstance(router, RuleRouter):
        return "all"
    kinds = {name.split("_")[0] for name in router.quantities - STRUCTURE - {"coin"}}
    if not kinds <= {"entropy", "max", "top"}:
        return "all"
    if "entropy" in kinds:
        return "entropy" if router.logit is not None and router.logit.monotone else "all"
    return "max" if "max" in kinds else "top"


class UndecidedError(BacoError):
    """A router's decision depends on probabilities that are not known.

    Args:
        position: in the span.
        message: the bounds of what is known.
    """

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position = position


@dataclass(frozen=True, slots=True)
class NextSource:
    """The source of the next token.

    Attributes:
        source: base or aligned.
        masked: it may write only word starts.
    """

    source: Source
    masked: bool


@dataclass(slots=True)
class DraftSpan:
    """A drafted span and both models' rows along it.

    Attributes:
        drafter: the model that drafted it.
        tokens: k ids.
        drafted: the drafter's row at each.
        scored: the other model's rows; None where it has not scored the span.
        previous: the token before; NO_TOKEN before the first.
        active: the source of the token before.
        next_source: the source of the first position, where an earlier span decided it.
        position: of the first token in the answer.
    """

    drafter: Source
    tokens: Sequence[int]
    drafted: list[Row]
    scored: list[Row] | None
    previous: int
    active: Source
    next_source: NextSource | None
    position: int

    def rows(self, source: Source) -> list[Row]:
        """A model's rows; the drafter's in place of rows that are not known."""
        return self.drafted if source == self.drafter or self.scored is None else self.scored


@dataclass(frozen=True)
class AnswerRules:
    """The rules of one answer.

    Attributes:
        pair: its vocabulary, and the tokens that are never drawn from the base.
        request: the router, where it may switch, sampling parameters.
        sample: the sample's number, for routers that toss a coin.
    """

    pair: Pair
    request: Request
    sample: int

    @cached_property
    def bias(self) -> Mapping[int, float]:
        """Added to logits: token id → number."""
        return dict(self.request.params.logit_bias)

    def may_write(self, token: int, next_source: NextSource) -> bool:
        """May the next source write this token?"""
        if next_source.source == "base" and bool(self.pair.banned[token]):
            return False
        return not next_source.masked or bool(self.pair.vocabulary.word_start[token])

    @property
    def greedy(self) -> bool:
        """Is the temperature 0?"""
        return self.request.params.temperature == 0


class RoutingView:
    """A span's rows as tensors, and the decisions of the shared rules on them."""

    def __init__(self, rules: AnswerRules, span: DraftSpan) -> None:
        self._rules, self._span = rules, span
        self._router, pair = rules.request.router, rules.pair
        needs = needed_quantity(self._router)
        others = {*span.tokens, *rules.bias, max(span.previous, 0)}
        rows = span.rows("base"), span.rows("aligned")
        self._size = pair.vocabulary.size
        self._table = Table(pair.vocabulary, pair.banned, *rows, others, whole=needs == "all")
        self._rows = self._table.filled()
        self._signals = self._bounds(needs == "entropy")
        routers = [(self._router, rules.request.switch)]
        self._boundary_states = [
            BoundaryState.of(signals, self._previous, routers) for signals in self._signals
        ]

    def _bounds(self, entropies: bool) -> list[Signals]:
        """The rows as the router sees them; where it reads an entropy, at both bounds of it."""
        if not entropies:
            return [self._signals_with(None, None)]
        base, aligned = (_entropy_bounds(self._span.rows(source), self._size) for source in MODELS)
        # The least entropy of one model with the greatest of the other, so that differences are
        # bounded too.
        return [self._signals_with(base[0], aligned[1]), self._signals_with(base[1], aligned[0])]

    def _signals_with(self, entropy_base: Tensor | None, entropy_aligned: Tensor | None) -> Signals:
        base, aligned = self._rows
        # Rows are log-probabilities, though one column represents many tokens.
        normalised = torch.zeros(len(base))
        return Signals(
            Distribution(base, normalised, entropy_base),
            Distribution(aligned, normalised, entropy_aligned),
            self._table.words,
            self._coins,
        )

    @cached_property
    def _previous(self) -> Tensor:
        before = [self._span.previous, *self._span.tokens[:-1]]
        column = self._table.column
        return torch.tensor([NO_TOKEN if token == NO_TOKEN else column[token] for token in before])

    def _coins(self) -> Tensor:
        count, seed = len(self._span.tokens), self._rules.request.noise_seed
        at = torch.arange(count) + self._span.position
        keys = noise_keys(torch.full((count,), seed), torch.full((count,), self._rules.sample), at)
        return coin(keys, ROUTER)

    def source(self, at: int, active: Source) -> NextSource | None:
        """The source of a position; None where it may depend on rows that are not known.

        Raises:
            UndecidedError: the threshold is between the bounds of what is known.
            BacoError: a server did not return its most likely token.
        """
        span = self._span
        for model in MODELS:
            span.rows(model)[at].check_top()
        states = [self._state(bound, at) for bound in range(len(self._signals))]
        state, previous_source = states[0], torch.tensor([active == "base"])
        asked = bool(state.is_boundary(previous_source))
        if span.scored is None and self._router.only is None:
            if active != span.drafter and not bool(state.free):
                return None  # the active source may be about to begin a word
            if asked and not self._router.reads <= {span.drafter}:
                return None
        if asked and len({bool(bound.router_choice) for bound in states}) > 1:
            raise self._undecided(at)
        source, masked = resolve_source(state, previous_source)
        return NextSource("base" if bool(source) else "aligned", bool(masked))

    def why(self, at: int, active: Source, token: int) -> Why:
        """What the router saw at an accepted token. An entropy is the middle of its bounds if the
        router reads one, else NaN; so is a log-probability that no server returned.
        """
        signals, state = self._signals[0], self._state(0, at)
        base, aligned = (self._span.rows(source)[at] for source in MODELS)
        bounds = [float(bound.entropy_base[at]) for bound in self._signals]
        return Why(
            base_logprob=base.logprob(token),
            aligned_logprob=aligned.logprob(token),
            max_base=float(signals.max_base[at]) if base.measured else math.nan,
            entropy_base=sum(bounds) / 2 if len(bounds) == 2 else math.nan,
            predicted=base.top,
            asked=bool(state.is_boundary(torch.tensor([active == "base"]))),
            wanted="base" if bool(state.router_choice) else "aligned",
        )

    def _state(self, bound: int, at: int) -> BoundaryState:
        return self._boundary_states[bound].map(lambda column: column[at : at + 1])

    def _undecided(self, at: int) -> UndecidedError:
        low, high = (float(signals.entropy_base[at]) for signals in self._signals)
        known = len(self._span.rows("base")[at].known)
        return UndecidedError(
            at,
            f"{self._router.spelling} cannot be decided: the {known} most likely tokens that the "
            f"server returns leave the base's entropy anywhere from {low:.2f} to {high:.2f} nats; "
            "let it return more (vLLM and baco serve: --max-logprobs), or use a P router",
        )

    def is_allowed(self, at: int, next_source: NextSource) -> bool:
        """May the source write its draft token?"""
        rules = self._rules
        if not rules.may_write(self._span.tokens[at], next_source):
            return False
        params = rules.request.params
        unrestricted = next_source.source == "aligned" and not next_source.masked
        if params.temperature == 0 or params.min_p == 0 or unrestricted:
            return True
        # min_p is a share of the most likely token's probability: that token must be allowed too.
        top = self._argmax(self._biased(at, next_source), at, next_source)
        return top is not None and rules.may_write(top, next_source)

    def best(self, at: int, next_source: NextSource) -> int | None:
        """The source's most likely token of those it may write; None where it is not known."""
        logits, table = self._biased(at, next_source), self._table
        source = torch.tensor([next_source.source == "base"])
        masked = torch.tensor([next_source.masked])
        signals = Signals(logits, logits, table.words)
        allowed = mask_logits(signals, source, masked, table.forbidden)
        return self._argmax(allowed, at, next_source)

    def _biased(self, at: int, next_source: NextSource) -> Tensor:
        """The source's row with the bias; unknown tokens as likely as they can be: [1, W]."""
        source = next_source.source
        rows, row = self._rows[source == "aligned"], self._span.rows(source)[at]
        logits = rows[at : at + 1].clone()
        for token, value in self._rules.bias.items():
            column = self._table.column[token]
            known = token in row.known
            logits[0, column] = value + (float(logits[0, column]) if known else row.cap)
        return logits

    def _argmax(self, logits: Tensor, at: int, next_source: NextSource) -> int | None:
        """The most likely token of a row [1, W]; None where it may be an unknown one."""
        row, column = self._span.rows(next_source.source)[at], int(logits[0].argmax())
        if logits[0, column] == -math.inf or column >= len(self._table.ids):
            return None
        if self._rules.bias and not row.measured:
            return None
        token = self._table.ids[column]
        return token if token in row.known else None


def _entropy_bounds(rows: Sequence[Row], size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest entropy of each row: float32 [P] each."""
    low, high = zip(*(row.entropy_bounds(size) for row in rows), strict=True)
    return torch.tensor(low), torch.tensor(high)
