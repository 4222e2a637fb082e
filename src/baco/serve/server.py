"""Runs uvicorn on a socket, with a bound on connections and a shutdown that finishes requests."""

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

from baco.serve.connections import Connection, Connections
from baco.serve.engine_thread import EngineThread

log = logging.getLogger("baco.serve")

# Seconds that clients have to read the last bytes before the process ends.
LAST_BYTES = 5
# Seconds until the next try where a connection could not be accepted.
ACCEPT_AGAIN = 0.1


class Server(uvicorn.Server):
    """Serves an app. After SIGTERM or SIGINT it refuses new requests and finishes the open ones.

    A second signal ends it at once.

    Args:
        app: from `create_app`.
        grace: seconds that open requests have after the signal.
        started: called once requests are accepted.
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
        self._engine_thread: EngineThread = app.state.engine_thread
        self._connections: Connections = app.state.connections
        self._grace, self._tell_started = grace, started
        self._signalled: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the server; unlike uvicorn's own, it accepts connections only up to the limits."""
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
                # The client disconnected, or a library opened more files than were set aside.
                log.warning("cannot accept a connection (%s)", error.strerror)
                self._connections.close_one()
                await asyncio.sleep(ACCEPT_AGAIN)
                continue
            try:
                await self._connections.wait_for_room()
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
            await asyncio.sleep(0)  # serve existing connections first

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: connection, accepted)
        except OSError:
            accepted.close()
            self._connections.remove(connection)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def handle_exit(self, _: int, __: FrameType | None) -> None:
        """Unlike uvicorn's own, keep listening, so that new requests are answered with 503."""
        if self._signalled is None:
            self._signalled = time.monotonic()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._signalled is not None:
            self._engine_thread.drain()
            over = time.monotonic() - self._signalled >= self._grace
            if over or not self._engine_thread.open:
                await run_in_threadpool(self._engine_thread.close)
                self.should_exit = True
        return await super().on_tick(counter)
