"""Errors as OpenAI's API tells them, so that clients raise the exceptions they have for them."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from baco.errors import BacoError, UpstreamError
from baco.serve.driver import ClosedError, QueueFullError
from baco.serve.protocol import REFUSED

log = logging.getLogger("baco.serve")

RETRY_AFTER_SECONDS = 1
CLIENT_GONE = 499  # nginx's: nobody reads it but the access log
# What OpenAI calls an error of a status; other 4xx are invalid_request_error, 5xx server_error.
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class UnknownModelError(Exception):
    """No model of this server has the name that a request gives."""


class ClientGoneError(Exception):
    """Who asked no longer listens."""


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: Problem


def problem_of(error: Exception) -> tuple[int, Problem]:
    """Status and body of what ended a request; what nobody foresaw is 500 and tells no details."""
    code = None
    match error:
        case BacoError():
            status, message = 400, str(error)
        case UnknownModelError():
            status, message, code = 404, str(error), "model_not_found"
        case QueueFullError():
            status, message = 429, "the server holds as many requests as it may: try again"
        case ClosedError():
            status, message = 503, "the server is shutting down: ask another, or try again later"
        case UpstreamError():
            status, message = 502, str(error)
        case TimeoutError():
            status, message = 504, "the answer took longer than this server lets a request take"
        case _:
            status, message = 500, "the server failed at this request; its log says how"
    return status, problem(status, message, code=code)


def problem(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> Problem:
    """A problem of the type that OpenAI gives a status."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return Problem(message=message, type=kind, param=param, code=code)


def response(status: int, told: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error's whole response."""
    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else {}
    body = ErrorBody(error=told).model_dump()
    return JSONResponse(body, status, retry | (headers or {}))


def install(app: FastAPI) -> None:
    """Have every error of an app answered in OpenAI's shape."""
    foreseen_errors = (
        BacoError,
        UnknownModelError,
        QueueFullError,
        ClosedError,
        TimeoutError,
        UpstreamError,
    )
    for foreseen in foreseen_errors:
        app.add_exception_handler(foreseen, _on_foreseen)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientGoneError, _on_gone)


async def _on_foreseen(_: Request, error: Exception) -> Response:
    return response(*problem_of(error))


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} takes no {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    told = problem(error.status_code, message)
    return response(error.status_code, told, dict(error.headers or {}))


async def _on_invalid(_: Request, error: Exception) -> Response:
    """One line on the first thing that is wrong; what is not supported is said to be so."""
    assert isinstance(error, RequestValidationError)
    # Of a value that may be of several types, the one that it came furthest as tells most.
    first = max(error.errors(), key=_nearness)
    place = [str(part) for part in first["loc"][1:] if _is_place(part)]
    name = ".".join(place)
    if first["type"] == "json_invalid":
        return response(400, problem(400, f"the body is no JSON: {first['ctx']['error']}"))
    if place and place[0] in REFUSED:
        return response(400, problem(400, f"{place[0]} {REFUSED[place[0]]}", param=place[0]))
    if first["type"] == "extra_forbidden":
        message = f"{name} is no parameter of this endpoint: leave it out"
    elif not place:
        message = "give a JSON object, with Content-Type application/json"
    elif first["type"] == "missing":
        message = f"{name} is missing"
    else:
        message = f"{name} is {_shown(first.get('input'))}: {first['msg'].lower()}"
    return response(400, problem(400, message, param=name or None))


def _nearness(found: Any) -> tuple[int, bool]:
    """How far a value came as one of its types: how deep, and whether the type itself was right."""
    return len(found["loc"]), not found["type"].endswith("_type")


def _is_place(part: int | str) -> bool:
    """Is a part of an error's place one of the body's, or the name of a type that was tried?"""
    return isinstance(part, int) or (part.isidentifier() and part != "str")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
