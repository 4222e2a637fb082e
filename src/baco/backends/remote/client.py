"""One server over HTTP: kept connections, retries, and errors in one line."""

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

# Statuses after which a retry may help; others are final.
_RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
# Statuses of a server that is away: what one call finds is true of all calls.
_AWAY = frozenset((502, 503))
_MAX_MESSAGE = 300


class RefusedError(UpstreamError):
    """A server refused a request: 4xx."""


class MalformedError(UpstreamError):
    """A server answered with something that its API does not return."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Time limits and retries of calls.

    Attributes:
        answer: seconds that one call may take once it is connected.
        connect: seconds to connect.
        tries: of one call in all.
        pause: seconds before the second try, doubled at every try, with a jitter of 50%.
        max_pause: seconds of a pause at most, unless the server's Retry-After is longer.
        max_retry_after: seconds of a Retry-After that are waited at most.
    """

    answer: float = 60.0
    connect: float = 5.0
    tries: int = 7
    pause: float = 0.25
    max_pause: float = 8.0
    max_retry_after: float = 60.0

    def __post_init__(self) -> None:
        if not self.answer > 0:
            raise BacoError(f"timeout is {self.answer}: give seconds above 0")
        if self.tries < 1:
            raise BacoError(f"retries is {self.tries - 1}: give 0 or more")

    def pause_after(self, attempt: int, retry_after: float | None) -> float:
        """Seconds to wait after try ``attempt``, from 1; ``retry_after`` is the server's header."""
        doubled: float = min(self.pause * 2.0 ** min(attempt - 1, 60), self.max_pause)
        pause = doubled * random.uniform(0.5, 1.5)
        if retry_after is None:
            return pause
        return max(pause, min(retry_after, self.max_retry_after))


class Server:
    """A server of one model of the pair. All of it runs on one event loop.

    Args:
        source: base or aligned, for messages.
        url: of its API, with or without ``/v1``.
        key: bearer token, if it needs one.
        patience: time limits and retries.

    Raises:
        BacoError: the URL is invalid or holds secrets, or the key is invalid in a header.
    """

    def __init__(self, source: Source, url: str, key: str | None, patience: Patience) -> None:
        self.source, self.url = source, _checked_url(source, url)
        self.calls = 0
        self._reached = False
        # A circuit breaker: while the server is away, one call retries and all others wait for its
        # result. Once that call has used up its tries, every call makes a single attempt.
        self._outage: asyncio.Event | None = None
        self._gone = False
        self._patience = patience
        self._headers = (
            {} if key is None else {"Authorization": f"Bearer {_checked_key(source, key)}"}
        )
        self._trust = httpx.create_ssl_context()
        # One client per connection, the last used first: a pool of many searches all at each call.
        self._idle: list[httpx.AsyncClient] = []

    @property
    def called(self) -> str:
        """Its name in messages."""
        return f"the {self.source} server at {self.url}"

    async def get(self, path: str) -> Any:
        """The JSON at a path; errors as for `post`."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request, as JSON.

        Raises:
            RefusedError: the server refuses it.
            UpstreamError: the server cannot be reached, or fails at every try.
        """
        return await self._call("POST", path, body)

    async def close(self) -> None:
        """Close its connections."""
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

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        own_outage: asyncio.Event | None = None
        try:
            for attempt in range(1, self._patience.tries + 1):
                if self._outage not in (None, own_outage):
                    await self._outage.wait()
                self.calls += 1
                reply, problem = await self._attempt(method, path, body)
                if reply is not None and reply.status_code not in _AWAY:
                    self._mark_reached()
                    if reply.status_code not in _RETRIED:
                        return self._read(reply)
                elif self._gone:
                    break
                elif self._outage is None:
                    own_outage = self._outage = asyncio.Event()
                if attempt == 1 < self._patience.tries and not self._reached:
                    log.warning("%s: %s; retrying", self.called, problem)
                if attempt < self._patience.tries and self._outage in (None, own_outage):
                    retry_after = None if reply is None else _retry_after(reply)
                    await asyncio.sleep(self._patience.pause_after(attempt, retry_after))
            else:
                self._gone = self._gone or (own_outage is not None and self._outage is own_outage)
        finally:
            if own_outage is not None and self._outage is own_outage:
                self._end_outage()
        times = f"{attempt} times" if attempt > 1 else "once"
        raise UpstreamError(f"{self.called} failed {times}: {problem}")

    async def _attempt(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[httpx.Response | None, str]:
        """One try: the reply, and the problem where there is none or a retry may help."""
        try:
            reply = await self._send(method, path, body)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            # No retry: the server is busy with the call.
            raise UpstreamError(
                f"{self.called} gave no answer within {self._patience.answer:g} s: "
                "raise the timeout, or lower the load"
            ) from error
        except httpx.DecodingError as error:
            raise MalformedError(
                f"{self.called} sent a body that cannot be decoded: {error}"
            ) from error
        except httpx.TransportError as error:
            return None, f"{type(error).__name__}: {error}".rstrip(": ")
        if reply.status_code in _RETRIED:
            return reply, f"{reply.status_code} {_message(reply)}"
        return reply, ""

    def _mark_reached(self) -> None:
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
                raise MalformedError(
                    f"{self.called} answered without JSON: is it an API?"
                ) from error
        advice = {
            401: f"; put its key into BACO_{self.source.upper()}_API_KEY",
            404: "; is the address right, and the model's name?",
        }.get(reply.status_code, "")
        raise RefusedError(f"{self.called} answers {reply.status_code}: {_message(reply)}{advice}")


def _checked_url(source: Source, url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        parsed = httpx.URL()
    shown = url.rpartition("@")[2]  # without a password
    is_http = parsed.scheme in ("http", "https") and parsed.host
    if not is_http or not 0 < (parsed.port or 80) < 65_536:
        raise BacoError(
            f"{source}_url is {shown!r}: give an address such as http://127.0.0.1:8000/v1"
        )
    if parsed.userinfo or parsed.query:
        raise BacoError(
            f"{source}_url holds a password or a query: give the address alone, and the key in "
            f"BACO_{source.upper()}_API_KEY"
        )
    path = parsed.path.rstrip("/") or "/v1"
    return str(parsed.copy_with(path=path, fragment=None))


def _checked_key(source: Source, key: str) -> str:
    if not key.isascii() or not key.isprintable():
        # The message must not contain the key.
        raise BacoError(
            f"the key of the {source} server holds characters that no HTTP header can hold: check "
            f"BACO_{source.upper()}_API_KEY or OPENAI_API_KEY"
        )
    return key


def _message(reply: httpx.Response) -> str:
    """The message of an error reply, in one line."""
    try:
        content: Any = reply.json()
    except (ValueError, RecursionError):
        content = reply.text
    if isinstance(content, dict):
        content = content.get("error", content.get("message", content))
    if isinstance(content, dict):
        content = content.get("message", content)
    return " ".join(str(content).split())[:_MAX_MESSAGE]


def _retry_after(reply: httpx.Response) -> float | None:
    """The seconds of a Retry-After header; None without one."""
    value = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
