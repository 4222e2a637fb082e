"""One answer from two servers: one model drafts a span, the other scores it, both are verified.

Which model drafts, and how many tokens, follows from the acceptance so far. This module knows token
ids. It knows nothing of text.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from baco.backends.remote.model import TOP_DRAFTED, TOP_MORE, TOP_SCORED, Draws, RemoteModel
from baco.backends.remote.verify import SpanResult, verify_span
from baco.backends.remote.view import (
    OTHER,
    AnswerRules,
    DraftSpan,
    NextSource,
    UndecidedError,
    needed_quantity,
)
from baco.backends.remote.wire import Row, ServerTokens
from baco.engine.sequence import FinishReason, SequenceState, Why
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.errors import Failure
from baco.models.pair import Pair
from baco.routing.word_boundaries import NO_TOKEN
from baco.source import MODELS, Source

# The two calls of a span cost about as much as this many tokens that a server decodes.
_CALL_TOKENS = 4
MAX_SPAN = 32
# Where few tokens leave more than this share of the decisions open, more are requested at once: a
# second call costs more than their log-probabilities do.
_MANY_OPEN = 0.2
_MIN_POSITIONS = 8
# With one source, a call ends after this many tokens so that there is something to show.
MAX_SINGLE = 16


@dataclass(slots=True)
class Totals:
    """Running totals of one engine.

    Attributes:
        steps: spans that were verified.
        tokens: of the answers, by source.
        drafted, accepted: draft tokens, and how many of them were accepted.
    """

    steps: int = 0
    tokens: dict[Source, int] = field(default_factory=lambda: {"base": 0, "aligned": 0})
    drafted: int = 0
    accepted: int = 0

    def count_span(self, drafted: int, accepted: int) -> None:
        """Count a span that was verified."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted


@dataclass(slots=True)
class Update:
    """New tokens of an answer.

    Attributes:
        sequence: the answer.
        tokens, sources, logprobs, tops, whys: of the new tokens.
        finish_reason: set if the answer ended.
        error: what ended it.
    """

    sequence: SequenceState
    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[dict[int, float]] = field(default_factory=list)
    whys: list[Why] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Failure | None = None


class Answer:
    """Decodes one sequence.

    Args:
        sequence: the request and sample; this class appends nothing to it.
        models: on both servers.
        pair: the vocabulary of the rules.
        totals: of the engine, to be updated.
    """

    def __init__(
        self,
        sequence: SequenceState,
        models: Mapping[Source, RemoteModel],
        pair: Pair,
        totals: Totals,
    ) -> None:
        self._sequence, self._models, self._pair = sequence, models, pair
        self._totals = totals
        request = sequence.request
        self._rules = AnswerRules(pair, request, sequence.sample)
        self._draws = Draws(request.params, sequence.sample, request.noise_seed)
        self._acceptance = AcceptanceStats()
        self._tokens: list[int] = []
        self._sources: list[Source] = []
        self._next_source: NextSource | None = None
        # Positions of spans, and those where few tokens left the router's decision open.
        self._num_positions = self._num_open = 0
        needs, wanted = needed_quantity(request.router), request.params.logprobs or 0
        # An explanation shows the entropy itself.
        needs_all = needs == "all" or (needs == "entropy" and request.explain)
        least = TOP_DRAFTED if needs == "entropy" else TOP_SCORED
        self._top, self._top_scored = (
            {
                source: model.ability.top
                if needs_all and source in request.router.reads
                else num_top
                for source, model in models.items()
            }
            for num_top in (max(TOP_DRAFTED, wanted), max(least, wanted))
        )

    async def step(self) -> Update:
        """Draft and verify the next span.

        Raises:
            UpstreamError: a server failed.
            BacoError: what the servers return does not suffice.
        """
        drafter, length = self._plan()
        model, text = self._models[drafter], self._text(drafter)
        draft = await model.draft(text, length, self._draws, len(self._tokens), self._top[drafter])
        result = await self._verify(drafter, draft)
        if result.redraw and result.next_source is not None:
            await self._redraw(result, result.next_source, draft)
        if self._only_source is None:
            self._acceptance.update_self_draft(drafter, result.num_accepted, len(draft.tokens), ())
        self._totals.count_span(len(draft.tokens), result.num_accepted)
        self._next_source = result.next_source
        return self._commit(result)

    @property
    def _only_source(self) -> Source | None:
        return self._sequence.request.router.only

    def _plan(self) -> tuple[Source, int]:
        """The drafter and the length of the span with the most expected tokens per cost."""
        room = self._sequence.limit - len(self._tokens)
        if self._only_source is not None:
            return self._only_source, min(MAX_SINGLE, room)
        if self._next_source is not None:
            drafters: tuple[Source, ...] = (self._next_source.source,)
        elif self._sequence.request.params.temperature > 0 and self._sources:
            drafters = (self._sources[-1],)  # draft tokens of the other would be rejected
        else:
            drafters = MODELS
        plans = [
            (tokens_per_cost(self._acceptance.by_drafter[source], length), source, length)
            for source in drafters
            for length in range(1, min(MAX_SPAN, room) + 1)
        ]
        _, source, length = max(plans, key=lambda plan: plan[0])
        return source, length

    async def _verify(self, drafter: Source, draft: ServerTokens) -> SpanResult:
        """Verify a draft; the other model scores it only where that can matter."""
        tokens = [token for token in draft.tokens if token is not None]
        span = DraftSpan(
            drafter=drafter,
            tokens=tokens,
            drafted=[row for row in draft.rows if row is not None],
            scored=None,
            previous=self._tokens[-1] if self._tokens else NO_TOKEN,
            active=self._sources[-1] if self._sources else "aligned",
            next_source=self._next_source,
            position=len(self._tokens),
        )
        request = self._sequence.request
        alone = self._only_source is not None or request.router.reads <= {drafter}
        if alone and not request.explain:
            result = await self._decide(span)
            if not result.needs_other:
                return result
        other = OTHER[drafter]
        text, top = self._text(other), self._top_scored[other]
        span.scored = await self._models[other].rows(text, tokens, top)
        return await self._decide(span)

    async def _decide(self, span: DraftSpan) -> SpanResult:
        """Verify a span; request more tokens of a row where its bounds leave a decision open."""
        other = OTHER[span.drafter]
        requested = {
            span.drafter: self._top[span.drafter],
            other: self._top_scored[other],
        }
        position, tops = -1, requested
        while True:
            try:
                result = verify_span(self._rules, span)
                self._num_positions += len(span.tokens)
                return result
            except UndecidedError as undecided:
                if undecided.position != position:
                    position, tops = undecided.position, dict(requested)
                    self._num_open += 1
                if not await self._extend_rows(span, position, tops):
                    raise
                if self._num_open > _MANY_OPEN * max(self._num_positions, _MIN_POSITIONS):
                    self._request_more()

    def _request_more(self) -> None:
        """Request more tokens at once from now on, of the models whose entropies are read."""
        for source in self._sequence.request.router.reads:
            for tops in (self._top, self._top_scored):
                tops[source] = max(tops[source], TOP_MORE)

    async def _extend_rows(self, span: DraftSpan, at: int, tops: dict[Source, int]) -> bool:
        """Request more tokens of the rows that the router reads at a position.

        Args:
            span: its rows are replaced.
            at: the position.
            tops: number of tokens that were requested of each model there; updated.

        Returns:
            False where no server returns more.
        """

        async def extend(source: Source) -> bool:
            model, rows = self._models[source], span.rows(source)
            top = model.larger_top(tops[source])
            if top is None or rows[at].is_whole:
                return False
            tops[source] = top
            row = await model.row([*self._text(source), *span.tokens[:at]], top)
            if row is None:
                return False
            # The draft token need not be among the most likely ones.
            rows[at] = Row(rows[at].known | row.known, row.cap)
            return True

        reads = self._sequence.request.router.reads
        return any(await asyncio.gather(*map(extend, reads)))

    async def _redraw(
        self, result: SpanResult, next_source: NextSource, draft: ServerTokens
    ) -> None:
        """Draw a token that the source may write, in place of the one that it drafted."""
        at, source = len(result.tokens), next_source.source
        row = draft.rows[at]
        assert row is not None
        token, row = await self._models[source].draw(
            [*self._text(source), *result.tokens],
            row,
            lambda token: self._rules.may_write(token, next_source),
            self._draws,
            len(self._tokens) + at,
            self._top[source],
        )
        result.append(token, source, row, result.explain)
        result.next_source = None

    def _text(self, source: Source) -> list[int]:
        return [*self._sequence.request.ids(source), *self._tokens]

    def _commit(self, result: SpanResult) -> Update:
        """Append the accepted tokens up to the end of the answer."""
        tokens, sources = list[int](), list[Source]()
        finish_reason: FinishReason | None = None
        for token, source in zip(result.tokens, result.sources, strict=True):
            tokens.append(token)
            sources.append(source)
            self._totals.tokens[source] += 1
            if token in self._pair.end_ids:
                finish_reason = "stop"
                break
            if len(self._tokens) + len(tokens) >= self._sequence.limit:
                finish_reason = "length"
                break
        self._tokens += tokens
        self._sources += sources
        wanted = self._sequence.request.params.logprobs
        rows = result.rows[: len(tokens)]
        return Update(
            self._sequence,
            tokens,
            sources,
            [row.logprob(token) for row, token in zip(rows, tokens, strict=True)],
            [row.best(wanted) for row in rows] if wanted else [],
            result.whys[: len(tokens)],
            finish_reason,
        )


def tokens_per_cost(acceptance: float, length: int) -> float:
    """Expected tokens per cost, where each of ``length`` draft tokens is accepted with the
    probability ``acceptance``.
    """
    return (1 - acceptance**length) / (1 - acceptance) / (_CALL_TOKENS + length)
