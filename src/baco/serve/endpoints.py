"""``/v1``: OpenAI's endpoints, on answers that a driver decodes."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from baco.api import Baco
from baco.serve import errors
from baco.serve.answering import Answers, unless_gone
from baco.serve.asking import Asking, Question
from baco.serve.choices import Choice
from baco.serve.driver import Driver
from baco.serve.errors import ErrorBody
from baco.serve.protocol import Asked, ChatRequest, CompletionRequest
from baco.serve.replies import (
    ChatReply,
    ModelCard,
    ModelList,
    Reply,
    TextReply,
    Usage,
)
from baco.serve.settings import Settings
from baco.serve.shapes import ChatShape, Shape, TextShape

_FAILURES = (400, 401, 404, 405, 413, 429, 500, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _FAILURES}
_STREAM = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


class Endpoints:
    """The endpoints of one pair."""

    def __init__(self, baco: Baco, driver: Driver, asking: Asking, settings: Settings) -> None:
        self._pair, self._driver, self._asking = baco.pair, driver, asking
        self._settings, self._since = settings, int(time.time())

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
        return await self._answer(request, body, question, ChatShape(body.model, logprobs))

    async def completion(self, request: Request, body: CompletionRequest) -> Response:
        """Continue texts."""
        question = self._asking.completion(body)
        logprobs = question.params.logprobs is not None
        return await self._answer(request, body, question, TextShape(body.model, logprobs))

    def _card(self, name: str) -> ModelCard:
        return ModelCard(id=name, created=self._since)

    async def _answer(
        self, request: Request, body: Asked, question: Question, shape: Shape
    ) -> Response:
        answers = Answers(self._driver, question, self._settings.timeout)
        count = len(question.prompts) * question.params.n
        choices = [Choice(self._pair, question.explain) for _ in range(count)]
        try:
            await unless_gone(request, answers.accepted())
            if not body.stream:
                await unless_gone(request, _collect(answers, choices))
                reply = shape.reply(choices, _usage(answers, choices))
                return Response(reply.model_dump_json(), media_type="application/json")
        except BaseException:
            answers.cancel()
            raise
        counted = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(answers, _events(answers, choices, shape, counted))


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


async def _collect(answers: Answers, choices: list[Choice]) -> None:
    async for index, chunk in answers.chunks():
        choices[index].take(chunk)


async def _events(
    answers: Answers, choices: list[Choice], shape: Shape, counted: bool
) -> AsyncIterator[str]:
    for index in range(len(choices)):
        opening = shape.opening(index)
        if opening is not None:
            yield _event(opening)
    try:
        async for index, chunk in answers.chunks():
            choice = choices[index]
            yield _event(shape.chunk(index, choice, chunk, choice.take(chunk)))
    except Exception as error:
        _, problem = errors.problem_of(error)
        yield f"data: {ErrorBody(error=problem).model_dump_json()}\n\n"
        return
    if counted:
        yield _event(shape.counted(_usage(answers, choices)))
    yield "data: [DONE]\n\n"


def _event(reply: Reply) -> str:
    return f"data: {reply.model_dump_json()}\n\n"


def _usage(answers: Answers, choices: list[Choice]) -> Usage:
    said = sum(len(choice.completion.token_ids) for choice in choices if choice.completion)
    prompt = answers.prompt_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=said, total_tokens=prompt + said)
