"""One answer while two servers write it: one drafts a span, the other scores it, what stands stays.

Who drafts, and how far, follows from what stood before. It knows token ids, and nothing of text.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baco.backends.remote.half import FEW, FEWER, Draws, RemoteModel
from baco.backends.remote.verify import SpanResult, judge
from baco.backends.remote.view import OTHER, AnswerRules, DraftSpan, NextSource, figure
from baco.backends.remote.wire import Row, ServerTokens
from baco.engine.sequence import FinishReason, SequenceState, Why
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.errors import BacoError, UpstreamError
from baco.models.pair import Pair
from baco.routing.word_boundaries import NO_TOKEN
from baco.source import MODELS, Source

# A span's two calls cost about as much as so many tokens that a server decodes one by one.
_CALLS = 4
_LONGEST = 32
# Where one half says everything, a call ends only so that there is something to show.
_ALONE = 16
# Routers of these figures need all that servers tell.
_MUCH = ("entropy", "all")


@dataclass(slots=True)
class Totals:
    """Running totals of one engine.

    Attributes:
        rounds: spans that were decided.
        tokens: said, by source.
        drafted, accepted: tokens that were drafted, and how many of them stood.
    """

    rounds: int = 0
    tokens: dict[Source, int] = field(default_factory=lambda: {"base": 0, "aligned": 0})
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class News:
    """What came to an answer.

    Attributes:
        sequence: the answer.
        tokens, sources, logprobs, tops, whys: new ones.
        finish: how it ended, if it did,
        error: and what was wrong.
    """

    sequence: SequenceState
    tokens: list[int]
    sources: list[Source]
    logprobs: list[float]
    tops: list[dict[int, float]]
    whys: list[Why]
    finish: FinishReason | None = None
    error: str | None = None


class Answer:
    """Writes one sequence.

    Args:
        sequence: what is asked; nothing is appended to it here.
        halves: both servers.
        pair: the rules' vocabulary.
        totals: to be counted in.
        tell: takes news.
    """

    def __init__(
        self,
        sequence: SequenceState,
        halves: Mapping[Source, RemoteModel],
        pair: Pair,
        totals: Totals,
        tell: Callable[[News], None],
    ) -> None:
        self._sequence, self._halves, self._pair = sequence, halves, pair
        self._totals, self._tell = totals, tell
        request = sequence.request
        self._law = AnswerRules(pair, request, sequence.sample)
        self._draws = Draws(request.params, sequence.sample, request.noise_seed)
        self._record = AcceptanceStats()
        self._tokens: list[int] = []
        self._sources: list[Source] = []
        self._pen: NextSource | None = None
        self._drafter: Source = request.router.only or "aligned"
        self._done = False
        much, wanted = figure(request.router) in _MUCH, request.params.logprobs or 0
        self._top, self._top_scored = (
            {
                name: half.ability.top if much and name in request.router.reads else few
                for name, half in halves.items()
            }
            for few in (max(FEW, wanted), max(FEWER, wanted))
        )

    async def write(self) -> None:
        """Write it to its end, and tell of every span."""
        try:
            while not self._done:
                self._tell(await self._round())
        except (UpstreamError, BacoError) as error:
            self._tell(News(self._sequence, [], [], [], [], [], "error", str(error)))

    async def _round(self) -> News:
        drafter, length = self._plan()
        half, text = self._halves[drafter], self._text(drafter)
        told = await half.draft(text, length, self._draws, len(self._tokens), self._top[drafter])
        result = await self._judged(drafter, told)
        if result.redraw and result.pen is not None:
            await self._redraw(result, told)
        if self._alone is None:
            self._record.update_self_draft(drafter, result.agreed, len(told.tokens), ())
        self._totals.drafted += len(told.tokens)
        self._totals.accepted += result.agreed
        self._totals.rounds += 1
        self._pen = result.pen
        return self._take(result)

    @property
    def _alone(self) -> Source | None:
        return self._sequence.request.router.only

    def _plan(self) -> tuple[Source, int]:
        """Who drafts, and how far: what promises the most tokens for what it costs."""
        room = self._sequence.limit - len(self._tokens)
        if self._alone is not None:
            return self._alone, min(_ALONE, room)
        if self._pen is not None:
            drafters: tuple[Source, ...] = (self._pen.half,)
        elif self._sequence.request.params.temperature > 0 and self._sources:
            drafters = (self._sources[-1],)  # what another says could only be thrown away
        else:
            drafters = MODELS
        plans = [
            (_rate(self._record.by_drafter[half], length), half, length)
            for half in drafters
            for length in range(1, min(_LONGEST, room) + 1)
        ]
        _, half, length = max(plans, key=lambda plan: plan[0])
        return half, length

    async def _judged(self, drafter: Source, told: ServerTokens) -> SpanResult:
        """What stands; the other half is asked only where it may have a say."""
        tokens = [token for token in told.tokens if token is not None]
        span = DraftSpan(
            drafter=drafter,
            tokens=tokens,
            drafted=[row for row in told.rows if row is not None],
            scored=None,
            previous=self._tokens[-1] if self._tokens else NO_TOKEN,
            active=self._sources[-1] if self._sources else "aligned",
            pen=self._pen,
            position=len(self._tokens),
        )
        request = self._sequence.request
        alone = self._alone is not None or request.router.reads <= {drafter}
        if alone and not request.explain:
            result = judge(self._law, span)
            if not result.open:
                return result
        other = self._halves[OTHER[drafter]]
        span.scored = await other.rows(self._text(other.name), tokens, self._top_scored[other.name])
        return judge(self._law, span)

    async def _redraw(self, result: SpanResult, told: ServerTokens) -> None:
        """Have the pen's half say something that may stand, in place of what it said."""
        pen, at = result.pen, len(result.tokens)
        assert pen is not None
        row = told.rows[at]
        assert row is not None
        token, row = await self._halves[pen.half].draw(
            [*self._text(pen.half), *result.tokens],
            row,
            lambda token: self._law.may_say(token, pen),
            self._draws,
            len(self._tokens) + at,
            self._top[pen.half],
        )
        result.say(token, pen.half, row, result.explain)
        result.pen = None

    def _text(self, half: Source) -> list[int]:
        return [*self._sequence.request.ids(half), *self._tokens]

    def _take(self, result: SpanResult) -> News:
        """Take up what stands, as far as the answer goes."""
        tokens, sources, finish = list[int](), list[Source](), None
        for token, source in zip(result.tokens, result.sources, strict=True):
            tokens.append(token)
            sources.append(source)
            self._totals.tokens[source] += 1
            if token in self._pair.end_ids:
                finish = "stop"
                break
            if len(self._tokens) + len(tokens) >= self._sequence.limit:
                finish = "length"
                break
        self._tokens += tokens
        self._sources += sources
        self._done = finish is not None
        wanted = self._sequence.request.params.logprobs
        kept = result.rows[: len(tokens)]
        return News(
            self._sequence,
            tokens,
            sources,
            [_logprob(row, token) for row, token in zip(kept, tokens, strict=True)],
            [row.best(wanted) for row in kept] if wanted else [],
            result.whys[: len(tokens)],
            finish,  # type: ignore[arg-type]
        )


def _logprob(row: Row, token: int) -> float:
    """Of a token under its row, in nats; NaN where the server tells none."""
    return row.known.get(token, math.nan) if row.measured else math.nan


def _rate(chance: float, length: int) -> float:
    """Tokens for what they cost, where each of ``length`` drafts stands with ``chance``."""
    return (1 - chance**length) / (1 - chance) / (_CALLS + length)
