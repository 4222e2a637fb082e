"""Servers whose replies do not have the shape of their API: any such reply is one error line."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from baco import Baco, BacoError
from baco.backends.remote.client import Patience, Server
from baco.backends.remote.probe import probe
from baco.backends.remote.wire import Names
from baco.errors import UpstreamError
from tests.fuzzing import budget
from tests.remoting import listening, remote
from tests.serving import PROMPT, served

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
# Where an answer is spoilt, with what, and at which call.
SPOILT = st.tuples(st.integers(0, 10**6), ANYTHING, st.integers(0, 20))


def spoil(reply: Any, seed: int, value: Any) -> Any:
    """A copy of a reply with ``value`` at a random place of it, or with a field left out."""
    chance = random.Random(seed)
    if not isinstance(reply, dict | list) or not reply or chance.random() < 0.15:
        return value
    if isinstance(reply, list):
        at = chance.randrange(len(reply))
        return [*reply[:at], spoil(reply[at], chance.randrange(10**6), value), *reply[at + 1 :]]
    name = chance.choice(sorted(reply))
    kept = {key: each for key, each in reply.items() if key != name}
    if chance.random() < 0.15:
        return kept  # nothing in its place
    return kept | {name: spoil(reply[name], chance.randrange(10**6), value)}


class Spoiler:
    """A proxy in front of a server that spoils one of its replies."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=240)
        self._known: dict[tuple[str, bytes], bytes] = {}
        self._spoilt: tuple[int, Any, int] | None = None
        self._calls = 0

    def next(self, spoilt: tuple[int, Any, int] | None) -> None:
        """Set which of the next calls gets a spoilt reply, and how."""
        self._spoilt, self._calls = spoilt, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body = bytes(message.get("body", b""))
        request = (scope["path"], body)
        if request not in self._known:
            headers = {"content-type": "application/json"}
            reply = await self._client.request(
                scope["method"], scope["path"], content=body, headers=headers
            )
            self._known[request] = reply.content
        content = self._known[request]
        if self._spoilt is not None and self._calls == self._spoilt[2]:
            content = json.dumps(spoil(json.loads(content), *self._spoilt[:2])).encode()
        self._calls += 1
        raw = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await send({"type": "http.response.body", "body": content})


@pytest.fixture(scope="module")
def spoiler(demo: Baco) -> Iterator[tuple[Spoiler, str]]:
    with served(demo) as server, listening(app := Spoiler(server.url)) as url:
        yield app, url


@pytest.fixture(scope="module")
def remote_pair(spoiler: tuple[Spoiler, str]) -> Iterator[Baco]:
    with remote(spoiler[1]) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def names(demo: Baco) -> Names:
    return Names(demo.pair)


@settings(max_examples=budget(60))
@given(SPOILT)
def test_with_a_spoilt_reply_a_start_succeeds_or_is_one_line(
    spoiler: tuple[Spoiler, str], demo: Baco, names: Names, spoilt: tuple[int, Any, int]
) -> None:
    spoiler[0].next(spoilt)

    async def start() -> None:
        server = Server("aligned", spoiler[1], None, Patience(tries=1))
        try:
            await probe(server, demo.pair, names, "baco/aligned")
        finally:
            await server.close()

    message = ""
    try:
        asyncio.run(start())
    except (BacoError, UpstreamError) as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@settings(max_examples=budget(60))
@given(SPOILT, st.sampled_from(["P-Punc:0.4", "H:1.5", "FC", "Aligned"]), st.sampled_from([0, 1]))
def test_with_a_spoilt_reply_an_answer_succeeds_or_is_one_line(
    spoiler: tuple[Spoiler, str],
    remote_pair: Baco,
    spoilt: tuple[int, Any, int],
    router: str,
    temperature: int,
) -> None:
    spoiler[0].next((*spoilt[:2], spoilt[2] % 4))
    sampling: dict[str, Any] = {"router": router, "temperature": temperature, "seed": 3}
    (answer,) = remote_pair.generate(PROMPT, max_tokens=8, **sampling)
    if answer.error is not None:
        assert len(answer.error.splitlines()) == 1
        assert "failed in this process" not in answer.error


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"<html>", "answered without JSON: is it an API"),
        (b"[" * 100_000, "answered without JSON: is it an API"),
        (b"\xff\xfe{", "answered without JSON: is it an API"),
        (b"3", "answered without a completion: 3 where an object belongs"),
        (
            b'{"choices": "none"}',
            'answered without a completion: "none" where a list belongs',
        ),
        (
            b'{"choices": [{"text": "a", "token_ids": [-3]}]}',
            "answered without a completion: -3 where a whole number belongs",
        ),
        (b'{"choices": []}', "answers without choices: is it a completions API"),
        (
            b'{"choices": [{"text": "a", "token_ids": [5], "logprobs": {"tokens": ["token_id:5"], '
            b'"token_logprobs": [7.25]}}]}',
            "answered without a completion: 7.25 where a log-probability belongs",
        ),
    ],
    ids=str,
)
def test_a_reply_that_is_not_a_completion_is_named(reply: bytes, message: str) -> None:
    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        body = b'{"data": [{"id": "some"}]}' if scope["path"].endswith("models") else reply
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    with listening(page) as url, pytest.raises(BacoError, match=message), remote(url):
        pass
