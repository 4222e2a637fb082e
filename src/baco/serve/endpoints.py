"""``/v1``: OpenAI's endpoints, on answers that a driver decodes."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from baco.api import Baco
from baco.models.context import UNBOUNDED
from baco.outputs import Chunk
from baco.serve import errors
from baco.serve.choices import Choice
from baco.serve.engine_thread import EngineThread
from baco.serve.errors import ErrorBody
from baco.serve.formats import ChatShape, Shape, TextShape
from baco.serve.metrics import Metrics
from baco.serve.parse_request import ParsedRequest, RequestParser
from baco.serve.request_models import Asked, ChatRequest, CompletionRequest
from baco.serve.response_models import (
    ChatReply,
    ModelCard,
    ModelList,
    Provenance,
    TextReply,
    Usage,
)
from baco.serve.scoring import Scores
from baco.serve.settings import Settings
from baco.serve.stream import Answers, unless_gone
from baco.source import MODELS

_FAILURES = (400, 401, 404, 405, 413, 429, 500, 502, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _FAILURES}
_STREAM = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


class Endpoints:
    """The endpoints of one pair."""

    def __init__(
        self,
        baco: Baco,
        driver: EngineThread,
        asking: RequestParser,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._pair, self._driver, self._asking = baco.pair, driver, asking
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
        return ModelList(data=[self._card(name) for name in self._asking.models()])

    async def model(self, model: str) -> ModelCard:
        """One of these names, or any router's spelling after ``baco/``."""
        self._asking.router_of(model)
        return self._card(model)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        question = self._asking.chat(body)
        logprobs = question.params.logprobs is not None
        choices = [Choice(self._pair, question.explain) for _ in range(question.params.n)]
        shape = ChatShape(body.model, logprobs)
        return await self._answer(request, body, question, shape, choices)

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        """Continue texts, or tell how likely they are."""
        if body.echo:
            return await self._score(request, body)
        question = self._asking.completion(body)
        logprobs = question.params.logprobs is not None
        choices = [
            Choice(
                self._pair,
                question.explain,
                ids=bool(body.return_token_ids),
                named=bool(body.return_tokens_as_token_ids),
            )
            for _ in question.prompts
            for _ in range(question.params.n)
        ]
        shape = TextShape(body.model, logprobs)
        return await self._answer(request, body, question, shape, choices)

    async def _score(self, request: Request, body: CompletionRequest) -> Response:
        echo = self._asking.echo(body)
        request.state.entry["router"] = echo.half.capitalize()
        if self._settings.log_prompts:
            request.state.entry["prompts"] = echo.prompts
        scores = Scores(self._pair, self._driver, echo, self._settings.timeout)
        choices = await unless_gone(request, scores.choices())
        read = request.state.entry["prompt_tokens"] = scores.tokens
        usage = Usage(prompt_tokens=read, completion_tokens=0, total_tokens=read)
        return await _json(TextShape(body.model, True), choices, usage)

    def _card(self, name: str) -> ModelCard:
        only = self._asking.router_of(name).only
        halves = [getattr(self._pair, half) for half in MODELS if only in (half, None)]
        room = min(half.context for half in halves)
        bounded = room if room < UNBOUNDED else None
        return ModelCard(id=name, created=self._since, max_model_len=bounded)

    async def _answer(
        self,
        request: Request,
        body: Asked,
        question: ParsedRequest,
        shape: Shape,
        choices: list[Choice],
    ) -> Response:
        entry = request.state.entry
        self._note(entry, body, question)
        answers = Answers(self._pair, self._driver, question, self._settings.timeout)
        telling = Telling(answers, choices, self._metrics, entry)
        try:
            await unless_gone(request, telling.accepted())
            if not body.stream:
                await unless_gone(request, telling.whole())
                whole = (shape.whole(index, choice) for index, choice in enumerate(choices))
                return await _json(shape, whole, telling.usage())
        except BaseException:
            answers.cancel()
            raise
        counted = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(answers, _events(telling, shape, counted))

    def _note(self, entry: dict[str, Any], body: Asked, question: ParsedRequest) -> None:
        """Tell the access log what is asked."""
        entry |= {
            "router": question.router.spelling,
            "n": question.params.n * len(question.prompts),
            "seed": question.params.seed,
            "stream": bool(body.stream),
        }
        if self._settings.log_prompts:
            entry["prompts"] = question.prompts


class Telling:
    """A request's answers while they are told, counted for the metrics and the access log."""

    def __init__(
        self, answers: Answers, choices: list[Choice], metrics: Metrics, entry: dict[str, Any]
    ) -> None:
        self.choices = choices
        self._answers, self._metrics, self._entry = answers, metrics, entry
        self._tokens = self._base = 0

    async def accepted(self) -> None:
        """Wait until the decoder has taken all prompts."""
        await self._answers.accepted()
        for index, choice in enumerate(self.choices):
            choice.prompt = self._answers.prompt_of(index)
        self._metrics.prompt_tokens.inc(self._answers.prompt_tokens)
        self._entry["prompt_tokens"] = self._answers.prompt_tokens

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk, Provenance]]:
        """Every chunk, with its choice's index and how the choice stands with it."""
        self._entry["outcome"] = "gone"  # unless it comes to another end
        try:
            async for index, chunk in self._answers.chunks():
                self._count(chunk)
                yield index, chunk, self.choices[index].take(chunk)
            self._entry["outcome"] = "told"
        except Exception:
            self._entry["outcome"] = "failed"
            raise

    def _count(self, chunk: Chunk) -> None:
        if not self._tokens and chunk.tokens:
            self._metrics.first_token.observe(time.perf_counter() - self._answers.started)
        self._metrics.heard(chunk)
        self._tokens += len(chunk.tokens)
        self._base += sum(token.source == "base" for token in chunk.tokens)
        self._entry["tokens"] = self._tokens
        self._entry["base_share"] = round(self._base / max(self._tokens, 1), 4)

    async def whole(self) -> None:
        """Wait until all answers have ended."""
        async for _ in self.chunks():
            pass

    def usage(self) -> Usage:
        """What was counted, once all answers have ended."""
        kept = [choice.completion for choice in self.choices if choice.completion is not None]
        said, prompt = sum(len(one.token_ids) for one in kept), self._answers.prompt_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, answers that have not ended are given up."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def _json(shape: Shape, choices: Iterable[BaseModel], usage: Usage) -> Response:
    """A whole reply, written choice by choice: between two of them others have their turn."""
    written = []
    for choice in choices:
        written.append(choice.model_dump_json())
        await asyncio.sleep(0)
    reply = shape.reply(usage).model_dump_json()
    # No text can hold these characters: quotes are escaped in it.
    reply = reply.replace('"choices":[]', f'"choices":[{",".join(written)}]', 1)
    return Response(reply, media_type="application/json")


async def _events(telling: Telling, shape: Shape, counted: bool) -> AsyncIterator[str]:
    for index in range(len(telling.choices)):
        opening = shape.opening(index)
        if opening is not None:
            yield _event(opening)
    try:
        async for index, chunk, told in telling.chunks():
            yield _event(shape.chunk(index, telling.choices[index], chunk, told))
    except Exception as error:
        _, problem = errors.problem_of(error)
        yield _event(ErrorBody(error=problem))
        return
    if counted:
        yield _event(shape.counted(telling.usage()))
    yield "data: [DONE]\n\n"


def _event(told: BaseModel) -> str:
    return f"data: {told.model_dump_json()}\n\n"
