"""For any bytes that a client sends, the server replies as OpenAI's API does, never with a 5xx."""

import http.client
import json
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from baco import Baco
from baco.serve.request_models import (
    Body,
    ChatRequest,
    CompletionRequest,
    DiversityRequest,
    SchemaRequest,
)
from tests.fuzzing import budget
from tests.serving import WAIT, Served, served

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
DIVERSITY, SCHEMA = "/baco/diversity", "/baco/schema"
PATHS = (
    CHAT,
    COMPLETION,
    DIVERSITY,
    "/v1/models",
    "/v1/models/baco/P-Punc:0.4",
    "/baco/info",
    "/baco/routers",
    "/health",
    "/metrics",
    "/openapi.json",
    "/",
    "/page/index.html",
)
WELL_FORMED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETION: {"prompt": "hi"},
    DIVERSITY: {"texts": ["a cat", "a dog"]},
    SCHEMA: {"json": {"type": "object"}},
}
MODELS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    COMPLETION: CompletionRequest,
    DIVERSITY: DiversityRequest,
    SCHEMA: SchemaRequest,
}
NAMES = {
    path: [*model.model_fields, *model.foreign, *model.aliases] for path, model in MODELS.items()
}
JSON_TYPE = (b"Content-Type", b"application/json")


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@pytest.fixture(scope="module")
def server(demo: Baco) -> Iterator[Served]:
    with served(demo, max_n=2, max_tokens=2, max_body=200_000) as running:
        yield running


def send(
    server: Served, request: bytes, method: str = "GET", *, ends: bool = False
) -> Reply | None:
    """The reply to some bytes; None where the connection is closed without one.

    Args:
        server: to which they are sent.
        request: the bytes.
        method: decides whether a body follows the reply's header.
        ends: nothing more is sent afterwards, which closes the connection if it was no request.
    """
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as connection:
        reply = http.client.HTTPResponse(connection, method=method)
        try:
            connection.sendall(request)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            reply.begin()
            return Reply(reply.status, dict(reply.getheaders()), reply.read())
        except (http.client.HTTPException, OSError):
            assert ends
            return None


def post(server: Served, path: str, body: bytes, *headers: tuple[bytes, bytes]) -> Reply | None:
    return send(server, written("POST", path.encode(), body, *(headers or (JSON_TYPE,))))


def written(method: str, target: bytes, body: bytes, *headers: tuple[bytes, bytes]) -> bytes:
    length = b"Content-Length", str(len(body)).encode()
    lines = [b"%s: %s" % line for line in ((b"Host", b"a"), length, *headers)]
    return b"%s %s HTTP/1.1\r\n%s\r\n\r\n%s" % (method.encode(), target, b"\r\n".join(lines), body)


def holds(reply: Reply | None, method: str = "POST") -> None:
    """Check that a reply is one of OpenAI's API, and not a server error."""
    if reply is None:
        return
    assert 200 <= reply.status < 500, reply
    if reply.status >= 400 and method != "HEAD":
        error = json.loads(reply.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].isprintable()
        assert len(error["message"]) <= 8000  # 1,000 characters, escaped
    elif reply.headers.get("content-type", "").startswith("text/event-stream"):
        *_, last = reply.body.decode().split("\n\n")[:-1]
        assert last == "data: [DONE]" or "error" in json.loads(last.removeprefix("data: "))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No request leaves a traceback in the log."""
    yield
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not faults


LONE = st.sampled_from(["\ud83d", "a\udc00b", "\udfff\ud800"])
TEXTS = st.one_of(
    st.text(max_size=20),
    LONE,
    st.sampled_from(["", "baco", "baco/base", "P-Punc:0.4", "p-punc:0.4", "Base", "word", "text"]),
    st.sampled_from(["P" * 5000, "\x1b[31m", "a\nb", "\u202e", "\0", "P:1e400", "P:nan", "H:-1"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**308, 10**4299, -(10**4000)]),
    st.floats(),
    st.sampled_from([1.0, -1.0, 0.5, 1e308, -0.0]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)
NESTED = st.builds(
    lambda depth, left, right: left * depth + right * depth,
    st.sampled_from([20, 31, 33, 500, 20_000]),
    st.sampled_from(["[", '{"a":']),
    st.sampled_from(["]", "}", ""]),
)


def dumped(value: Any) -> str:
    """JSON, with NaN, Infinity and lone surrogates as Python writes them."""
    return json.dumps(value)


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    """Bodies with wrong values in some fields, repeated fields, and badly encoded texts."""
    fields = [(name, dumped(value)) for name, value in WELL_FORMED[path].items()]
    names = st.one_of(st.sampled_from(NAMES[path]), TEXTS)
    for _ in range(draw(st.integers(0, 3))):
        value = draw(st.one_of(VALUES.map(dumped), VALUES.map(dumped), NESTED))
        fields.insert(draw(st.integers(0, len(fields))), (draw(names), value))
    written = "{" + ",".join(f"{dumped(name)}: {value}" for name, value in fields) + "}"
    if draw(st.integers(0, 4)) == 0:  # the surrogates' own bytes in the place of escapes
        written = written.replace("\\ud83d", "\ud83d").replace("\\udc00", "\udc00")
    return written.encode(errors="surrogatepass")


def fuzz(cases: int) -> settings:
    return settings(max_examples=budget(cases), suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("path", WELL_FORMED)
def test_a_body_of_any_json_is_answered(server: Served, path: str) -> None:
    @fuzz(60)
    @given(bodies(path))
    def answered(body: bytes) -> None:
        holds(post(server, path, body))

    answered()


@pytest.mark.parametrize("path", WELL_FORMED)
def test_a_text_of_any_shape_is_answered_in_each_of_the_fields(server: Served, path: str) -> None:
    """Every field is given texts with lone surrogates and numbers without bounds."""
    texts = ['"\\ud83d"', '["\\ud83d"]', '{"\\ud83d": 1}', '[{"type": "text", "text": "\\ud83d"}]']
    numbers = ["1" + "0" * 4000, "-1e400", "NaN", "[[[[[1e400]]]]]", '{"7": NaN}']
    own = MODELS[path].model_fields
    for at, name in enumerate(NAMES[path]):
        # Fields of other servers share their checks: one value each.
        values = (*texts, *numbers) if name in own else (texts[at % 4], numbers[at % 5])
        for value in values:
            fields = {key: dumped(one) for key, one in WELL_FORMED[path].items()} | {name: value}
            body = "{" + ",".join(f'"{key}": {one}' for key, one in fields.items()) + "}"
            reply = post(server, path, body.encode())
            holds(reply)
            assert reply is not None
            if value in texts:
                assert reply.status == 400
                assert json.loads(reply.body)["error"]["param"].startswith(name)


PATTERN_PARTS = st.sampled_from(
    [*'a.()[]|*+?/^$"\0\\\u00fc', "{2,9}", "{99999}", "\\p{L}", "(?=", "(?i)", "\U0001f469"]
)
GRAMMAR_PARTS = st.sampled_from(
    [*":Ab|()*~&\n%#\\", "start", "::=", '"x"', "/y/", "%json {}", "%import x", "{1,9999}", "<[5]>"]
)
SCHEMA_WORDS = [
    *[
        "type",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "$defs",
        "properties",
        "required",
    ],
    *["items", "prefixItems", "minItems", "maxItems", "pattern", "format", "minimum", "multipleOf"],
    *["additionalProperties", "patternProperties", "maxLength", "string", "object", "array"],
    *["integer", "null", "#", "#/$defs/a", "a", "uuid", "date", "[a-z]{1,9}x"],
]
SCHEMAS = st.recursive(
    st.one_of(LEAVES, st.sampled_from(SCHEMA_WORDS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(SCHEMA_WORDS), inner, max_size=4),
    ),
    max_leaves=12,
)
STRUCTURES = st.one_of(
    st.tuples(st.just("regex"), st.lists(PATTERN_PARTS, max_size=12).map("".join)),
    st.tuples(st.just("grammar"), st.lists(GRAMMAR_PARTS, max_size=15).map(" ".join)),
    st.tuples(
        st.just("grammar"),
        st.lists(GRAMMAR_PARTS, max_size=9).map(" ".join).map("start: {}".format),
    ),
    st.tuples(st.just("json"), SCHEMAS),
    st.tuples(st.just("choice"), st.lists(TEXTS, max_size=4)),
)


@fuzz(80)
@given(st.sampled_from([CHAT, COMPLETION]), STRUCTURES)
@example(CHAT, ("grammar", "root ::= a"))
@example(CHAT, ("json", "[" * 20_000))
def test_a_structure_of_any_kind_is_answered(
    server: Served, path: str, structure: tuple[str, Any]
) -> None:
    note(repr(structure))
    body = WELL_FORMED[path] | {"structured_outputs": dict([structure]), "n": 2}
    holds(post(server, path, dumped(body).encode()))


@fuzz(60)
@given(st.sampled_from(list(WELL_FORMED)), st.data())
def test_a_body_that_is_not_json_gets_a_reply(
    server: Served, path: str, data: st.DataObject
) -> None:
    whole = data.draw(bodies(path))
    cut = data.draw(st.integers(0, len(whole)))
    strange = data.draw(st.one_of(st.binary(max_size=40), st.just(b"\xed\xa0\xbd"), st.just(b"\0")))
    encodings = st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "latin-1"])
    encoded = json.dumps(WELL_FORMED[path]).encode(data.draw(encodings))
    shapes = [whole[:cut], whole[:cut] + strange + whole[cut:], strange, encoded, b"", b"null"]
    holds(post(server, path, data.draw(st.sampled_from(shapes))))


TYPES = (
    b"application/json; charset=utf-16",
    b"APPLICATION/JSON",
    b"application/x+json",
    b"text/plain",
    b"multipart/form-data; boundary=a",
    b"application/x-www-form-urlencoded",
    b"",
    b"/",
    b"\xff",
    b"application/json; charset",
)
TOKENS = st.sampled_from(
    [
        b"Authorization",
        b"X-Forwarded-For",
        b"X-Forwarded-Proto",
        b"Forwarded",
        b"Origin",
        b"Range",
        b"If-None-Match",
        b"If-Modified-Since",
        b"Accept-Encoding",
        b"Accept",
        b"Cookie",
        b"Expect",
        b"Upgrade",
        b"Connection",
        b"Access-Control-Request-Method",
        b"X-Request-Id",
    ]
)
WORTHS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from(
        [
            b"bytes=-1,zz",
            b"bytes=99999999-",
            b"bytes=" + b"0-1," * 2000,
            b"Bearer \xff",
            b"websocket",
            b"upgrade",
            b"100-continue",
            b"[::1",
            b"Thu, 99 Foo",
            b"a" * 5000,
        ]
    ),
)


@fuzz(60)
@given(
    st.sampled_from(PATHS),
    st.sampled_from(TYPES),
    st.lists(st.tuples(TOKENS, WORTHS), max_size=3),
    st.sampled_from([b"a", b"[::1", b"", b"\xff", b"a b", b"a:99999999"]),
)
def test_headers_of_any_value_are_answered(
    server: Served,
    path: str,
    kind: bytes,
    headers: list[tuple[bytes, bytes]],
    host: bytes,
) -> None:
    method = "POST" if path in WELL_FORMED else "GET"
    body = json.dumps(WELL_FORMED.get(path, {})).encode()
    request = written(method, path.encode(), body, (b"Content-Type", kind), *headers)
    request = request.replace(b"Host: a", b"Host: " + host)
    holds(send(server, request, method, ends=True), method)


METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY", "get")
PIECES = st.sampled_from(
    [
        b"%00",
        b"%ed%a0%80",
        b"%ff",
        b"..",
        b"%2e%2e%2f",
        b"/",
        b"//",
        b"a" * 300,
        b"?a=%zz&b=\xff",
        b"#",
        b"%",
        b"baco",
        b"%0d%0a",
        b"*",
        b"http://a",
    ]
)


@fuzz(100)
@given(st.sampled_from(METHODS), st.sampled_from(PATHS), st.lists(PIECES, max_size=3))
@example("HEAD", "/", [])
@example("GET", "/page/", [b"%00"])
@example("GET", "/page/", [b"a" * 300])
def test_targets_of_any_spelling_are_answered(
    server: Served, method: str, path: str, pieces: list[bytes]
) -> None:
    target = path.encode() + b"".join(pieces)
    holds(send(server, written(method, target, b""), method, ends=True), method)


LINES = st.sampled_from(
    [
        b"GET / HTTP/1.1",
        b"POST /v1/completions HTTP/1.1",
        b"GET / HTTP/9.9",
        b"GET /",
        b"PRI * HTTP/2.0",
        b"Host: a",
        b"Content-Length: 3",
        b"Content-Length: -1",
        b"Content-Length: " + b"9" * 5000,
        b"Content-Length: 3, 4",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Expect: 100-continue",
        b": no name",
        b" folded",
        b"A: " + b"a" * 70_000,
        b"",
        b"",
        b"3",
        b"abc",
        b"0",
        b"zz",
        b"f" * 40,
        b"{}",
    ]
)


@fuzz(100)
@given(st.lists(st.one_of(LINES, LINES, LINES, st.binary(max_size=30)), max_size=12))
def test_bytes_that_are_not_a_request_get_a_reply(server: Served, lines: list[bytes]) -> None:
    holds(send(server, b"\r\n".join(lines), ends=True))


@fuzz(40)
@given(st.lists(st.sampled_from([b"zz", b"f" * 40, b"-1", b"3\r\nabc", b"0\r\n", b"3;a=b\r\nab"])))
def test_chunks_of_any_kind_are_answered(server: Served, chunks: list[bytes]) -> None:
    """Also where the reply has been sent already: the body is not read for an unknown path."""
    for path in (b"/v1/completions", b"/v2"):
        head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" % path
        body = b"\r\n".join(chunks)
        request = head + b"Transfer-Encoding: chunked\r\n\r\n" + body
        holds(send(server, request, ends=True))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[" * 100_000, "the body cannot be read as JSON: it is nested too deeply"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "a is nested too deeply: at most 32 levels"),
        (b'{"n": ' + b"1" * 5000 + b"}", "it holds a number of too many digits"),
        (b'{"a": "\xff"}', "the body cannot be read as JSON: it is not valid UTF-8"),
        (b'{"messages": [', "the body cannot be read as JSON: "),
        (b"{", "the body cannot be read as JSON: "),
        (
            b'{"n": ' + b"1" * 4000 + b', "messages": [{"role": "user", "content": "a"}]}',
            "of answers is 1",
        ),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_body_that_cannot_be_parsed_is_refused_with_the_reason(
    server: Served, body: bytes, message: str
) -> None:
    headers = {"Content-Type": "application/json"}
    with server.client as client:
        answer = client.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] in (None, "a")
