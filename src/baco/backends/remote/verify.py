"""What stands of a drafted span, by the rules that every backend shares.

Of every position: the source, and whether the token that the drafting half said is what plain
decoding could have said there. At temperature 0 the source's own most likely token stands, whoever
drafted it. Above, a token that was drawn from the right row stands where its row's half is the
source; the first position of the other half hands that half the pen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from baco.backends.remote.view import AnswerRules, DraftSpan, NextSource, RoutingView
from baco.backends.remote.wire import Row
from baco.engine.sequence import Why
from baco.source import Source


@dataclass(slots=True)
class SpanResult:
    """What stands, in order, and how it goes on.

    Attributes:
        tokens, sources, rows: of what stands; each row is its source's.
        whys: what the router saw at each, if asked.
        agreed: how many of them were drafted.
        pen: who has to say the next token, where that is known.
        redraw: the pen's half has said something there that may not stand.
        explain: what the router saw where it is to be drawn again, of the token that will stand.
        open: the other half's rows have to be known to go on.
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    whys: list[Why] = field(default_factory=list)
    agreed: int = 0
    pen: NextSource | None = None
    redraw: bool = False
    explain: Callable[[int], Why] | None = None
    open: bool = False

    def say(
        self, token: int, source: Source, row: Row, explain: Callable[[int], Why] | None
    ) -> None:
        """One more stands."""
        self.tokens.append(token)
        self.sources.append(source)
        self.rows.append(row)
        if explain is not None:
            self.whys.append(explain(token))


def judge(law: AnswerRules, span: DraftSpan) -> SpanResult:
    """Go along a span as far as it stands.

    Raises:
        BacoError: the router cannot be told what it has to know.
    """
    view = RoutingView(law, span)
    result, active = SpanResult(), span.active
    for at, token in enumerate(span.tokens):
        pen = span.pen if at == 0 and span.pen is not None else view.source(at, active)
        if pen is None:
            result.open = True
            return result
        row = span.rows(pen.half)[at]
        why = partial(view.why, at, active) if law.request.explain else None
        if pen.half == span.drafter:
            if not view.stands(at, pen):
                # At temperature 0 what it would say instead is mostly known.
                said = view.best(at, pen) if law.cold else None
                if said is None:
                    result.pen, result.redraw, result.explain = pen, True, why
                else:
                    result.say(said, pen.half, row, why)
                return result
            result.agreed += 1
            result.say(token, pen.half, row, why)
        else:
            if law.cold and span.scored is None:
                result.open = True
                return result
            said = view.best(at, pen) if law.cold else None
            if said is None:
                result.pen = pen
                return result
            result.say(said, pen.half, row, why)
            if said != token:
                return result
            result.agreed += 1
        if token in law.pair.end_ids:
            return result
        active = pen.half
    return result
