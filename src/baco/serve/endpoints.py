"""The endpoints under ``/v1``, as in OpenAI's API."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from baco.api import Baco
from baco.evaluation.methods.served import ServedMethod
from baco.models.context import UNBOUNDED
from baco.outputs import Chunk
from baco.serve import errors
from baco.serve.choices import Choice
from baco.serve.engine_thread import EngineThread
from baco.serve.errors import ClientGoneError, ErrorBody
from baco.serve.formats import ChatFormatter, Formatter, TextFormatter
from baco.serve.methods import MAX_RUNNING, MethodCall, provenance_of
from baco.serve.metrics import Metrics
from baco.serve.parse_request import ParsedRequest, RequestParser
from baco.serve.request_models import ChatRequest, CompletionRequest, GenerationRequest
from baco.serve.response_models import (
    ChatChoice,
    ChatReply,
    ModelCard,
    ModelList,
    Provenance,
    TextChoice,
    TextReply,
    Usage,
)
from baco.serve.scoring import Echo, Scores
from baco.serve.settings import Settings
from baco.serve.stream import Answers, unless_disconnected
from baco.source import MODELS

_FAILURES = (400, 401, 404, 405, 413, 429, 500, 502, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _FAILURES}
# Before version 3.2 of OpenAPI the schema of a stream is that of each of its events.
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
    "description": "One event: a chunk as JSON; the data of the last one is [DONE].",
}
_STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_STREAM = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


class Endpoints:
    """The endpoints of one pair."""

    def __init__(
        self,
        baco: Baco,
        engine_thread: EngineThread,
        parser: RequestParser,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._baco, self._executor = baco, ThreadPoolExecutor(MAX_RUNNING, "baco-methods")
        self._pair, self._engine_thread, self._parser = baco.pair, engine_thread, parser
        self._settings, self._metrics, self._since = settings, metrics, int(time.time())

    def router(self) -> APIRouter:
        """The endpoints' routes."""
        routes = APIRouter(prefix="/v1", responses=ERRORS)
        routes.add_api_route("/models", self.models, response_model=ModelList)
        routes.add_api_route("/models/{model:path}", self.model, response_model=ModelCard)
        routes.add_api_route(
            "/chat/completions",
            self.chat,
            methods=["POST"],
            response_model=ChatReply,
            responses=_STREAM,  # type: ignore[arg-type]
        )
        routes.add_api_route(
            "/completions",
            self.completion,
            methods=["POST"],
            response_model=TextReply,
            responses=_STREAM,  # type: ignore[arg-type]
        )
        return routes

    async def models(self) -> ModelList:
        """List the names that requests may give as their model."""
        return ModelList(data=[self._card(name) for name in self._parser.models()])

    async def model(self, model: str) -> ModelCard:
        """One of these names, or any spelling of a router or a method after ``baco/``."""
        return self._card(model)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        method = self._parser.method_of(body.model)
        if method is not None:
            return await self._answer_by_method(request, body, method)
        parsed = self._parser.chat(body)
        logprobs = parsed.params.logprobs is not None
        choices = [Choice(self._pair, parsed.explain) for _ in range(parsed.params.n)]
        formatter = ChatFormatter(body.model, logprobs)
        timeout = self._settings.timeout
        return await self._answer(request, body, parsed, formatter, choices, timeout)

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        """Continue texts. With ``echo``, a text and its scores come before its answers."""
        started = time.monotonic()
        echo = self._parser.echo(body) if body.echo else None
        if echo is not None and body.max_tokens == 0:
            prompts = await self._scored(request, echo)
            usage = Usage.of(request.state.entry["prompt_tokens"], 0)
            self._metrics.prompt_tokens.inc(usage.prompt_tokens)
            return await _json(TextFormatter(body.model, True), prompts, usage)
        parsed = self._parser.completion(body)
        prompts = [] if echo is None else await self._scored(request, echo)
        logprobs = parsed.params.logprobs is not None
        named = bool(body.return_tokens_as_token_ids)
        choices = [
            Choice(
                self._pair,
                parsed.explain,
                ids=bool(body.return_token_ids),
                named=named,
                ends=named or echo is not None,  # lm-evaluation-harness takes the last token away
            )
            for _ in parsed.prompts
            for _ in range(parsed.params.n)
        ]
        before = [prompt for prompt in prompts for _ in range(parsed.params.n)]
        formatter = TextFormatter(body.model, logprobs, before)
        left = self._settings.timeout - (time.monotonic() - started)
        return await self._answer(request, body, parsed, formatter, choices, left)

    async def _scored(self, request: Request, echo: Echo) -> list[TextChoice]:
        """The prompts of a request with the log-probabilities of their tokens."""
        request.state.entry["router"] = echo.source.capitalize()
        if self._settings.log_prompts:
            request.state.entry["prompts"] = echo.prompts
        scores = Scores(self._pair, self._engine_thread, echo, self._settings.timeout)
        prompts = await unless_disconnected(request, scores.choices())
        request.state.entry["prompt_tokens"] = scores.tokens
        return prompts

    def _card(self, name: str) -> ModelCard:
        method = self._parser.method_of(name)
        only = None if method is not None else self._parser.router_of(name).only
        sources = [source for source in MODELS if only in (source, None)]
        context = min(self._pair.model(source).context for source in sources)
        bounded = context if context < UNBOUNDED else None
        return ModelCard(id=name, created=self._since, max_model_len=bounded)

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        parsed: ParsedRequest,
        formatter: Formatter,
        choices: list[Choice],
        timeout: float,
    ) -> Response:
        entry = request.state.entry
        self._note(entry, body, parsed)
        answers = Answers(self._pair, self._engine_thread, parsed, timeout)
        recorder = AnswerRecorder(answers, choices, self._metrics, entry)
        try:
            await unless_disconnected(request, recorder.accepted())
            if not body.stream:
                await unless_disconnected(request, recorder.whole())
                whole = (formatter.whole(index, choice) for index, choice in enumerate(choices))
                return await _json(formatter, whole, recorder.usage())
        except BaseException:
            answers.cancel()
            raise
        return EventStream(answers, _events(recorder, formatter, _counted(body)))

    async def _answer_by_method(
        self, request: Request, body: ChatRequest, method: ServedMethod
    ) -> Response:
        """The answers of a method. A stream has each in one chunk, once all have ended."""
        asked = self._parser.method_chat(body, method)
        entry = request.state.entry
        entry |= {
            "router": method.spelling,
            "n": asked.draw.n,
            "seed": asked.draw.seed,
            "stream": bool(body.stream),
        }
        if self._settings.log_prompts:
            entry["prompts"] = [asked.messages]
        deadline = time.monotonic() + self._settings.timeout
        call = MethodCall(asked, self._baco, self._engine_thread, self._metrics, deadline)
        entry["outcome"] = "gone"  # the client, unless another outcome follows
        try:
            answers = await unless_disconnected(request, call.answers(self._executor))
        except Exception as error:
            if not isinstance(error, ClientGoneError):
                entry["outcome"] = "failed"
            raise
        finally:
            entry |= {"prompt_tokens": call.prompt_tokens, "tokens": call.tokens}
        entry["outcome"] = "finished"
        formatter = ChatFormatter(body.model, False)
        choices = [
            formatter.answer(
                index,
                answer.text,
                "length" if answer.finish_reason == "length" else "stop",
                provenance_of(answer, asked),
            )
            for index, answer in enumerate(answers)
        ]
        if not body.stream:
            return await _json(formatter, choices, call.usage)
        counted = call.usage if _counted(body) else None
        events = _method_events(formatter, choices, counted)
        return StreamingResponse(events, headers=_STREAMED, media_type="text/event-stream")

    def _note(self, entry: dict[str, Any], body: GenerationRequest, parsed: ParsedRequest) -> None:
        """Add the request to the access log."""
        entry |= {
            "router": parsed.router.spelling,
            "n": parsed.params.n * len(parsed.prompts),
            "seed": parsed.params.seed,
            "stream": bool(body.stream),
        }
        if self._settings.log_prompts:
            entry["prompts"] = parsed.prompts


class AnswerRecorder:
    """Counts a request's answers for the metrics and the access log while they are sent."""

    def __init__(
        self, answers: Answers, choices: list[Choice], metrics: Metrics, entry: dict[str, Any]
    ) -> None:
        self.choices = choices
        self._answers, self._metrics, self._entry = answers, metrics, entry
        self._tokens = self._base = self._thinking = 0
        self._begun = self._mixed = False

    async def accepted(self) -> None:
        """Wait until the decoder has taken all prompts."""
        await self._answers.accepted()
        for index, choice in enumerate(self.choices):
            choice.prompt = self._answers.prompt_of(index)
        self._metrics.prompt_tokens.inc(self._answers.prompt_tokens)
        self._entry["prompt_tokens"] = self._answers.prompt_tokens

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk, Provenance]]:
        """Every chunk, with the index of its choice and the choice's provenance so far."""
        self._entry["outcome"] = "gone"  # the client, unless another outcome follows
        try:
            async for index, chunk in self._answers.chunks():
                self._count(chunk)
                yield index, chunk, self.choices[index].add(chunk)
            self._entry["outcome"] = "finished"
        except Exception:
            self._entry["outcome"] = "failed"
            raise

    def _count(self, chunk: Chunk) -> None:
        if not self._begun and (chunk.tokens or chunk.thinking_tokens):
            self._begun = True
            self._metrics.first_token.observe(time.perf_counter() - self._answers.started)
        self._metrics.count(chunk)
        self._tokens += len(chunk.tokens)
        self._base += sum(token.source == "base" for token in chunk.tokens)
        self._mixed |= any(token.source is None for token in chunk.tokens)
        self._thinking += chunk.thinking_tokens
        self._entry["tokens"] = self._thinking + self._tokens
        share = round(self._base / max(self._tokens, 1), 4)
        self._entry["base_share"] = None if self._mixed else share

    async def whole(self) -> None:
        """Wait until all answers have ended."""
        async for _ in self.chunks():
            pass

    def usage(self) -> Usage:
        """The counted tokens, once all answers have ended."""
        ended = [choice.completion for choice in self.choices if choice.completion is not None]
        thinking = sum(completion.thinking_tokens for completion in ended)
        answers = thinking + sum(len(completion.token_ids) for completion in ended)
        # Once for each prompt: its first answer.
        cached = sum(completion.cached_tokens for completion in ended if completion.sample == 0)
        return Usage.of(self._answers.prompt_tokens, answers, cached, thinking)


class EventStream(StreamingResponse):
    """Server-sent events. When the stream ends in any way, unfinished answers are cancelled."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers=_STREAMED, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _json(formatter: Formatter, choices: Iterable[BaseModel], usage: Usage) -> Response:
    """A whole reply. Other requests run between two choices, since long ones take time to write."""
    written = []
    for choice in choices:
        written.append(choice.model_dump_json())
        await asyncio.sleep(0)
    reply = formatter.reply(usage).model_dump_json()
    # These characters occur in no text, because quotes in texts are escaped.
    reply = reply.replace('"choices":[]', f'"choices":[{",".join(written)}]', 1)
    return Response(reply, media_type="application/json")


async def _events(
    recorder: AnswerRecorder, formatter: Formatter, counted: bool
) -> AsyncIterator[str]:
    for index in range(len(recorder.choices)):
        opening = formatter.opening(index)
        if opening is not None:
            yield _event(opening)
    try:
        async for index, chunk, provenance in recorder.chunks():
            yield _event(formatter.chunk(index, recorder.choices[index], chunk, provenance))
    except Exception as error:
        _, problem = errors.problem_of(error)
        yield _event(ErrorBody(error=problem))
        return
    if counted:
        yield _event(formatter.counted(recorder.usage()))
    yield "data: [DONE]\n\n"


async def _method_events(
    formatter: ChatFormatter, choices: list[ChatChoice], usage: Usage | None
) -> AsyncIterator[str]:
    for choice in choices:
        yield _event(formatter.opening(choice.index))
        yield _event(formatter.answer_chunk(choice))
    if usage is not None:
        yield _event(formatter.counted(usage))
    yield "data: [DONE]\n\n"


def _counted(body: GenerationRequest) -> bool:
    """Whether a stream is to end with its usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _event(content: BaseModel) -> str:
    return f"data: {content.model_dump_json()}\n\n"
