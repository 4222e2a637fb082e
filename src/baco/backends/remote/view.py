"""A drafted span as the shared rules see it: what servers told, the router, who may speak."""

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
from baco.routing.signals import Distribution, Signals
from baco.routing.word_boundaries import NO_TOKEN, BoundaryState, mask_logits, resolve_source
from baco.sampling.noise import ROUTER, coin, noise_keys
from baco.source import Source

OTHER: dict[Source, Source] = {"base": "aligned", "aligned": "base"}


def figure(router: Router) -> str:
    """What a router has to know of a row: ``nothing``, the ``top`` token, its probability
    (``max``), the ``entropy``, or ``all`` of it.
    """
    if router.only is not None:
        return "nothing"
    if not isinstance(router, RuleRouter):
        return "all"
    kinds = {name.split("_")[0] for name in router.quantities - {"coin"}}
    if not kinds <= {"entropy", "max", "top"}:
        return "all"
    if "entropy" in kinds:
        return "entropy" if router.logit is not None and router.logit.monotone else "all"
    return "max" if "max" in kinds else "top"


@dataclass(frozen=True, slots=True)
class NextSource:
    """Who says the next token.

    Attributes:
        half: the source.
        masked: it may say only word starts.
    """

    half: Source
    masked: bool


@dataclass(slots=True)
class DraftSpan:
    """A drafted span and what both halves say along it.

    Attributes:
        drafter: who drafted.
        tokens: k ids.
        drafted: the drafter's row at each.
        scored: the other half's rows, or None where it was not asked.
        previous: the token before; NOTHING before the first.
        active: who spoke last.
        pen: the first position's source, where it is known from an earlier span.
        position: of the first token in the answer.
    """

    drafter: Source
    tokens: Sequence[int]
    drafted: Sequence[Row]
    scored: Sequence[Row] | None
    previous: int
    active: Source
    pen: NextSource | None
    position: int

    def rows(self, half: Source) -> Sequence[Row]:
        """A half's rows; where they are not known, the other's stand in for them."""
        return self.drafted if half == self.drafter or self.scored is None else self.scored


@dataclass(frozen=True)
class AnswerRules:
    """The rules of one answer.

    Attributes:
        pair: its vocabulary, and what the base may never say.
        request: the router, where it may switch, sampling parameters.
        sample: which sample, for routers that toss a coin.
    """

    pair: Pair
    request: Request
    sample: int

    @cached_property
    def bias(self) -> Mapping[int, float]:
        """What is added to logits: token id → number."""
        return dict(self.request.params.logit_bias)

    def may_say(self, token: int, pen: NextSource) -> bool:
        """May a half say a token there?"""
        words = self.pair.vocabulary
        if pen.half == "base" and bool(self.pair.banned[token]):
            return False
        return not pen.masked or bool(words.word_start[token])

    @property
    def cold(self) -> bool:
        """Is the most likely token taken?"""
        return self.request.params.temperature == 0


class RoutingView:
    """A span's rows as tensors, and what the shared rules say of them."""

    def __init__(self, law: AnswerRules, span: DraftSpan) -> None:
        self._law, self._span = law, span
        self._router, pair = law.request.router, law.pair
        needs = figure(self._router)
        others = {*span.tokens, *law.bias, max(span.previous, 0)}
        rows = span.rows("base"), span.rows("aligned")
        whole = needs in ("entropy", "all")
        self._table = Table(pair.vocabulary, pair.banned, *rows, others, whole)
        self._rows = self._table.filled(wide=False)
        self._signals = self._looked_at(needs == "entropy")
        rules = [(self._router, law.request.switch)]
        self._standing = [BoundaryState.of(one, self._previous, rules) for one in self._signals]

    def _looked_at(self, entropies: bool) -> list[Signals]:
        """The rows as the router sees them; with an entropy in question, at both its bounds."""
        words, (base, aligned) = self._table.words, self._rows
        if entropies:
            wide = self._table.filled(wide=True)
            # The least of one half goes with the most of the other: it bounds a difference too.
            return [
                Signals(base, wide[1], words, self._coins),
                Signals(wide[0], aligned, words, self._coins),
            ]
        # Rows are log-probabilities, though one column stands for many tokens.
        logprobs = Distribution(base, log_partition=torch.zeros(len(base)))
        return [Signals(logprobs, aligned, words, self._coins)]

    @cached_property
    def _previous(self) -> Tensor:
        before = [self._span.previous, *self._span.tokens[:-1]]
        column = self._table.column
        return torch.tensor([NO_TOKEN if one == NO_TOKEN else column[one] for one in before])

    def _coins(self) -> Tensor:
        count, seed = len(self._span.tokens), self._law.request.noise_seed
        at = torch.arange(count) + self._span.position
        keys = noise_keys(torch.full((count,), seed), torch.full((count,), self._law.sample), at)
        return coin(keys, ROUTER)

    def source(self, at: int, active: Source) -> NextSource | None:
        """Whose a position is; None where the half that was not asked may have a say in it.

        Raises:
            BacoError: the threshold lies between the bounds of what is known, or a server did not
                tell which token is the likeliest.
        """
        if not all(self._span.rows(half)[at].clear for half in OTHER):
            raise BacoError(
                "a server names its likeliest token by a text that no single token has: it has to "
                "tell token ids"
            )
        found = [
            boundary_state.map(lambda column: column[at : at + 1])
            for boundary_state in self._standing
        ]
        first, mine = found[0], self._span.drafter
        spoke = torch.tensor([active == "base"])
        asked = bool(first.is_boundary(spoke))
        if self._span.scored is None and self._router.only is None:
            if active != mine and not bool(first.free):
                return None  # the one who spoke may be about to begin a word
            if asked and not self._router.reads <= {mine}:
                return None
        if asked and len({bool(one.router_choice) for one in found}) > 1:
            raise self._undecided(at)
        source, masked = resolve_source(first, spoke)
        return NextSource("base" if bool(source) else "aligned", bool(masked))

    def why(self, at: int, active: Source, token: int) -> Why:
        """What the router saw where a token stands. An entropy is the middle of its bounds where
        the router goes by one, else NaN; so is a log-probability that no server told.
        """
        signals, boundary_state = self._signals[0], self._standing[0]
        here = boundary_state.map(lambda column: column[at : at + 1])
        rows = {half: self._span.rows(half)[at] for half in OTHER}
        bounds = [float(one.entropy_base[at]) for one in self._signals]
        base = rows["base"]
        return Why(
            base_logprob=base.known.get(token, math.nan) if base.measured else math.nan,
            aligned_logprob=(
                rows["aligned"].known.get(token, math.nan) if rows["aligned"].measured else math.nan
            ),
            max_base=float(signals.max_base[at]) if base.measured else math.nan,
            entropy_base=sum(bounds) / 2 if len(bounds) == 2 else math.nan,
            predicted=max(base.known, key=lambda one: (base.known[one], -one)),
            asked=bool(here.is_boundary(torch.tensor([active == "base"]))),
            wanted="base" if bool(here.router_choice) else "aligned",
        )

    def _undecided(self, at: int) -> BacoError:
        low, high = (float(signals.entropy_base[at]) for signals in self._signals)
        known = len(self._span.rows("base")[at].known)
        return BacoError(
            f"{self._router.spelling} cannot be decided: the {known} most likely tokens that the "
            f"server tells leave the base's entropy anywhere from {low:.2f} to {high:.2f} nats; "
            "let it tell more (vLLM and baco serve: --max-logprobs), or use a P router"
        )

    def stands(self, at: int, pen: NextSource) -> bool:
        """May what the drafting half said stand where it is the source?"""
        if not self._law.may_say(self._span.tokens[at], pen):
            return False
        params = self._law.request.params
        free = pen.half == "aligned" and not pen.masked
        if params.temperature == 0 or params.min_p == 0 or free:
            return True
        # min_p is a share of the likeliest token: that one must be among those that may be said.
        top = self._argmax(self._biased(at, pen), at, pen)
        return top is not None and self._law.may_say(top, pen)

    def best(self, at: int, pen: NextSource) -> int | None:
        """The source's most likely token of those it may say; None where it cannot be known."""
        logits = self._biased(at, pen)
        source, masked = torch.tensor([pen.half == "base"]), torch.tensor([pen.masked])
        table = self._table
        signals = Signals(logits, logits, table.words)
        left = mask_logits(signals, source, masked, table.forbidden)
        return self._argmax(left, at, pen)

    def _biased(self, at: int, pen: NextSource) -> Tensor:
        """The source's row with the bias; tokens that are not known as likely as may be: [1, W]."""
        rows, row = self._rows[pen.half == "aligned"], self._span.rows(pen.half)[at]
        logits = rows[at : at + 1].clone()
        for token, value in self._law.bias.items():
            column = self._table.column[token]
            known = token in row.known
            logits[0, column] = value + (float(logits[0, column]) if known else row.cap)
        return logits

    def _argmax(self, logits: Tensor, at: int, pen: NextSource) -> int | None:
        """The token of a row [1, W]; None where one that is not known may be it."""
        row, found = self._span.rows(pen.half)[at], int(logits[0].argmax())
        if logits[0, found] == -math.inf or found >= len(self._table.ids):
            return None
        if self._law.bias and not row.measured:
            return None
        token = self._table.ids[found]
        return token if token in row.known else None
