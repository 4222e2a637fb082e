"""The connections of a server: their phases, their time limits, and which is closed to make room.

A request is *incomplete* until its header and body have arrived. A client that sends a request
slowly, or never to its end, occupies a file of the process. It needs no key for this, and the
application does not see it. So each phase has a time limit, and the number of connections a bound.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from http import HTTPStatus
from typing import Any

import h11
import psutil
from uvicorn.protocols.http.h11_impl import H11Protocol

from baco.errors import BacoError
from baco.serve import errors
from baco.serve.settings import Settings

# Seconds for which an incomplete request is not closed to make room.
PATIENCE = 1.0
# Files that the process may open besides connections: pages, pipes to the process that renders
# templates, and files that libraries open on first use.
SPARE_FILES = 64
MIN_CONNECTIONS, MAX_INCOMPLETE = 8, 1024
NO_FILE_LIMIT = 2**16


class Phase(StrEnum):
    """What a connection waits for."""

    HEADER = "header"  # the header of its first request, or the rest of a later one
    BODY = "body"  # the rest of a request, which may already be answered
    ANSWER = "answer"  # the application
    IDLE = "idle"  # the next request
    CLOSING = "closing"  # the client, to read the last bytes


_INCOMPLETE = (Phase.HEADER, Phase.BODY)


class Connection(H11Protocol):
    """uvicorn's connection, with time limits.

    Args:
        connections: all connections of the server.
        address: of the other end.
        given: uvicorn's arguments for protocols.
    """

    def __init__(self, connections: "Connections", address: str, **given: Any) -> None:
        super().__init__(**given)
        self.phase, self.address = Phase.HEADER, address
        self._connections = connections
        self._received = self._lost = False
        self._deadline = self._connections.deadline(self, self._expire)
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.phase is Phase.CLOSING:  # it was closed before it was made
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost = True
        _cancel(self._deadline)
        _cancel(self._stalled)
        self._connections.remove(self)

    def data_received(self, data: bytes) -> None:
        self._received = True
        super().data_received(data)
        self._update_phase()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_phase()

    def pause_writing(self) -> None:
        """Start the time limit of a client that does not read what is sent."""
        super().pause_writing()
        seconds = self._connections.settings.body_timeout
        self._stalled = self.loop.call_later(seconds, self.close_now, "stalled")

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stalled)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(400, "this is not an HTTP/1.1 request that the server can read")

    def close_now(self, reason: str) -> None:
        """Close at once."""
        self._connections.closed[reason] += 1
        if self._received and self.phase in _INCOMPLETE:
            self._refuse(408, "the request was incomplete, and others needed its place")
        if self.transport is not None:
            self.transport.abort()
        self._set_phase(Phase.CLOSING)

    def _update_phase(self) -> None:
        """Set the phase that follows from the state of the protocol."""
        theirs = self.conn.their_state
        if self.transport.is_closing():
            self._set_phase(Phase.CLOSING)
        elif theirs is h11.SEND_BODY:
            self._set_phase(Phase.BODY)
        elif theirs is not h11.IDLE:
            self._set_phase(Phase.ANSWER)
        elif self.cycle is None or self.conn.trailing_data[0]:
            self._set_phase(Phase.HEADER)
        else:
            self._set_phase(Phase.IDLE)

    def _set_phase(self, phase: Phase) -> None:
        if phase is not self.phase and not self._lost:
            before, self.phase = self.phase, phase
            _cancel(self._deadline)
            self._deadline = self._connections.deadline(self, self._expire)
            self._connections.phase_changed(self, before)

    def _expire(self) -> None:
        """Close the connection: the time limit of its phase is over."""
        if self.phase not in _INCOMPLETE or not self._received:
            self.close_now(f"{self.phase}_timeout")
            return
        self._connections.closed[f"{self.phase}_timeout"] += 1
        seconds = self._connections.seconds(self.phase)
        self._refuse(408, f"the request's {self.phase} did not arrive within {seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer instead of the application if it has not answered yet, then close."""
        state = self.conn.our_state
        if state in (h11.IDLE, h11.SEND_RESPONSE):
            response = errors.response(
                status, errors.problem(status, message), {"Connection": "close"}
            )
            body = bytes(response.body)
            if state is h11.SEND_RESPONSE:  # the application is waiting for the body
                self.scope["state"]["refused"] = status
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                body = b"" if self.scope["method"] == "HEAD" else body
            phrase = HTTPStatus(status).phrase.encode()
            head = h11.Response(status_code=status, headers=response.raw_headers, reason=phrase)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._set_phase(Phase.CLOSING)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Connections:
    """All open connections of a server.

    Attributes:
        settings: with the limits.
        most: how many may be open.
        most_incomplete: how many of them may have an incomplete request.
        closed: connections that the server closed, by reason.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.most = settings.max_connections or connection_limit()
        self.most_incomplete = settings.max_incomplete or min(
            MAX_INCOMPLETE, max(1, self.most // 2)
        )
        self.closed: Counter[str] = Counter()
        # The time at which each entered the phase, longest ago first.
        self._incomplete: dict[Connection, float] = {}
        self._idle: dict[Connection, float] = {}
        self._answered: dict[Connection, float] = {}
        self._closing: dict[Connection, float] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, (self._incomplete, self._idle, self._answered, self._closing)))

    def counts(self) -> dict[str, int]:
        """How many connections are in each phase."""
        phases = (self._incomplete, self._idle, self._answered, self._closing)
        counts = Counter(connection.phase for phase in phases for connection in phase)
        return {str(phase): counts[phase] for phase in Phase}

    @property
    def crowded(self) -> bool:
        """Whether all connections but those kept for short requests wait for answers."""
        return len(self._answered) > max(1, self.most - max(1, self.most // 8))

    async def wait_for_room(self) -> None:
        """Wait until one more connection may be opened, and close another one if necessary.

        The longest idle one is closed first; else the one whose request has been incomplete
        longest, but not within its first ``PATIENCE`` seconds, so that many clients that connect
        at once are served one after another.
        """
        while True:
            self._changed.clear()
            full = len(self) - len(self._closing) >= self.most
            oldest, since = next(iter(self._incomplete.items()), (None, 0.0))
            wait = None if oldest is None else since + PATIENCE - self._now()
            if full and self._idle:
                next(iter(self._idle)).close_now("room")
            elif not full and len(self._incomplete) < self.most_incomplete:
                if len(self) < self.most:
                    return
                await self._changed.wait()
            elif oldest is not None and wait is not None and wait <= 0:
                oldest.close_now("room")
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)

    def close_one(self) -> None:
        """Close the longest idle or incomplete connection: the process has no files left."""
        for connection in [*self._idle, *self._incomplete][:1]:
            connection.close_now("room")

    def accept(self, connection: Connection) -> None:
        """Add a connection whose request is incomplete."""
        self._bound_address(connection)
        self._incomplete[connection] = self._now()

    def phase_changed(self, connection: Connection, before: Phase) -> None:
        """Take note of a connection's new phase."""
        phase = connection.phase
        if before in _INCOMPLETE and phase in _INCOMPLETE:
            return  # it keeps its place in the order
        self._discard(connection)
        if phase in _INCOMPLETE:
            self.accept(connection)
        elif phase is Phase.IDLE:
            self._idle[connection] = self._now()
        elif phase is Phase.ANSWER:
            self._answered[connection] = self._now()
        else:
            self._closing[connection] = self._now()
        self._changed.set()

    def remove(self, connection: Connection) -> None:
        """Take note of a closed connection."""
        self._discard(connection)
        self._changed.set()

    def seconds(self, phase: Phase) -> float | None:
        """The time limit of a phase; None for answers, which have limits of their own."""
        if phase is Phase.ANSWER:
            return None
        header = phase is Phase.HEADER
        return self.settings.header_timeout if header else self.settings.body_timeout

    def deadline(
        self, connection: Connection, expire: Callable[[], None]
    ) -> asyncio.TimerHandle | None:
        """Start the timer of a connection's phase."""
        seconds = self.seconds(connection.phase)
        return None if seconds is None else connection.loop.call_later(seconds, expire)

    def _bound_address(self, connection: Connection) -> None:
        most = self.settings.max_incomplete_per_address
        if most is None or self.settings.trusts(connection.address):
            return
        same = [other for other in self._incomplete if other.address == connection.address]
        if len(same) >= most:
            same[0].close_now("address")

    def _discard(self, connection: Connection) -> None:
        for phase in (self._incomplete, self._idle, self._answered, self._closing):
            phase.pop(connection, None)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def connection_limit() -> int:
    """How many connections this process may open under the operating system's limit on files.

    Raises:
        BacoError: the limit is too low.
    """
    try:
        import resource
    except ImportError:  # on Windows, which sets no such limit
        return NO_FILE_LIMIT
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return NO_FILE_LIMIT
    taken = psutil.Process().num_fds() + SPARE_FILES
    if most - taken < MIN_CONNECTIONS:
        raise BacoError(
            f"this process may open {most} files and needs {taken + MIN_CONNECTIONS}: "
            "raise ulimit -n"
        )
    return min(most - taken, NO_FILE_LIMIT)
