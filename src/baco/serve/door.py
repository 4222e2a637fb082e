"""What every request passes: the ledger that numbers and logs it, the gate that lets it in.

Both are plain ASGI, so that a client's going away reaches the endpoints.
"""

import hashlib
import hmac
import json
import logging
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baco.serve import errors
from baco.serve.metrics import Metrics
from baco.serve.settings import Settings

log = logging.getLogger("baco.serve")
access = logging.getLogger("baco.access")

# The page asks for a key by itself, and a load balancer has none.
OPEN = ("/", "/health")
OPEN_FOLDER = "/page/"


def log_to_streams() -> None:
    """To standard output a line of JSON for every request, to standard error what goes wrong."""
    for logger, stream, form in (
        (access, sys.stdout, "%(message)s"),
        (log, sys.stderr, "%(asctime)s %(levelname)s %(message)s"),
    ):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Ledger:
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
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": errors.CLIENT_GONE,
        }
        scope.setdefault("state", {})["entry"] = entry

        async def numbered(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = entry["id"]
            await send(message)

        try:
            await self._app(scope, receive, numbered)
        finally:
            entry["seconds"] = round(time.perf_counter() - started, 4)
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, entry["status"]).inc()
            self._metrics.seconds.labels(path).observe(entry["seconds"])
            access.info("%s", json.dumps(entry, ensure_ascii=False, default=str))


class Gate:
    """Asks for a key, stops bodies that are too large, and answers 500 where the app breaks."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
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
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, self._limited(receive), watched)
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
        if length.isdecimal() and int(length) > self._most:
            return errors.response(413, errors.problem(413, self._too_large()))
        return None

    def _knows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # Every key is compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is too large: this server reads at most {self._most} bytes"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
