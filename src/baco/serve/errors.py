"""Errors as OpenAI's API tells them, so that clients raise the exceptions they have for them."""

from fastapi import Request
from fastapi.responses import JSONResponse

from baco.errors import BacoError
from baco.serve.driver import QueueFullError

RETRY_AFTER_SECONDS = 1


def error_response(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error body in OpenAI's shape; ``kind`` is its ``type``."""
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)


async def on_baco_error(_: Request, error: Exception) -> JSONResponse:
    """400 with the one line that a `BacoError` says."""
    assert isinstance(error, BacoError)
    return error_response(400, str(error), "invalid_request_error")


async def on_queue_full(_: Request, error: Exception) -> JSONResponse:
    """429 with Retry-After, which clients obey by themselves."""
    assert isinstance(error, QueueFullError)
    message = "the server holds as many requests as it may: try again"
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return error_response(429, message, "rate_limit_error", headers)
