"""The process: a socket, uvicorn on it, and an end that lets running requests finish."""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from baco.errors import BacoError
from baco.serve.connections import Connection, Connections
from baco.serve.engine_thread import EngineThread

log = logging.getLogger("baco.serve")

# Seconds that clients have to take what was written before the process ends.
LAST_BYTES = 5
# Seconds before another connection is accepted where one could not be.
ACCEPT_AGAIN = 0.1


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, not listening yet.

    Raises:
        BacoError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Told the protocol, asyncio turns Nagle's algorithm off: it holds small chunks back 40 ms.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise BacoError(
            f"cannot listen at {host}:{port} ({error.strerror}): give another --host or --port"
        ) from error
    return bound


class Server(uvicorn.Server):
    """Serves an app until SIGTERM or SIGINT, then takes no new requests and lets the open ones end.

    A second signal ends at once.

    Args:
        app: made by `create_app`.
        grace: seconds that open requests have after the signal.
        started: called once requests are taken.
    """

    def __init__(self, app: FastAPI, grace: float, started: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            forwarded_allow_ips=list(app.state.connections.settings.trusted_proxies),
            timeout_graceful_shutdown=LAST_BYTES,
        )
        super().__init__(config)
        self._driver: EngineThread = app.state.driver
        self._connections: Connections = app.state.connections
        self._grace, self._tell_started = grace, started
        self._signalled: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Unlike uvicorn's own, accepts connections only where there is room for them."""
        await super().startup(sockets=[])
        for listener in sockets or []:
            listener.setblocking(False)
            listener.listen(self.config.backlog)
            self._start(self._accept(listener))
        self._tell_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:
                # The client has gone, or a library has opened more files than were left for it.
                log.warning("cannot accept a connection (%s)", error.strerror)
                self._connections.shed()
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            try:
                await self._connections.room()
            except asyncio.CancelledError:
                accepted.close()
                raise
            connection = Connection(
                self._connections,
                address[0],
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
                _loop=loop,
            )
            self._connections.accept(connection)
            self._start(self._connect(connection, accepted))
            await asyncio.sleep(0)  # connections that are there go first

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:
            accepted.close()
            self._connections.left(connection)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def handle_exit(self, _: int, __: FrameType | None) -> None:
        """Unlike uvicorn's own, goes on listening, so that newcomers are told to go elsewhere."""
        if self._signalled is None:
            self._signalled = time.monotonic()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._signalled is not None:
            self._driver.drain()
            over = time.monotonic() - self._signalled >= self._grace
            if over or not self._driver.open:
                await run_in_threadpool(self._driver.close)
                self.should_exit = True
        return await super().on_tick(counter)
