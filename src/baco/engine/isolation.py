"""Keeps a request that breaks a step from taking others with it.

A step that raises leaves the batch in an unknown state. So the engine is thrown away, and the
requests that were in it are halved; each half is decoded again on an engine of its own, down to a
request that raises alone. The answers to that one end in an error. The others come to the tokens
that they had, since draws are replayable, and go on.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable

from baco.engine.engine import Engine
from baco.engine.metrics import Stats
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.errors import failure

log = logging.getLogger("baco")

_NOT_TAKEN_UP = "the answer could not be taken up again where another request broke it off"


class IsolatingEngine:
    """An engine of this process whose requests fail alone.

    Args:
        make: builds an engine without requests.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self.engine = make()
        # The sequences that callers hold, as long as they have not ended.
        self._open: dict[Request, list[SequenceState]] = {}
        # The engine's own sequences, where they are decoded again, to the callers'; and back.
        self._original: dict[SequenceState, SequenceState] = {}
        self._again: dict[SequenceState, SequenceState] = {}
        self._texts: list[Scoring] = []  # that are not yet scored
        self._suspects: deque[list[Request]] = deque()
        self._late: list[Request] = []  # they came while suspects were tried

    @property
    def stats(self) -> Stats:
        """Running totals, engines that were thrown away included."""
        return self.engine.stats

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request; errors as for :meth:`Engine.add`."""
        made = self.engine.add(request)
        if self._suspects:
            # Among suspects it would have to be decoded again if they fail.
            self._withdraw(made)
            made = [SequenceState(request, one.sample, one.limit) for one in made]
            self._late.append(request)
        self._open[request] = list(made)
        return made

    def score(self, scoring: Scoring) -> None:
        """Queue a text to be scored; errors as for :meth:`Engine.score`."""
        self.engine.score(scoring)
        self._texts = [*(text for text in self._texts if not text.done), scoring]

    def stop_scoring(self, scoring: Scoring) -> None:
        """Give a text up."""
        self.engine.stop_scoring(scoring)
        self._texts = [text for text in self._texts if text is not scoring]

    def step(self) -> list[SequenceState]:
        """One step; the sequences that got tokens or ended.

        Raises:
            Exception: no engine can be made any more, or one fails without a request.
        """
        try:
            grown = self.engine.step()
        except Exception as error:
            told = self._isolate(error)
        else:
            told = [one for sequence in grown if (one := self._take(sequence)) is not None]
        if self._suspects and not self.engine.busy:
            told += self._try_next()
        return told

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        again = self._again.get(sequence)
        if again is not None:
            self.engine.stop(again, len(again.tokens))
        elif sequence.request not in self._apart:
            self.engine.stop(sequence, tokens)
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        self._close(sequence)

    @property
    def busy(self) -> bool:
        """Is there anything left to decode?"""
        return self.engine.busy or bool(self._suspects)

    @property
    def waiting(self) -> int:
        """Sequences that are not being decoded yet."""
        apart = self._apart
        return self.engine.waiting + sum(len(self._open[one]) for one in apart if one in self._open)

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""
        return self.engine.running

    @property
    def _apart(self) -> set[Request]:
        """The requests that wait for an engine of their own."""
        return {request for group in self._suspects for request in group} | set(self._late)

    def _isolate(self, error: Exception) -> list[SequenceState]:
        """Halve the requests that were in a step that raised, or end the only one."""
        apart = self._apart
        inside = [request for request in self._open if request not in apart]
        if not inside:
            raise error
        told = self._throw_away(inside)
        inside = [request for request in inside if request in self._open]
        if len(inside) == 1:
            log.error("a prompt failed alone in its batch: %r", error, exc_info=error)
            return told + self._fail(inside[0], error)
        log.warning("a step of %d prompts failed (%r): looking for the one", len(inside), error)
        half = len(inside) // 2
        self._suspects.extendleft(group for group in (inside[half:], inside[:half]) if group)
        return told

    def _throw_away(self, inside: Iterable[Request]) -> list[SequenceState]:
        """Make another engine; the sequences that had just ended."""
        past = self.engine.stats
        self.engine = self._make()
        self.engine.stats.carry_on(past)
        for text in self._texts:
            if not text.done:
                text.roll_back()
                self.engine.score(text)
        self._original.clear()
        self._again.clear()
        ended = []
        for sequence in [one for request in inside for one in self._open[request]]:
            # A step that raised may have left the last token without all that is known of it.
            sequence.cut(sequence.whole)
            if sequence.finish_reason is not None:
                self._close(sequence)
                ended.append(sequence)
        return ended

    def _try_next(self) -> list[SequenceState]:
        """Let the engine have the next suspects, and with the last of them those who came late."""
        group = self._suspects.popleft()
        if not self._suspects:
            group, self._late = group + self._late, []
        told = []
        for request in group:
            if request in self._open:
                try:
                    self._start_again(request)
                except Exception as error:
                    told += self._fail(request, error)
        return told

    def _start_again(self, request: Request) -> None:
        made = {one.sample: one for one in self.engine.add(request)}
        for sequence in self._open[request]:
            again = made.pop(sequence.sample)
            self._original[again], self._again[sequence] = sequence, again
        self._withdraw(made.values())  # they have ended

    def _withdraw(self, made: Iterable[SequenceState]) -> None:
        for one in made:
            self.engine.stop(one, 0)

    def _take(self, sequence: SequenceState) -> SequenceState | None:
        """The caller's sequence with what is new in the engine's; None where nothing is."""
        original = self._original.get(sequence, sequence)
        if original is not sequence:
            known, now = len(original.tokens), len(sequence.tokens)
            ended = sequence.finish_reason is not None
            same = sequence.tokens[:known] == original.tokens[:now]
            if not same or (ended and now < known):
                self.engine.stop(sequence, 0)
                original.finish_reason, original.error = "error", _NOT_TAKEN_UP
            elif ended or now > known:
                original.extend(sequence, known)
                original.finish_reason, original.error = sequence.finish_reason, sequence.error
            else:
                return None
        if original.finish_reason is not None:
            self._close(original)
        return original

    def _fail(self, request: Request, error: Exception) -> list[SequenceState]:
        """End a request's open answers in an error."""
        ended = list(self._open[request])
        for sequence in ended:
            sequence.finish_reason, sequence.error = "error", failure(error)
            self._close(sequence)
        return ended

    def _close(self, sequence: SequenceState) -> None:
        """A sequence has ended."""
        self._original.pop(self._again.pop(sequence, sequence), None)
        left = self._open.get(sequence.request, [])
        if sequence in left:
            left.remove(sequence)
            if not left:
                del self._open[sequence.request]
