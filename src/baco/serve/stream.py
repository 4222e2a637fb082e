"""A request's answers as the event loop hears of them; whoever stops listening cancels them."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from baco.decoder import Decoder, Scored
from baco.engine.isolation import IsolatingEngine
from baco.errors import AnswerError, UpstreamError
from baco.models.pair import Pair
from baco.outputs import Chunk
from baco.serve.engine_thread import EngineThread
from baco.serve.errors import ClientGoneError
from baco.serve.job import Job
from baco.serve.parse_request import ParsedRequest
from baco.text.prompts import Prompt

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A decoder has taken a prompt."""


class Answers:
    """The answers to one request, from when it is queued until they end or are given up.

    Args:
        pair: renders the prompts.
        driver: decodes them.
        question: what is asked.
        timeout: seconds that all of it may take.

    Attributes:
        prompts: as the decoder has taken them, by their place in the request.

    Raises:
        QueueFullError, ClosedError: the driver does not take it.
    """

    def __init__(
        self, pair: Pair, driver: EngineThread, question: ParsedRequest, timeout: float
    ) -> None:
        self.question = question
        self.started = time.perf_counter()
        self.prompts: dict[int, Prompt] = {}
        self._pair, self._driver = pair, driver
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._told: asyncio.Queue[tuple[int, Chunk | Scored | Exception | _Accepted]] = (
            asyncio.Queue()
        )
        self._early: deque[tuple[int, Chunk | Scored]] = deque()
        self._broken_off: type[Exception] = UpstreamError
        self._jobs = [
            Job(
                partial(self._submit, index),
                partial(self._deliver, index),
                partial(self._prepare, index),
                question.size(index),
                question.params.n,
            )
            for index in range(len(question.prompts))
        ]
        driver.submit(self._jobs)

    def cancel(self) -> None:
        """Give up what has not ended."""
        for job in self._jobs:
            self._driver.cancel(job)

    async def accepted(self) -> None:
        """Wait until the decoder has taken all prompts.

        Raises:
            Exception: what was wrong with one.
        """
        left = len(self._jobs)
        while left:
            prompt, told = await self._next()
            if isinstance(told, _Accepted):
                left -= 1
            else:  # an answer to a prompt that was taken before the others
                self._early.append((prompt, told))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, as the aligned model reads them."""
        return sum(len(prompt.aligned_ids) for prompt in self.prompts.values())

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a choice, once the decoder has taken it."""
        return self.prompts[index // self.question.params.n]

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Every chunk with the index of its choice, until all answers have ended.

        Raises:
            TimeoutError: the time is over.
            UpstreamError: a server that decodes an answer failed.
            AnswerError: an answer broke off in this process.
            Exception: what else ended an answer.
        """
        n = self.question.params.n
        left = n * len(self._jobs)
        while left:
            prompt, chunk = self._early.popleft() if self._early else await self._next()
            assert isinstance(chunk, Chunk)
            if chunk.completion is not None and chunk.completion.error is not None:
                raise self._broken_off(chunk.completion.error)
            yield prompt * n + chunk.sample, chunk
            left -= chunk.finish_reason is not None

    async def _next(self) -> tuple[int, Chunk | Scored | _Accepted]:
        async with asyncio.timeout_at(self._deadline):
            prompt, told = await self._told.get()
        if isinstance(told, Exception):
            raise told
        return prompt, told

    def _prepare(self, index: int, pause: Callable[[], None]) -> None:
        self.prompts[index] = self.question.render(index, self._pair, pause)

    def _submit(self, index: int, decoder: Decoder) -> int:
        if isinstance(decoder.engine, IsolatingEngine):
            self._broken_off = AnswerError
        ticket = self.question.submit(self.prompts[index], decoder)
        self._deliver(index, _Accepted())
        return ticket

    def _deliver(self, index: int, told: Chunk | Scored | Exception | _Accepted) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, (index, told))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives.

    Raises:
        ClientGoneError: who asked went away first; the coroutine is cancelled.
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
