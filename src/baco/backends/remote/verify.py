"""Verifies a drafted span by the rules that every backend shares.

At every position: the source, and whether plain decoding could have drawn the draft token there. At
temperature 0 the source's own most likely token is accepted, whichever model drafted it. Above, a
token that was drawn from the right row is accepted where its model is the source; at the first
position routed to the other model, verification stops and that model drafts next.
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
    """The accepted tokens of a span, and how decoding continues.

    Attributes:
        tokens, sources, rows: of the accepted tokens; each row is that of the source.
        whys: what the router saw at each, if the request asks for it.
        num_accepted: how many of them were draft tokens.
        next_source: the source of the next token, where it is known.
        redraw: the source drafted a token there that it may not write.
        explain: what the router saw at the position to be redrawn, for the token drawn there.
        needs_other: the other model's rows are needed to continue.
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    whys: list[Why] = field(default_factory=list)
    num_accepted: int = 0
    next_source: NextSource | None = None
    redraw: bool = False
    explain: Callable[[int], Why] | None = None
    needs_other: bool = False

    def append(
        self, token: int, source: Source, row: Row, explain: Callable[[int], Why] | None
    ) -> None:
        """Add a token."""
        self.tokens.append(token)
        self.sources.append(source)
        self.rows.append(row)
        if explain is not None:
            self.whys.append(explain(token))


def verify_span(rules: AnswerRules, span: DraftSpan) -> SpanResult:
    """Accept the tokens of a span up to the first that plain decoding would not have drawn.

    Raises:
        UndecidedError: the router depends on probabilities that the servers did not return.
        BacoError: the servers do not return what the router needs to know.
    """
    view = RoutingView(rules, span)
    result, active = SpanResult(), span.active
    for at, token in enumerate(span.tokens):
        first = span.next_source if at == 0 else None
        routed = view.source(at, active) if first is None else first
        if routed is None:
            result.needs_other = True
            return result
        source = routed.source
        row = span.rows(source)[at]
        why = partial(view.why, at, active) if rules.request.explain else None
        if source == span.drafter:
            if not view.is_allowed(at, routed):
                # At temperature 0 the token that it would write instead is mostly known.
                best = view.best(at, routed) if rules.greedy else None
                if best is None:
                    result.next_source, result.redraw, result.explain = routed, True, why
                else:
                    result.append(best, source, row, why)
                return result
            result.num_accepted += 1
            result.append(token, source, row, why)
        else:
            if rules.greedy and span.scored is None:
                result.needs_other = True
                return result
            best = view.best(at, routed) if rules.greedy else None
            if best is None:
                result.next_source = routed
                return result
            result.append(best, source, row, why)
            if best != token:
                return result
            result.num_accepted += 1
        if token in rules.pair.end_ids:
            return result
        active = source
    return result
