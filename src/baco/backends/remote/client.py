"""One server over HTTP: connections that are kept, retries, one line for what fails."""

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from baco.errors import BacoError, UpstreamError
from baco.source import Source

log = logging.getLogger("baco")

# Another try may help; any other status is the server's last word.
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
# Nobody is there: what one call finds out is true of all.
_AWAY = frozenset((502, 503))
_LONGEST_MESSAGE = 300


class RefusedError(UpstreamError):
    """A server understood and says no: 4xx."""


class MalformedError(UpstreamError):
    """A server answered, and not as its API does."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        answer: seconds that one call may take once it is connected.
        connect: seconds to connect.
        tries: of one call in all.
        pause: seconds before the second try, doubled from try to try, give or take a half,
        longest: up to this many; a server's Retry-After goes before it, up to `asked`.
    """

    answer: float = 60.0
    connect: float = 5.0
    tries: int = 7
    pause: float = 0.25
    longest: float = 8.0
    asked: float = 60.0

    def __post_init__(self) -> None:
        if not self.answer > 0:
            raise BacoError(f"timeout is {self.answer}: give seconds above 0")
        if self.tries < 1:
            raise BacoError(f"retries is {self.tries - 1}: give 0 or more")

    def before(self, attempt: int, told: float | None) -> float:
        """Seconds to wait before try ``attempt`` (from 1), where a server said ``told``."""
        doubled: float = min(self.pause * 2.0 ** (attempt - 1), self.longest)
        pause = doubled * random.uniform(0.5, 1.5)
        return pause if told is None else max(pause, min(told, self.asked))


class Server:
    """A server of one half's model. All of it runs on one event loop.

    Args:
        half: whose model it runs, for messages.
        url: of its API, ``/v1`` included or not.
        key: bearer token, if it asks for one.
        patience: how long to wait for it.

    Raises:
        BacoError: the URL is none or holds secrets, or the key no header can carry.
    """

    def __init__(self, half: Source, url: str, key: str | None, patience: Patience) -> None:
        self.half, self.url = half, _checked(half, url)
        self.calls = 0
        self._reached = False
        # While it is away one call looks for it and all others wait for what that one finds; once
        # it stayed away for as long as a call is made again, each asks once.
        self._outage: asyncio.Event | None = None
        self._gone = False
        self._patience = patience
        self._headers = {} if key is None else {"Authorization": f"Bearer {_carried(half, key)}"}
        self._trust = httpx.create_ssl_context()
        # A connection each, the one used last first: a pool of many looks through all at each call.
        self._idle: list[httpx.AsyncClient] = []

    @property
    def called(self) -> str:
        """What messages call it."""
        return f"the {self.half} server at {self.url}"

    async def get(self, path: str) -> Any:
        """What stands at a path; errors as for `post`."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request, as JSON.

        Raises:
            RefusedError: the server says no.
            UpstreamError: it cannot be reached, or fails however often it is asked.
        """
        return await self._ask("POST", path, body)

    async def close(self) -> None:
        """Let its connections go."""
        for client in self._idle:
            await client.aclose()
        self._idle.clear()

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        client = self._idle.pop() if self._idle else self._connection()
        try:
            return await client.request(method, self.url + path, json=body)
        finally:
            self._idle.append(client)

    def _connection(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self._patience.answer, connect=self._patience.connect)
        return httpx.AsyncClient(timeout=timeout, headers=self._headers, verify=self._trust)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        mine: asyncio.Event | None = None
        try:
            for attempt in range(1, self._patience.tries + 1):
                if self._outage not in (None, mine):
                    await self._outage.wait()
                self.calls += 1
                reply, problem = await self._tried(method, path, body)
                if reply is not None and reply.status_code not in _AWAY:
                    self._is_there()
                    if reply.status_code not in _PASSING:
                        return self._read(reply)
                elif self._gone:
                    break
                elif self._outage is None:
                    mine = self._outage = asyncio.Event()
                if attempt == 1 < self._patience.tries and not self._reached:
                    log.warning("%s: %s; it is asked again", self.called, problem)
                if attempt < self._patience.tries and self._outage in (None, mine):
                    told = None if reply is None else _retry_after(reply)
                    await asyncio.sleep(self._patience.before(attempt, told))
            else:
                self._gone = self._gone or (mine is not None and self._outage is mine)
        finally:
            if mine is not None and self._outage is mine:
                self._end_outage()
        times = f"{attempt} times" if attempt > 1 else "once"
        raise UpstreamError(f"{self.called} failed {times}: {problem}")

    async def _tried(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[httpx.Response | None, str]:
        """One try: what came, and what is wrong where nothing did or another try may help."""
        try:
            reply = await self._send(method, path, body)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            # It is at work: to ask again would only be more of it.
            raise UpstreamError(
                f"{self.called} gave no answer within {self._patience.answer:g} s: "
                "raise the timeout, or give it less to do"
            ) from error
        except httpx.DecodingError as error:
            raise MalformedError(
                f"{self.called} answers what cannot be decoded: {error}"
            ) from error
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}".rstrip(": ")
        if reply.status_code in _PASSING:
            return reply, f"{reply.status_code} {_message(reply)}"
        return reply, ""

    def _is_there(self) -> None:
        """It answered somebody."""
        self._gone = False
        self._end_outage()

    def _end_outage(self) -> None:
        if self._outage is not None:
            self._outage.set()
            self._outage = None

    def _read(self, reply: httpx.Response) -> Any:
        self._reached = True
        if reply.is_success:
            try:
                return reply.json()
            except (ValueError, RecursionError) as error:
                raise MalformedError(f"{self.called} answered no JSON: is it an API?") from error
        advice = {
            401: f"; put its key into BACO_{self.half.upper()}_API_KEY",
            404: "; is the address right, and the model's name?",
        }.get(reply.status_code, "")
        raise RefusedError(f"{self.called} says {reply.status_code}: {_message(reply)}{advice}")


def _checked(half: Source, url: str) -> str:
    try:
        read = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        read = httpx.URL()
    shown = url.rpartition("@")[2]  # a password is told nowhere
    if read.scheme not in ("http", "https") or not read.host or not 0 < (read.port or 80) < 65_536:
        raise BacoError(
            f"{half}_url is {shown!r}: give an address such as http://127.0.0.1:8000/v1"
        )
    if read.userinfo or read.query:
        raise BacoError(
            f"{half}_url holds a password or a query: give the address alone, and the key in "
            f"BACO_{half.upper()}_API_KEY"
        )
    path = read.path.rstrip("/") or "/v1"
    return str(read.copy_with(path=path, fragment=None))


def _carried(half: Source, key: str) -> str:
    if not key.isascii() or not key.isprintable():
        # The key itself is told nowhere.
        raise BacoError(
            f"the key of the {half} server holds characters that no HTTP header carries: look at "
            f"BACO_{half.upper()}_API_KEY or OPENAI_API_KEY"
        )
    return key


def _message(reply: httpx.Response) -> str:
    """What an error says, in one line."""
    try:
        told: Any = reply.json()
    except (ValueError, RecursionError):
        told = reply.text
    if isinstance(told, dict):
        told = told.get("error", told.get("message", told))
    if isinstance(told, dict):
        told = told.get("message", told)
    return " ".join(str(told).split())[:_LONGEST_MESSAGE]


def _retry_after(reply: httpx.Response) -> float | None:
    """The seconds that a server asks to be left alone."""
    told = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
