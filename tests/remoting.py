"""Pairs on servers: real servers, and proxies in front of them that fail or leave fields out."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baco import Baco
from tests.serving import wait_for


@contextmanager
def listening(app: ASGIApp) -> Iterator[str]:
    """Serve an application on a free port of loopback, without its lifespan; its address."""
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def remote(url: str, pair: Path | str = "demo", **options: Any) -> Iterator[Baco]:
    """Load a pair whose models are on one server, or on one each."""
    given = {"base_url": url, "aligned_url": url} | options
    loaded = Baco.load(str(pair), backend="remote", **given)
    try:
        yield loaded
    finally:
        loaded.close()


def calls(baco: Baco) -> int:
    """Number of calls to the pair's servers so far."""
    backend: Any = baco.backend
    return sum(backend.calls.values())


def wait_until_idle(baco: Baco) -> None:
    """Wait until no task is left on the loop of its backend.

    The loop runs work in order, so everything begun or cancelled before has taken effect.
    """
    backend: Any = baco.backend

    async def tasks() -> int:
        return len(asyncio.all_tasks()) - 1

    wait_for(lambda: asyncio.run_coroutine_threadsafe(tasks(), backend._loop).result() == 0)


class Backing:
    """Forwards requests to a running server, as an application."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=240)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        if scope["method"] == "POST":
            message = await receive()
            body = message["body"]
        headers = {"content-type": "application/json"}
        reply = await self._client.request(
            scope["method"], scope["path"], content=body, headers=headers
        )
        raw = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": reply.status_code, "headers": raw})
        await send({"type": "http.response.body", "body": reply.content})


class Stalling:
    """Forwards requests to an application; completions after `replies` more get no reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.replies = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        completes = scope["path"] == "/v1/completions"
        if not completes or self.replies > 0:
            self.replies -= completes
            await self._app(scope, receive, send)
            return
        while (await receive())["type"] != "http.disconnect":
            pass


class Door:
    """A proxy in front of a server that changes completions requests and their replies.

    Args:
        app: the server.
        change: the body of a completions request → another body, or (status, headers) to reply
            instead.
        strip: a choice of the reply → the choice that is sent on.
    """

    def __init__(
        self,
        app: ASGIApp,
        change: Callable[[dict[str, Any]], dict[str, Any] | tuple[int, dict[str, str]]],
        strip: Callable[[dict[str, Any]], dict[str, Any]] = lambda choice: choice,
    ) -> None:
        self._app, self._change, self._strip = app, change, strip
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/v1/completions":
            await self._app(scope, receive, send)
            return
        body = json.loads(await _whole(receive))
        self.bodies.append(body)
        changed = self._change(body)
        if isinstance(changed, tuple):
            status, headers = changed
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": raw})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "no"}}'})
            return
        data, sent = json.dumps(changed).encode(), False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": data, "more_body": False}

        kept = [(n, v) for n, v in scope["headers"] if n != b"content-length"]
        length = (b"content-length", str(len(data)).encode())
        messages: list[Message] = []

        async def held(message: Message) -> None:
            messages.append(message)

        await self._app({**scope, "headers": [*kept, length]}, again, held)
        await self._reply(messages, send)

    async def _reply(self, messages: list[Message], send: Send) -> None:
        body = json.loads(b"".join(message.get("body", b"") for message in messages[1:]))
        body["choices"] = [self._strip(choice) for choice in body.get("choices", [])]
        data = json.dumps(body).encode()
        headers = [(n, v) for n, v in messages[0]["headers"] if n != b"content-length"]
        length = (b"content-length", str(len(data)).encode())
        await send({**messages[0], "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": data})


async def _whole(receive: Receive) -> bytes:
    body = b""
    while True:
        message: Any = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body"):
            return body
