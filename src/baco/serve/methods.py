"""Methods as models: prompting methods, which reword a prompt or call the models several times.

A method runs in a thread of its own. Its calls of the models are jobs of the engine thread, so they
share the batch with all other requests.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any, cast

from baco.api import Baco
from baco.backends.base import TokenEngine
from baco.decoder import Decoder, Scored
from baco.engine.scheduler import MANY_CHUNKS
from baco.evaluation.methods import Answer, Draw, answer
from baco.evaluation.methods.served import ServedMethod
from baco.evaluation.records import Prompt as TaskPrompt
from baco.outputs import Chunk
from baco.routing.router import Router
from baco.routing.word_boundaries import Switch
from baco.sampling.params import SamplingParams
from baco.serve.engine_thread import EngineThread, Job, JobCancelledError
from baco.serve.errors import raise_error
from baco.serve.metrics import Metrics
from baco.serve.response_models import Provenance, Usage
from baco.source import Source
from baco.text.prompts import Message, Prompt

# Requests to methods that run at once; further ones wait.
MAX_RUNNING = 64


@dataclass(frozen=True, slots=True)
class MethodRequest:
    """A request to a method.

    Attributes:
        method: with its setting.
        messages: the conversation, which ends with a user's turn.
        draw: n, the seed, and the sampling parameters that the request gives.
        cache_salt: see :meth:`Decoder.submit_rendered`.
    """

    method: ServedMethod
    messages: tuple[Message, ...]
    draw: Draw
    cache_salt: str = ""


@dataclass(eq=False)
class MethodCall:
    """The answers of a method to one request.

    Attributes:
        asked: the request.
        baco: the pair.
        engine_thread: decodes the calls of the models.
        metrics: count every call.
        deadline: on the monotonic clock.
        prompt_tokens, cached_tokens, tokens, thinking_tokens: of all calls so far.
    """

    asked: MethodRequest
    baco: Baco
    engine_thread: EngineThread
    metrics: Metrics
    deadline: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    thinking_tokens: int = 0
    _cancelled: Event = field(default_factory=Event)
    _decoders: "list[_JobDecoder]" = field(default_factory=list)

    async def answers(self, executor: ThreadPoolExecutor) -> list[Answer]:
        """All n answers. Cancelling this coroutine cancels the calls.

        Raises:
            TimeoutError: the request took too long.
            BacoError: the method or a call refuses the request.
            Exception: any other error that ended a call.
        """
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                return await asyncio.get_running_loop().run_in_executor(executor, self._run)
        except BaseException:
            self._cancel()
            raise

    @property
    def usage(self) -> Usage:
        """The tokens of all calls."""
        return Usage.of(self.prompt_tokens, self.tokens, self.cached_tokens, self.thinking_tokens)

    def _run(self) -> list[Answer]:
        prompt = TaskPrompt("request", self.asked.messages)
        baco = cast(Baco, _JobBaco(self))
        return answer(baco, self.asked.method.setting, [prompt], self.asked.draw)[0]

    def _cancel(self) -> None:
        self._cancelled.set()
        for decoder in list(self._decoders):
            decoder.results.put((0, JobCancelledError()))

    def decoder(self) -> "_JobDecoder":
        """A decoder for the method, whose requests are jobs of the engine thread."""
        decoder = _JobDecoder(self)
        self._decoders.append(decoder)
        self.check_open()
        return decoder

    def check_open(self) -> None:
        """Raise JobCancelledError once the request is cancelled."""
        if self._cancelled.is_set():
            raise JobCancelledError

    def count_prompt(self, prompt: Prompt) -> None:
        """Count the prompt of a call."""
        tokens = len(prompt.aligned_ids)
        self.prompt_tokens += tokens
        self.metrics.prompt_tokens.inc(tokens)

    def count(self, chunk: Chunk) -> None:
        """Count a chunk of a call."""
        self.metrics.count(chunk)
        self.tokens += chunk.thinking_tokens + len(chunk.tokens)
        self.thinking_tokens += chunk.thinking_tokens
        if chunk.completion is not None and chunk.completion.sample == 0:
            self.cached_tokens += chunk.completion.cached_tokens


class _JobBaco(Baco):
    """The pair, with decoders whose requests are jobs of the engine thread."""

    def __init__(self, call: MethodCall) -> None:
        vars(self).update(vars(call.baco))
        self._call = call

    def decoder(self, *, chunks_per_step: int = MANY_CHUNKS) -> Decoder:  # noqa: ARG002
        return self._call.decoder()


class _JobDecoder(Decoder):
    """Gives its requests to the engine thread, whose decoder answers them."""

    def __init__(self, call: MethodCall) -> None:
        # It renders prompts itself, and leaves the rest to the decoder of the engine thread.
        super().__init__(call.baco.pair, cast(TokenEngine, None))
        self.results = SimpleQueue[tuple[int, Chunk | Exception]]()
        self._call = call
        self._jobs: dict[int, Job] = {}
        self._left: dict[int, int] = {}

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        router: Router,
        switch: Switch,
        explain: bool,
        openers: tuple[Source | None, ...],
        cache_salt: str = "",
    ) -> int:
        self._call.check_open()
        ticket, self._next = self._next, self._next + 1
        given: dict[str, Any] = {
            "raw": not openers,
            "router": router,
            "switch": switch,
            "explain": explain,
            "cache_salt": cache_salt or self._call.asked.cache_salt,
        }
        job = Job(
            partial(self._start, prompt, params, given),
            partial(self._deliver, ticket),
            answers=params.n,
        )
        self._call.engine_thread.submit([job])
        self._jobs[ticket], self._left[ticket] = job, params.n
        self._call.count_prompt(prompt)
        return ticket

    def _start(
        self, prompt: Prompt, params: SamplingParams, given: dict[str, Any], decoder: Decoder
    ) -> int:
        return decoder.submit_rendered(prompt, params, **given)

    def _deliver(self, ticket: int, result: Chunk | Scored | Exception) -> None:
        assert not isinstance(result, Scored)
        self.results.put((ticket, result))

    def step(self) -> list[Chunk]:
        """The next chunk of any request; waits for it."""
        try:
            left = max(0.0, self._call.deadline - time.monotonic())
            ticket, result = self.results.get(timeout=left)
        except Empty:
            raise TimeoutError from None
        if isinstance(result, Exception):
            raise result
        self._call.count(result)
        if result.completion is not None:
            raise_error(result.completion)
            self._left[ticket] -= 1
            if not self._left[ticket]:
                del self._jobs[ticket], self._left[ticket]
        return [replace(result, prompt=ticket)]

    def close(self) -> None:
        """Cancel the requests that have not ended."""
        for job in self._jobs.values():
            self._call.engine_thread.cancel(job)
        self._jobs.clear()
        self._left.clear()

    @property
    def busy(self) -> bool:
        return bool(self._jobs)


def provenance_of(answer: Answer, asked: MethodRequest) -> Provenance:
    """Which model wrote what of an answer; what repeats it."""
    pieces: Sequence[tuple[str, Source | None]] = answer.pieces or ((answer.text, None),)
    share, ended = answer.base_share, answer.finish_reason
    return Provenance(
        sources=list(pieces),
        base_share=None if share is None else round(share, 4),
        switches=answer.switches,
        router=asked.method.spelling,
        seed=asked.draw.seed,
        outcome=None if ended in ("stop", "length") else ended,
    )
