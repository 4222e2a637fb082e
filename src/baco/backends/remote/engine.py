"""The engine of one decoder: an event loop decodes answers, and steps collect their updates."""

import asyncio
import logging
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from baco.backends.remote.answer import Answer, Totals, Update
from baco.backends.remote.model import RemoteModel
from baco.backends.remote.shared_text_answer import SharedTextAnswer
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError, Failure, UpstreamError
from baco.models.pair import Pair
from baco.source import Source

log = logging.getLogger("baco")

# Seconds that a step waits for updates; adding or stopping a request waits no longer.
_WAIT = 0.02


class RemoteEngine:
    """Decodes requests on two servers, for one decoder.

    Args:
        pair: the pair without its weights.
        models: on both servers.
        loop: decodes the answers, in a thread of its own.
        slots: limit how many answers are decoded at once.
        room: how many tokens an answer may get; refuses requests that the servers cannot decode.
    """

    def __init__(
        self,
        pair: Pair,
        models: Mapping[Source, RemoteModel],
        loop: asyncio.AbstractEventLoop,
        slots: asyncio.Semaphore,
        room: Callable[[Request], int],
    ) -> None:
        self._pair, self._models, self._loop, self._slots = pair, models, loop, slots
        self._room = room
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self._open: dict[SequenceState, Future[None]] = {}
        self._decoding: set[SequenceState] = set()
        self.stats = Totals()

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request.

        Raises:
            BacoError: the servers cannot decode it, or its prompt does not fit a context window.
        """
        limit = min(request.params.max_tokens, self._room(request))
        sequences = [SequenceState(request, sample, limit) for sample in range(request.params.n)]
        for sequence in sequences:
            decoding = self._decode(sequence)
            self._open[sequence] = asyncio.run_coroutine_threadsafe(decoding, self._loop)
        return sequences

    def step(self) -> list[SequenceState]:
        """Collect updates, waiting a moment for the first; return the sequences that got any.

        Raises:
            BacoError: the backend was closed.
        """
        grown: dict[SequenceState, None] = {}
        try:
            update = self._updates.get(timeout=_WAIT)
            while True:
                if self._apply(update):
                    grown[update.sequence] = None
                update = self._updates.get_nowait()
        except queue.Empty:
            if self._loop.is_closed():
                raise BacoError("the remote backend is closed: load the pair again") from None
            return list(grown)

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; its calls are cancelled."""
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        self._forget(sequence)

    @property
    def busy(self) -> bool:
        """Is there anything left to decode?"""
        return bool(self._open)

    @property
    def waiting(self) -> int:
        """Sequences that are not being decoded yet."""
        return max(0, len(self._open) - self.running)

    @property
    def running(self) -> int:
        """Sequences that are being decoded."""
        return len(self._decoding)

    async def _decode(self, sequence: SequenceState) -> None:
        async with self._slots:
            self._decoding.add(sequence)
            update = Update(sequence)
            try:
                kind = Answer if self._pair.own_vocabularies is None else SharedTextAnswer
                answer = kind(sequence, self._models, self._pair, self.stats)
                while update.finish_reason is None:
                    update = await answer.step()
                    self._updates.put(update)
            except Exception as error:
                if isinstance(error, UpstreamError | BacoError):
                    message = str(error)
                else:
                    log.exception("an answer failed")
                    message = "decoding failed in this process; see its log"
                failure = Failure("server", message)
                self._updates.put(Update(sequence, finish_reason="error", error=failure))
            finally:
                self._decoding.discard(sequence)

    def _apply(self, update: Update) -> bool:
        """Append an update to its sequence; False where that has been stopped or got nothing."""
        sequence = update.sequence
        if sequence not in self._open:
            return False
        sequence.tokens += update.tokens
        sequence.sources += update.sources
        sequence.logprobs += update.logprobs
        sequence.top_logprobs += update.tops
        sequence.why += update.whys
        sequence.finish_reason, sequence.error = update.finish_reason, update.error
        if update.finish_reason is not None:
            self._forget(sequence)
        return bool(update.tokens) or update.finish_reason is not None

    def _forget(self, sequence: SequenceState) -> None:
        decoding = self._open.pop(sequence, None)
        if decoding is not None:
            decoding.cancel()
