"""The process: a socket, uvicorn on it, and an end that lets running requests finish."""

import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from baco.errors import BacoError
from baco.serve.driver import Driver

log = logging.getLogger("baco.serve")

# Seconds that clients have to take what was written before the process ends.
LAST_BYTES = 5


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


def run(app: FastAPI, bound: socket.socket, grace: float, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then take no new requests and let the open ones finish.

    A second signal ends at once.

    Args:
        app: made by `create_app`.
        bound: where to listen.
        grace: seconds that open requests have after the signal.
        started: called once requests are taken.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=LAST_BYTES
    )
    _Server(config, app.state.driver, grace, started).run(sockets=[bound])


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, driver: Driver, grace: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._driver, self._grace, self._tell_started = driver, grace, started
        self._signalled: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell_started()

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
