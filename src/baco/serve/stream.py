"""Brings a request's answers from the engine thread to the event loop, as they grow."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from baco.decoder import Decoder, Scored
from baco.models.pair import Pair
from baco.outputs import Chunk
from baco.serve.engine_thread import EngineThread, Job
from baco.serve.errors import ClientGoneError, raise_error
from baco.serve.parse_request import ParsedRequest
from baco.text.prompts import Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The decoder has accepted a prompt."""


class Answers:
    """The answers to one request, from the queue until they end or are cancelled.

    Args:
        pair: renders the prompts.
        engine_thread: decodes them.
        parsed: the request.
        timeout: seconds for the whole request.

    Attributes:
        prompts: as they were rendered, by their index in the request.

    Raises:
        QueueFullError, ClosedError: the engine thread does not accept it.
    """

    def __init__(
        self, pair: Pair, engine_thread: EngineThread, parsed: ParsedRequest, timeout: float
    ) -> None:
        self.parsed = parsed
        self.started = time.perf_counter()
        self.prompts: dict[int, Prompt] = {}
        self._pair, self._engine_thread = pair, engine_thread
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._events: asyncio.Queue[tuple[int, Chunk | Scored | Exception | _Accepted]] = (
            asyncio.Queue()
        )
        self._early: deque[tuple[int, Chunk | Scored]] = deque()
        self._jobs = [
            Job(
                partial(self._submit, index),
                partial(self._deliver, index),
                partial(self._prepare, index),
                parsed.size(index),
                parsed.params.n,
                parsed.params.structure is not None,
            )
            for index in range(len(parsed.prompts))
        ]
        engine_thread.submit(self._jobs)

    def cancel(self) -> None:
        """Cancel the answers that have not ended."""
        for job in self._jobs:
            self._engine_thread.cancel(job)

    async def accepted(self) -> None:
        """Wait until the decoder has accepted all prompts.

        Raises:
            Exception: the fault of a prompt that was not accepted.
        """
        left = len(self._jobs)
        while left:
            prompt, event = await self._next()
            if isinstance(event, _Accepted):
                left -= 1
            else:  # an answer to a prompt that was accepted before the others
                self._early.append((prompt, event))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, as the aligned model reads them."""
        return sum(len(prompt.aligned_ids) for prompt in self.prompts.values())

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a choice, once the decoder has accepted it."""
        return self.prompts[index // self.parsed.params.n]

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Every chunk with the index of its choice, until all answers have ended.

        Raises:
            TimeoutError: the request took too long.
            UpstreamError: a server that decodes an answer failed.
            AnswerError: an answer failed in this process.
            BacoError: the structure of an answer cannot be followed.
            Exception: any other error that ended an answer.
        """
        n = self.parsed.params.n
        left = n * len(self._jobs)
        while left:
            prompt, chunk = self._early.popleft() if self._early else await self._next()
            assert isinstance(chunk, Chunk)
            if chunk.completion is not None:
                raise_error(chunk.completion)
            yield prompt * n + chunk.sample, chunk
            left -= chunk.finish_reason is not None

    async def _next(self) -> tuple[int, Chunk | Scored | _Accepted]:
        async with asyncio.timeout_at(self._deadline):
            prompt, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return prompt, event

    def _prepare(self, index: int, pause: Callable[[], None]) -> None:
        self.prompts[index] = self.parsed.render(index, self._pair, pause)

    def _submit(self, index: int, decoder: Decoder) -> int:
        ticket = self.parsed.submit(self.prompts[index], decoder)
        self._deliver(index, _Accepted())
        return ticket

    def _deliver(self, index: int, event: Chunk | Scored | Exception | _Accepted) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine.

    Raises:
        ClientGoneError: the client disconnected first; the coroutine is cancelled.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
