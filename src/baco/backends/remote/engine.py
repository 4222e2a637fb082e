"""The engine that a decoder drives: an event loop writes answers, steps take up the news."""

import asyncio
import logging
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from baco.backends.remote.answer import Answer, News, Totals
from baco.backends.remote.half import RemoteModel
from baco.engine.sequence import Request, SequenceState
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.source import Source

log = logging.getLogger("baco")

# Seconds that a step waits for news: whoever adds or stops a request waits no longer.
_MOMENT = 0.02


class RemoteEngine:
    """Decodes requests on two servers, for one decoder.

    Args:
        pair: the pair without its weights.
        halves: both servers.
        loop: runs the answers, in a thread of its own.
        places: how many answers are written at once.
        check: refuses requests that the servers cannot keep.
    """

    def __init__(
        self,
        pair: Pair,
        halves: Mapping[Source, RemoteModel],
        loop: asyncio.AbstractEventLoop,
        places: asyncio.Semaphore,
        check: Callable[[Request], int],
    ) -> None:
        self._pair, self._halves, self._loop, self._places = pair, halves, loop, places
        self._check = check
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._open: dict[SequenceState, Future[None]] = {}
        self._writing: set[SequenceState] = set()
        self.stats = Totals()

    def add(self, request: Request) -> list[SequenceState]:
        """Queue the n samples of a request.

        Raises:
            BacoError: the servers cannot keep what it asks, or its prompt fits no context window.
        """
        limit = min(request.params.max_tokens, self._check(request))
        made = [SequenceState(request, sample, limit) for sample in range(request.params.n)]
        for sequence in made:
            self._open[sequence] = self._start(self._write(sequence))
        return made

    def step(self) -> list[SequenceState]:
        """Take up what came, and wait a moment for it if need be; the sequences that got any.

        Raises:
            BacoError: the backend was closed.
        """
        grown: dict[SequenceState, None] = {}
        try:
            news = self._news.get(timeout=_MOMENT)
            while True:
                if self._take(news):
                    grown[news.sequence] = None
                news = self._news.get_nowait()
        except queue.Empty:
            if self._loop.is_closed():
                raise BacoError("the remote backend is closed: load the pair again") from None
            return list(grown)

    def stop(self, sequence: SequenceState, tokens: int) -> None:
        """End a sequence early and keep its first ``tokens`` tokens; its calls are given up."""
        sequence.finish_reason = "stop"
        sequence.cut(tokens)
        self._forget(sequence)

    @property
    def busy(self) -> bool:
        """Is there anything left to decode?"""
        return bool(self._open)

    @property
    def waiting(self) -> int:
        """Sequences that have no place yet."""
        return max(0, len(self._open) - self.running)

    @property
    def running(self) -> int:
        """Sequences that are being written."""
        return len(self._writing)

    def _start(self, work: Any) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _write(self, sequence: SequenceState) -> None:
        async with self._places:
            self._writing.add(sequence)
            try:
                tell = self._news.put
                await Answer(sequence, self._halves, self._pair, self.stats, tell).write()
            except Exception:
                log.exception("an answer failed")
                told = "decoding failed in this process; its log says how"
                self._news.put(News(sequence, [], [], [], [], [], "error", told))
            finally:
                self._writing.discard(sequence)

    def _take(self, news: News) -> bool:
        """Append news to a sequence that still wants any."""
        sequence = news.sequence
        if sequence not in self._open:
            return False
        sequence.tokens += news.tokens
        sequence.sources += news.sources
        sequence.logprobs += news.logprobs
        sequence.top_logprobs += news.tops
        sequence.why += news.whys
        sequence.finish_reason, sequence.error = news.finish, news.error
        if news.finish is not None:
            self._forget(sequence)
        return bool(news.tokens) or news.finish is not None

    def _forget(self, sequence: SequenceState) -> None:
        writing = self._open.pop(sequence, None)
        if writing is not None:
            writing.cancel()
