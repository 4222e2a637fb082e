"""What every request passes: the ledger that numbers and logs it, the gate that lets it in.

Both are plain ASGI, so that a client's going away reaches the endpoints.
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
from baco.text.control_characters import escaped, json_line

log = logging.getLogger("baco.serve")
access = logging.getLogger("baco.access")

# The page asks for a key by itself, and a load balancer has none.
OPEN = ("/", "/health")
OPEN_FOLDER = "/page/"
# Of messages that a log remembers to have told.
MOST_KINDS = 1000
# Of a length that is read at all.
MOST_DIGITS = 20
# Of an address: proxies send what they like.
MOST_ADDRESS = 100


def log_to_streams() -> None:
    """To standard output a line of JSON for every request, to standard error what goes wrong."""
    lines, faults = _AccessHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    faults.setFormatter(_Escaped("%(asctime)s %(levelname)s %(message)s"))
    # Whatever clients can bring about again and again must not fill the disk.
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
    """Standard output, which may be a file on a full disk: the server goes on without it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        log.error("the access log cannot be written: %s", sys.exc_info()[1])


class _Escaped(logging.Formatter):
    """Control characters of clients' texts as escapes, since a terminal may show the log."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class RepeatFilter(logging.Filter):
    """Lets one message of a kind through in a while, with how many were left out since the last.

    Of a kind are messages that begin with the same line before their values are filled in, and tell
    of the same type of exception.

    Args:
        seconds: how long a while is.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._told: dict[tuple[object, ...], tuple[float, int]] = {}  # when, and left out since

    def filter(self, record: logging.LogRecord) -> bool:
        fault = record.exc_info[0] if record.exc_info else None
        kind = (record.name, record.levelno, str(record.msg).partition("\n")[0], fault)
        now = time.monotonic()
        since, left_out = self._told.pop(kind, (now - self._seconds, 0))
        if now - since < self._seconds:
            self._told[kind] = since, left_out + 1
            return False
        if len(self._told) >= MOST_KINDS:
            self._told.pop(next(iter(self._told)))
        self._told[kind] = now, 0
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} more like this in the meantime)"
            record.args = None
        return True


class AccessLog:
    """Numbers every request (X-Request-Id), counts it and writes it into the access log.

    Endpoints add to ``request.state.entry`` what they know; prompts are no part of it unless the
    server is told so.
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
            "client": client[0][:MOST_ADDRESS] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": errors.CLIENT_GONE,
        }
        state = scope.setdefault("state", {})
        state["entry"] = entry
        scope = _plain(scope)

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


def _plain(scope: Scope) -> Scope:
    """A request as the application is to see it.

    HEAD is GET without the body, which uvicorn leaves out. Parts of pages are not worth asking for,
    and what answers a wrong range has no shape of OpenAI's; a server may ignore all ranges.
    """
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    headers = [header for header in scope["headers"] if header[0] != b"range"]
    return {**scope, "method": method, "headers": headers}


class Auth:
    """Asks for a key, stops bodies that are too large, and answers 500 where the app breaks."""

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
            told = errors.problem(401, "give an API key of this server as a bearer token")
            return errors.response(401, told, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and (len(length) > MOST_DIGITS or int(length) > self._most):
            return errors.response(413, errors.problem(413, self._too_large()))
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _too_large(self) -> str:
        return f"the body is too large: this server reads at most {self._most} bytes"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
