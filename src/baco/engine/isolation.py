"""Keeps a request that makes a step raise from ending others with it.

A step that raises leaves the batch in an unknown state. The engine is then replaced, and the
requests that were in it are bisected: each half is decoded again on an engine of its own, down to a
request that raises alone. Its answers end in an error. All others reach the tokens that they had,
since draws are replayable, and continue.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable

from baco.engine.engine import Engine, Stats
from baco.engine.scoring import Scoring
from baco.engine.sequence import Request, SequenceState
from baco.engine.shared_text_engine import SharedTextEngine
from baco.errors import Failure, failure_message

log = logging.getLogger("baco")

_NOT_RESUMED = Failure(
    "process", "the answer could not be resumed after another request interrupted it"
)


class IsolatingEngine:
    """An engine whose requests fail alone.

    Args:
        make_engine: builds an engine without requests.
    """

    def __init__(self, make_engine: Callable[[], Engine | SharedTextEngine]) -> None:
        self._make_engine = make_engine
        self.engine = make_engine()
        # Sequences that callers hold, until they end.
        self._open: dict[Request, list[SequenceState]] = {}
        # Where a sequence is decoded again: from the engine's to the caller's, and back.
        self._original: dict[SequenceState, SequenceState] = {}
        self._replay: dict[SequenceState, SequenceState] = {}
        self._texts: list[Scoring] = []  # not yet scored
        self._suspects: deque[list[Request]] = deque()
        self._late: list[Request] = []  # added while suspects were tried

    @property
    def stats(self) -> Stats:
        """Running totals, those of replaced engines included."""
        return self.engine.stats

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request; errors as for :meth:`Engine.add`."""
        sequences = self.engine.add(request)
        if self._suspects:
            # Among suspects it would have to be decoded again when they fail.
            self._withdraw(sequences)
            for sequence in sequences:
                sequence.finish_reason = None
            self._late.append(request)
        self._open[request] = list(sequences)
        return sequences

    def score(self, scoring: Scoring) -> None:
        """Queue a text to be scored; errors as for :meth:`Engine.score`."""
        self.engine.score(scoring)
        self._texts = [*(text for text in self._texts if not text.done), scoring]

    def stop_scoring(self, scoring: Scoring) -> None:
        """Drop a text that is no longer to be scored."""
        self.engine.stop_scoring(scoring)
        self._texts = [text for text in self._texts if text is not scoring]

    def step(self) -> list[SequenceState]:
        """One step; returns the sequences that got tokens or ended.

        Raises:
            Exception: no engine can be built any more, or one fails without a request.
        """
        try:
            with self.engine.pair.lock:
                stepped = self.engine.step()
        except Exception as error:
            changed = self._isolate(error)
        else:
            originals = map(self._update_original, stepped)
            changed = [sequence for sequence in originals if sequence is not None]
        if self._suspects and not self.engine.busy:
            changed += self._try_next()
        return changed

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; it leaves the batch."""
        replay = self._replay.get(sequence)
        if replay is not None:
            self.engine.stop(replay, len(replay.tokens))
        elif sequence.request not in self._apart:
            self.engine.stop(sequence, tokens)
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        self._close(sequence)

    @property
    def busy(self) -> bool:
        """Whether anything is left to decode."""
        return self.engine.busy or bool(self._suspects)

    @property
    def waiting(self) -> int:
        """Sequences that are not being decoded yet."""
        apart = (self._open.get(request, ()) for request in self._apart)
        return self.engine.waiting + sum(map(len, apart))

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""
        return self.engine.running

    @property
    def _apart(self) -> set[Request]:
        """The requests that wait for an engine of their own."""
        return {request for group in self._suspects for request in group} | set(self._late)

    def _isolate(self, error: Exception) -> list[SequenceState]:
        """Bisect the requests that were in a step that raised, or end the only one."""
        apart = self._apart
        inside = [request for request in self._open if request not in apart]
        if not inside:
            raise error
        ended = self._replace_engine(inside)
        inside = [request for request in inside if request in self._open]
        if len(inside) == 1:
            log.error("a prompt failed alone in its batch: %r", error, exc_info=error)
            return ended + self._fail(inside[0], error)
        log.warning("a step of %d prompts failed (%r): looking for the prompt", len(inside), error)
        middle = len(inside) // 2
        groups = (inside[middle:], inside[:middle])
        self._suspects.extendleft(group for group in groups if group)
        return ended

    def _replace_engine(self, inside: Iterable[Request]) -> list[SequenceState]:
        """Build another engine; returns the sequences that had just ended in the old one."""
        past = self.engine.stats
        self.engine.forget_prefixes()
        self.engine = self._make_engine()
        self.engine.stats.resume(past)
        for text in self._texts:
            if not text.done:
                text.restart()
                self.engine.score(text)
        self._original.clear()
        self._replay.clear()
        ended = []
        for sequence in [sample for request in inside for sample in self._open[request]]:
            # The step that raised may have left its last token without log-probability or the like.
            sequence.cut(sequence.num_complete)
            if sequence.finish_reason is not None:
                self._close(sequence)
                ended.append(sequence)
        return ended

    def _try_next(self) -> list[SequenceState]:
        """Add the next suspects to the engine, and late requests together with the last ones."""
        group = self._suspects.popleft()
        if not self._suspects:
            group, self._late = group + self._late, []
        failed = []
        for request in group:
            if request in self._open:
                try:
                    self._decode_again(request)
                except Exception as error:
                    failed += self._fail(request, error)
        return failed

    def _decode_again(self, request: Request) -> None:
        replays = {replay.sample: replay for replay in self.engine.add(request)}
        for sequence in self._open[request]:
            replay = replays.pop(sequence.sample)
            # Samples that have ended are not decoded again.
            replay.earlier = [self._replay.get(sample, sample) for sample in sequence.earlier]
            self._original[replay], self._replay[sequence] = sequence, replay
        self._withdraw(replays.values())  # the caller's have ended

    def _withdraw(self, sequences: Iterable[SequenceState]) -> None:
        for sequence in sequences:
            self.engine.stop(sequence, 0)

    def _update_original(self, sequence: SequenceState) -> SequenceState | None:
        """The caller's sequence with the engine's new tokens; None where there are none."""
        original = self._original.get(sequence, sequence)
        if original is not sequence:
            known, now = len(original.tokens), len(sequence.tokens)
            ended = sequence.finish_reason is not None
            same = sequence.tokens[:known] == original.tokens[:now]
            if not same or (ended and now < known):
                self.engine.stop(sequence, 0)
                original.finish_reason, original.error = "error", _NOT_RESUMED
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
        failure = Failure("process", failure_message(error))
        for sequence in ended:
            sequence.finish_reason, sequence.error = "error", failure
            self._close(sequence)
        return ended

    def _close(self, sequence: SequenceState) -> None:
        """Forget a sequence that has ended."""
        self._original.pop(self._replay.pop(sequence, sequence), None)
        still_open = self._open.get(sequence.request, [])
        if sequence in still_open:
            still_open.remove(sequence)
            if not still_open:
                del self._open[sequence.request]
