"""ASGI middleware for all requests: the access log, API keys and the limit on bodies.

It is plain ASGI, so that endpoints notice when a client disconnects.
"""

import hashlib
import hmac
import logging
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baco.serve import errors
from baco.serve.connections import Connections
from baco.serve.metrics import Metrics
from baco.serve.settings import Settings
from baco.text.invalid_characters import escaped, json_line

log = logging.getLogger("baco.serve")
access = logging.getLogger("baco.access")

# No key is needed here: the page asks for one itself, and a load balancer has none.
OPEN = ("/", "/health")
OPEN_FOLDER = "/page/"
# Kinds of messages that the filter of repeated messages remembers.
MAX_KINDS = 1000
# A longer Content-Length is too large, whatever it says.
MAX_LENGTH_DIGITS = 20
# Characters of an address in the log: proxies may send any text.
MAX_ADDRESS = 100


def log_to_streams() -> None:
    """Log requests to standard output as JSON lines, and faults to standard error."""
    lines, faults = _AccessHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    faults.setFormatter(_Escaped("%(asctime)s %(levelname)s %(message)s"))
    # Clients can repeat a fault without limit; the log must not fill the disk.
    faults.addFilter(RepeatFilter())
    for logger, handler in ((access, lines), (log, faults)):
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False
    for name in ("uvicorn", "asyncio"):
        library = logging.getLogger(name)
        library.addHandler(faults)
        library.propagate = False


class _AccessHandler(logging.StreamHandler[TextIO]):
    """Writes to standard output. If that is a file on a full disk, the server continues."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        log.error("the access log cannot be written: %s", sys.exc_info()[1])


class _Escaped(logging.Formatter):
    """Escapes control characters in clients' texts, since a terminal may show the log."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class RepeatFilter(logging.Filter):
    """Lets one message of a kind through per interval, with the number of messages dropped before.

    Messages are of one kind if their first lines are equal before values are filled in, and their
    exceptions have the same type.

    Args:
        seconds: the interval.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self._seconds = seconds
        # Of each kind the time of the last message, and how many were dropped since.
        self._last: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        fault = record.exc_info[0] if record.exc_info else None
        kind = (record.name, record.levelno, str(record.msg).partition("\n")[0], fault)
        now = time.monotonic()
        since, dropped = self._last.pop(kind, (now - self._seconds, 0))
        if now - since < self._seconds:
            self._last[kind] = since, dropped + 1
            return False
        if len(self._last) >= MAX_KINDS:
            self._last.pop(next(iter(self._last)))
        self._last[kind] = now, 0
        if dropped:
            record.msg = f"{record.getMessage()} ({dropped} more like this in the meantime)"
            record.args = None
        return True


class AccessLog:
    """Gives every request an id (X-Request-Id), counts it and writes it to the access log.

    Endpoints add what they know to ``request.state.entry``. Prompts are logged only if the settings
    say so.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        client = scope.get("client")
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": uuid.uuid4().hex,
            "client": client[0][:MAX_ADDRESS] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": errors.CLIENT_GONE,
        }
        state = scope.setdefault("state", {})
        state["entry"] = entry
        scope = _normalised(scope)

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = entry["id"]
            await send(message)

        try:
            await self._app(scope, receive, numbered)
        finally:
            entry["status"] = state.get("refused", entry["status"])
            entry["seconds"] = round(time.perf_counter() - started, 4)
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, entry["status"]).inc()
            self._metrics.seconds.labels(path).observe(entry["seconds"])
            access.info("%s", json_line(entry, default=str))


def _normalised(scope: Scope) -> Scope:
    """The request that the application gets.

    HEAD becomes GET; uvicorn leaves out the body. Ranges are ignored, as a server may: nothing here
    is worth reading in parts, and the error for a wrong range would not have OpenAI's format.
    """
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    headers = [header for header in scope["headers"] if header[0] != b"range"]
    return {**scope, "method": method, "headers": headers}


class Auth:
    """Checks the API key, refuses bodies that are too large, and answers 500 if the app fails."""

    def __init__(self, app: ASGIApp, settings: Settings, connections: Connections) -> None:
        self._app, self._connections = app, connections
        self._keys = [_digest(key) for key in settings.api_keys]
        self._most = settings.max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        started = whole = False
        taken = 0

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        async def limited() -> Message:
            nonlocal taken, whole
            message = await receive()
            taken += len(message.get("body", b""))
            if whole or started:
                return message
            if taken > self._most:
                raise HTTPException(413, self._too_large())
            if message["type"] == "http.disconnect" and scope["method"] == "POST":
                raise HTTPException(errors.CLIENT_GONE, "")
            whole = not message.get("more_body")
            if whole and self._connections.crowded:
                raise HTTPException(503, "the server answers as many requests as it can: try again")
            return message

        try:
            await self._app(scope, limited, watched)
        except Exception as error:
            log.exception("a request failed")
            if started:
                raise
            await errors.response(*errors.problem_of(error))(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> ASGIApp | None:
        is_open = path in OPEN or path.startswith(OPEN_FOLDER)
        if self._keys and not is_open and not self._knows(headers.get("authorization", "")):
            problem = errors.problem(401, "give an API key of this server as a bearer token")
            return errors.response(401, problem, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > MAX_LENGTH_DIGITS or int(length) > self._most):
            return errors.response(413, errors.problem(413, self._too_large()))
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # All keys are compared, each in constant time, so that the time reveals nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _too_large(self) -> str:
        return f"the body is too large: this server reads at most {self._most} bytes"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
