"""The connections of a server: what each waits for, how long, and which is closed to make room.

A request is *incomplete* while its header or its body is on the way. Clients send one at once. A
connection that holds one back keeps a file of the process from others, needs no key to do so, and
the application never sees it. So there are time limits, and bounds on the number of connections.
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

# Seconds that a request may be incomplete, whoever needs the room.
PATIENCE = 1.0
# Files that the process may open beside connections: pages, the process that renders templates, and
# what libraries open when they are first used.
SPARE_FILES = 64
FEWEST, MOST_INCOMPLETE = 8, 1024
WITHOUT_LIMIT = 2**16


class Phase(StrEnum):
    """What a connection waits for."""

    HEADER = "header"  # of its first request, or of a next one that has begun
    BODY = "body"  # the rest of a request, which may be answered already
    ANSWER = "answer"
    IDLE = "idle"  # a next request
    CLOSING = "closing"  # the client takes the last bytes


_INCOMPLETE = (Phase.HEADER, Phase.BODY)


class Connection(H11Protocol):
    """A connection as uvicorn has it, with time limits.

    Args:
        room: all connections of the server.
        address: of the other end.
        given: what uvicorn gives its protocols.
    """

    def __init__(self, room: "Connections", address: str, **given: Any) -> None:
        super().__init__(**given)
        self.phase, self.address = Phase.HEADER, address
        self._room = room
        self._received = self._lost = False
        self._deadline = self._room.deadline(self, self._expire)
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.phase is Phase.CLOSING:  # it had to give way before it was here
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._lost = True
        _cancel(self._deadline)
        _cancel(self._stalled)
        self._room.left(self)

    def data_received(self, data: bytes) -> None:
        self._received = True
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """Called where the client does not take what is sent: that has a time limit, too."""
        super().pause_writing()
        seconds = self._room.settings.body_timeout
        self._stalled = self.loop.call_later(seconds, self.give_way, "stalled")

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stalled)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(400, "this is not an HTTP/1.1 request that the server can read")

    def give_way(self, reason: str) -> None:
        """Close at once."""
        self._room.closed[reason] += 1
        if self._received and self.phase in _INCOMPLETE:
            self._refuse(408, "the request was incomplete, and others needed its place")
        if self.transport is not None:
            self.transport.abort()
        self._enter(Phase.CLOSING)

    def _look(self) -> None:
        """Note what the connection waits for now."""
        theirs = self.conn.their_state
        if self.transport.is_closing():
            self._enter(Phase.CLOSING)
        elif theirs is h11.SEND_BODY:
            self._enter(Phase.BODY)
        elif theirs is not h11.IDLE:
            self._enter(Phase.ANSWER)
        elif self.cycle is None or self.conn.trailing_data[0]:
            self._enter(Phase.HEADER)
        else:
            self._enter(Phase.IDLE)

    def _enter(self, phase: Phase) -> None:
        if phase is not self.phase and not self._lost:
            before, self.phase = self.phase, phase
            _cancel(self._deadline)
            self._deadline = self._room.deadline(self, self._expire)
            self._room.moved(self, before)

    def _expire(self) -> None:
        """What the connection waits for did not come in time."""
        if self.phase not in _INCOMPLETE or not self._received:
            self.give_way(f"{self.phase}_timeout")
            return
        self._room.closed[f"{self.phase}_timeout"] += 1
        seconds = self._room.seconds(self.phase)
        self._refuse(408, f"the request's {self.phase} did not arrive within {seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer in the application's place where it has not yet answered, then close."""
        state = self.conn.our_state
        if state in (h11.IDLE, h11.SEND_RESPONSE):
            told = errors.response(status, errors.problem(status, message), {"Connection": "close"})
            body = bytes(told.body)
            if state is h11.SEND_RESPONSE:  # the application is waiting for the body
                self.scope["state"]["refused"] = status
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                body = b"" if self.scope["method"] == "HEAD" else body
            phrase = HTTPStatus(status).phrase.encode()
            head = h11.Response(status_code=status, headers=told.raw_headers, reason=phrase)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._enter(Phase.CLOSING)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Connections:
    """All open connections of a server.

    Attributes:
        settings: with the limits.
        most: how many there may be.
        most_incomplete: how many of them may have an incomplete request.
        closed: how many were closed from this side, by the reason.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.most = settings.max_connections or file_room()
        self.most_incomplete = settings.max_incomplete or min(MOST_INCOMPLETE, self.most // 2)
        self.closed: Counter[str] = Counter()
        # Since when; in order, so that the one that has been there longest comes first.
        self._incomplete: dict[Connection, float] = {}
        self._idle: dict[Connection, float] = {}
        self._answered: dict[Connection, float] = {}
        self._closing: dict[Connection, float] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, (self._incomplete, self._idle, self._answered, self._closing)))

    def counts(self) -> dict[str, int]:
        """Connections by what they wait for."""
        lists = (self._incomplete, self._idle, self._answered, self._closing)
        found = Counter(connection.phase for each in lists for connection in each)
        return {str(phase): found[phase] for phase in Phase}

    @property
    def crowded(self) -> bool:
        """Are as many requests being answered as may be? The rest is for short ones, as /health."""
        return len(self._answered) > self.most - max(1, self.most // 8)

    async def room(self) -> None:
        """Wait until there is room for one more connection, and close what stands in its way.

        That is the one that was idle longest; else the one whose request was incomplete longest,
        but not before some time: clients that come all at once are served one after another.
        """
        while True:
            self._changed.clear()
            full = len(self) - len(self._closing) >= self.most
            oldest, since = next(iter(self._incomplete.items()), (None, 0.0))
            wait = None if oldest is None else since + PATIENCE - self._now()
            if full and self._idle:
                next(iter(self._idle)).give_way("room")
            elif not full and len(self._incomplete) < self.most_incomplete:
                if len(self) < self.most:
                    return
                await self._changed.wait()
            elif oldest is not None and wait is not None and wait <= 0:
                oldest.give_way("room")
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), wait)

    def shed(self) -> None:
        """Close the connection that is missed least: the process has no files left."""
        for connection in [*self._idle, *self._incomplete][:1]:
            connection.give_way("room")

    def accept(self, connection: Connection) -> None:
        """Count a new connection in."""
        self._bound_address(connection)
        self._incomplete[connection] = self._now()

    def moved(self, connection: Connection, before: Phase) -> None:
        """A connection waits for something else than before."""
        phase = connection.phase
        if before in _INCOMPLETE and phase in _INCOMPLETE:
            return  # it keeps its place in the order
        self._forget(connection)
        if phase in _INCOMPLETE:
            self.accept(connection)
        elif phase is Phase.IDLE:
            self._idle[connection] = self._now()
        elif phase is Phase.ANSWER:
            self._answered[connection] = self._now()
        else:
            self._closing[connection] = self._now()
        self._changed.set()

    def left(self, connection: Connection) -> None:
        """A connection is closed."""
        self._forget(connection)
        self._changed.set()

    def seconds(self, phase: Phase) -> float | None:
        """How long a connection may wait for something; None where others bound that."""
        if phase is Phase.ANSWER:
            return None
        header = phase is Phase.HEADER
        return self.settings.header_timeout if header else self.settings.body_timeout

    def deadline(
        self, connection: Connection, expire: Callable[[], None]
    ) -> asyncio.TimerHandle | None:
        """The timer of what a connection waits for."""
        seconds = self.seconds(connection.phase)
        return None if seconds is None else connection.loop.call_later(seconds, expire)

    def _bound_address(self, connection: Connection) -> None:
        most = self.settings.max_incomplete_per_address
        if most is None or self.settings.trusts(connection.address):
            return
        same = [one for one in self._incomplete if one.address == connection.address]
        if len(same) >= most:
            same[0].give_way("address")

    def _forget(self, connection: Connection) -> None:
        for each in (self._incomplete, self._idle, self._answered, self._closing):
            each.pop(connection, None)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def file_room() -> int:
    """How many connections the operating system lets this process have.

    Raises:
        BacoError: too few.
    """
    try:
        import resource
    except ImportError:  # on Windows, which sets no such limit
        return WITHOUT_LIMIT
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return WITHOUT_LIMIT
    taken = psutil.Process().num_fds() + SPARE_FILES
    if most - taken < FEWEST:
        raise BacoError(
            f"this process may open {most} files and needs {taken + FEWEST}: raise ulimit -n"
        )
    return min(most - taken, WITHOUT_LIMIT)
