"""Errors in the format of OpenAI's API, so that clients raise their usual exceptions."""

import json
import reprlib
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from baco.errors import (
    AnswerError,
    BacoError,
    ContextLengthError,
    DamagedLogitsError,
    ErrorKind,
    UpstreamError,
)
from baco.outputs import Completion
from baco.serve.engine_thread import ClosedError, QueueFullError

RETRY_AFTER_SECONDS = 1
CLIENT_GONE = 499  # nginx's status; it appears in the access log only
MAX_SHOWN, MAX_MESSAGE = 80, 1000  # characters of a value and of a message
_REFUSED = "baco_refused"
# OpenAI's error type by status. Other 4xx are invalid_request_error, 5xx are server_error.
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}

_ANSWER_ERRORS: dict[ErrorKind, type[Exception]] = {
    "structure": BacoError,
    "process": AnswerError,
    "server": UpstreamError,
}


class UnknownModelError(Exception):
    """The server has no model of the requested name."""


class ClientGoneError(Exception):
    """The client has disconnected."""


class Problem(BaseModel):
    """One error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: Problem


def raise_error(completion: Completion) -> None:
    """Raise the exception for an answer that ended in an error; none for another answer.

    Raises:
        BacoError: its structure cannot be followed.
        AnswerError: it failed in this process.
        UpstreamError: a server that decodes it failed.
    """
    if completion.error_kind is not None:
        raise _ANSWER_ERRORS[completion.error_kind](completion.error)


def problem_of(error: Exception) -> tuple[int, Problem]:
    """Status and body for an exception. An unexpected one is 500 and reveals no details."""
    code = None
    match error:
        case AnswerError() | DamagedLogitsError():
            status, message = 500, str(error)
        case ContextLengthError():
            status, message, code = 400, str(error), "context_length_exceeded"
        case BacoError():
            status, message = 400, str(error)
        case UnknownModelError():
            status, message, code = 404, str(error), "model_not_found"
        case QueueFullError():
            status, message = 429, "the server has as many open requests as it allows: try again"
        case ClosedError():
            status, message = (
                503,
                "the server is shutting down: use another one, or try again later",
            )
        case UpstreamError():
            status, message = 502, str(error)
        case TimeoutError():
            status, message = 504, "the answer took longer than the time limit of this server"
        case _:
            status, message = 500, "the server failed at this request; its log says how"
    return status, problem(status, message, code=code)


def problem(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> Problem:
    """A problem with OpenAI's type for its status, and its message as one printable line."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param = None if param is None else _printable(cut(param))
    message = _printable(cut(message, MAX_MESSAGE))
    return Problem(message=message, type=kind, param=param, code=code)


def _printable(text: str) -> str:
    """A text with line breaks, control characters and lone surrogates escaped, for terminals."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def response(status: int, problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error's whole response."""
    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else {}
    body = ErrorBody(error=problem).model_dump()
    return JSONResponse(body, status, retry | (headers or {}))


def install(app: FastAPI) -> None:
    """Answer all errors of an app in OpenAI's format."""
    expected = (
        BacoError,
        UnknownModelError,
        QueueFullError,
        ClosedError,
        TimeoutError,
        UpstreamError,
        AnswerError,
    )
    for kind in expected:
        app.add_exception_handler(kind, _on_expected)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientGoneError, _on_gone)


async def _on_expected(_: Request, error: Exception) -> Response:
    return response(*problem_of(error))


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # Not request.url, which fails if the Host header is not a host.
    path = cut(request.scope["path"])
    messages = {404: f"there is no {path} here", 405: f"{path} takes no {request.method}"}
    message = messages.get(error.status_code, str(error.detail))
    if error.status_code == 400 and error.__cause__ is not None:
        message = f"the body cannot be read as JSON: {_fault(error.__cause__)}"
    body = problem(error.status_code, message)
    return response(error.status_code, body, dict(error.headers or {}))


def _fault(error: BaseException) -> str:
    """Why a body cannot be parsed as JSON."""
    match error:
        case UnicodeDecodeError():
            return "it is not valid UTF-8"
        case RecursionError():
            return "it is nested too deeply"
        case json.JSONDecodeError():
            return error.msg
        case _:
            return "it holds a number of too many digits"


def refused(fault: str, field: str) -> PydanticCustomError:
    """A validation error with a message of ours.

    Args:
        fault: the message without the field's name, which comes first.
        field: the field's name, relative to the part of the body that is validated.
    """
    return PydanticCustomError(_REFUSED, "{fault}", {"fault": fault, "field": field})


async def _on_invalid(_: Request, error: Exception) -> Response:
    """The first fault, in one line."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:] if _is_place(part)]
    name, kind = ".".join(place), first["type"]
    if kind == _REFUSED:
        name = ".".join([*place, first["ctx"]["field"]]).strip(".")
        message = f"{name} {first['ctx']['fault']}".strip()
    elif kind == "json_invalid":
        name = ""  # the place is a number of characters
        message = f"the body cannot be read as JSON: {first['ctx']['error']}"
    elif kind == "extra_forbidden":
        *around, extra = first["loc"][1:]
        name = ".".join([*(str(part) for part in around if _is_place(part)), cut(str(extra))])
        message = f"{name} is not a parameter of this endpoint: leave it out"
    elif not name:
        message = "give a JSON object, with Content-Type application/json"
    elif kind == "missing":
        message = f"{name} is missing"
    else:
        message = f"{name} is {shown(first.get('input'))}: {first['msg'].lower()}"
    return response(400, problem(400, message, param=name or None))


def _is_place(part: int | str) -> bool:
    """Whether a part of an error's location is in the body, rather than the name of a type."""
    return isinstance(part, int) or (part.isidentifier() and part != "str")


_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = MAX_SHOWN
_short.maxlevel = 3


def shown(value: Any) -> str:
    """A value for a message: on one line, and shortened if it is long."""
    return cut(_short.repr(value))


def cut(text: str, most: int = MAX_SHOWN) -> str:
    """A text for a message: shortened if it is long."""
    return text if len(text) <= most else text[: most - 1] + "…"
