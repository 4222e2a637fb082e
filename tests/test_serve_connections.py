"""Connections with incomplete requests: they are closed, and other clients are still answered."""

import json
import logging
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from baco import Baco, BacoError
from baco.serve import connections
from baco.serve.connections import connection_limit
from baco.serve.middleware import RepeatFilter
from baco.serve.settings import Settings
from tests.serving import (
    PROMPT,
    ROUTER,
    WAIT,
    Served,
    chat,
    connect,
    process,
    served,
    wait_for,
    waiting_router,
)

PARTIAL_HEADER = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-"
PARTIAL_BODY = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"prompt": "'
)
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"


def rest(connection: socket.socket) -> bytes:
    """What a server sends until it closes a connection."""
    received = b""
    try:
        while piece := connection.recv(65_536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def error_of(reply: bytes) -> tuple[int, str]:
    """Status and message of a reply that is an error in OpenAI's shape."""
    head, _, body = reply.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), error["message"]


def healthy(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=WAIT).status_code == 200


def settles(server: Served) -> None:
    """Wait until no connection is left."""
    wait_for(lambda: not len(server.connections))


def hasten(server: Served) -> None:
    """Shorten every timeout of the open connections."""
    room = server.connections
    room.settings = replace(room.settings, header_timeout=0.2, body_timeout=0.2)


def test_a_header_must_arrive_in_time(demo: Baco) -> None:
    with served(demo, header_timeout=WAIT) as server:
        server.server.config.timeout_keep_alive = WAIT
        with connect(server.url, HEALTH) as partial:
            received = b""
            while not received.endswith(b'{"status":"ok"}'):
                received += partial.recv(65_536)
            wait_for(lambda: server.connections.counts()["idle"])
            hasten(server)
            with connect(server.url) as silent:
                assert rest(silent) == b""
            partial.sendall(PARTIAL_HEADER)
            expected = 408, "the request's header did not arrive within 0.2 s"
            assert error_of(rest(partial)) == expected
        settles(server)
        assert server.connections.closed == {"header_timeout": 2}
        server.connections.settings = Settings()
        name = 'baco_connections_closed_total{reason="header_timeout"}'
        assert server.metric(name) == 2


def test_a_body_must_arrive_in_time_and_one_that_does_not_is_logged(demo: Baco) -> None:
    with served(demo, header_timeout=WAIT, body_timeout=0.2) as server:
        with connect(server.url, PARTIAL_BODY) as partial:
            expected = 408, "the request's body did not arrive within 0.2 s"
            assert error_of(rest(partial)) == expected
        settles(server)
        wait_for(server.log)
        assert [entry["status"] for entry in server.log()] == [408]
        assert not server.engine_thread.open


@pytest.mark.parametrize(
    "sent", [PARTIAL_HEADER, PARTIAL_BODY, PARTIAL_BODY.replace(b"/v1/", b"/v2/")]
)
def test_bytes_now_and_then_do_not_hold_a_request_open(demo: Baco, sent: bytes) -> None:
    """Nor if the request is answered before its body has arrived, as one for an unknown path is."""
    with served(demo, header_timeout=0.3, body_timeout=0.3) as server:
        with connect(server.url, sent) as dripping:
            ended = threading.Event()

            def drip() -> None:
                while not ended.wait(0.02):
                    try:
                        dripping.sendall(b" ")
                    except OSError:
                        return

            thread = threading.Thread(target=drip)
            thread.start()
            reply = rest(dripping)
            ended.set()
            thread.join()
        assert reply[:12] in (b"HTTP/1.1 408", b"HTTP/1.1 404", b"")
        settles(server)


def test_a_client_that_disconnects_in_its_body_is_logged_as_gone(demo: Baco) -> None:
    with served(demo) as server:
        connect(server.url, PARTIAL_BODY).close()
        wait_for(server.log)
        assert server.log()[0]["status"] == 499


def test_a_request_may_come_in_pieces(demo: Baco) -> None:
    body = json.dumps({"prompt": "For dinner, I", "router": ROUTER, "max_tokens": 2}).encode()
    head = PARTIAL_BODY.partition(b"Content-Length")[0] + b"Content-Length: %d\r\n" % len(body)
    whole = head + b"Connection: close\r\n\r\n" + body
    with served(demo) as server, connect(server.url) as connection:
        for at in range(0, len(whole), 20):
            connection.sendall(whole[at : at + 20])
        assert rest(connection).startswith(b"HTTP/1.1 200")
        assert not server.connections.closed


def test_timeouts_for_requests_do_not_limit_answers(demo: Baco) -> None:
    body = json.dumps({"prompt": "For dinner, I", "router": "Waits", "max_tokens": 2}).encode()
    head = PARTIAL_BODY.partition(b"Content-Length")[0] + b"Content-Length: %d\r\n" % len(body)
    with (
        served(demo, header_timeout=WAIT, body_timeout=0.2) as server,
        waiting_router("Waits") as decides,
        connect(server.url, head + b"Connection: close\r\n\r\n" + body) as connection,
    ):
        wait_for(lambda: server.connections.counts()["answer"])
        time.sleep(0.4)
        decides.set()
        assert rest(connection).startswith(b"HTTP/1.1 200")
        assert not server.connections.closed


def test_the_connection_of_a_client_that_reads_nothing_is_closed(demo: Baco) -> None:
    with served(demo, body_timeout=0.3) as server:
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
        with connect(server.url) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.settimeout(0.1)
            try:
                for _ in range(2000):  # each answer is longer than all questions together
                    deaf.sendall(ask)
            except OSError:
                pass
            wait_for(lambda: server.connections.closed["stalled"])
            settles(server)


def test_idle_connections_are_closed_for_new_ones(demo: Baco) -> None:
    with served(demo, max_connections=4) as server, ExitStack() as stack:
        server.server.config.timeout_keep_alive = WAIT
        clients = [stack.enter_context(server.client) for _ in range(6)]
        for client in clients:
            assert client.get("/health").status_code == 200
        assert server.connections.closed == {"room": 2}
        wait_for(lambda: server.connections.counts()["idle"] == 4)
        # A client that finds its connection closed opens another.
        assert all(client.get("/health").status_code == 200 for client in clients)


@pytest.mark.parametrize("sent", [b"", PARTIAL_HEADER, PARTIAL_BODY])
def test_incomplete_requests_are_closed_for_new_connections(demo: Baco, sent: bytes) -> None:
    limits: dict[str, Any] = {"max_connections": 8, "max_incomplete": 4, "header_timeout": 600.0}
    with served(demo, body_timeout=600.0, **limits) as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server.url, sent)) for _ in range(12)]
        for _ in range(3):
            assert server.ask(max_tokens=1).status_code == 200
        assert server.connections.closed["room"] >= 8
        reply = rest(held[0])
        if sent:
            expected = 408, "the request was incomplete, and others needed its place"
            assert not reply or error_of(reply) == expected
        else:
            assert reply == b""


def test_connections_beyond_the_limit_wait_and_are_served_in_turn(
    demo: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "PATIENCE", WAIT)
    limits: dict[str, Any] = {"max_connections": 8, "max_incomplete": 4}
    with served(demo, header_timeout=WAIT, **limits) as server, ExitStack() as stack:
        server.server.config.timeout_keep_alive = WAIT
        waiting = [stack.enter_context(connect(server.url)) for _ in range(30)]
        for connection in waiting:
            connection.sendall(HEALTH)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        assert set(server.connections.closed) == {"room"}  # idle ones
        assert not any(entry["status"] == 408 for entry in server.log())


def test_the_bound_of_an_address_spares_trusted_proxies(demo: Baco) -> None:
    limits: dict[str, Any] = {"max_incomplete_per_address": 2, "header_timeout": WAIT}
    with (
        served(demo, trusted_proxies=("10.0.0.0/8",), **limits) as server,
        ExitStack() as stack,
    ):
        held = [stack.enter_context(connect(server.url, PARTIAL_HEADER)) for _ in range(3)]
        rest(held[0])
        assert server.connections.closed == {"address": 1}
        assert healthy(server.url)
    with served(demo, **limits) as server, ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(server.url, PARTIAL_HEADER))
        assert healthy(server.url)
        assert not server.connections.closed


def test_answers_leave_room_for_short_requests(demo: Baco) -> None:
    with (
        served(demo, max_connections=3) as server,
        ThreadPoolExecutor(2) as pool,
        waiting_router("Waits") as decides,
    ):
        long = [pool.submit(server.ask, router="Waits") for _ in range(2)]
        wait_for(lambda: server.connections.counts()["answer"] == 2)
        refused = server.ask()
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert "as many requests as it can" in refused.json()["error"]["message"]
        assert healthy(server.url)
        decides.set()
        assert all(one.result().status_code == 200 for one in long)


def test_upgrades_are_refused_and_need_a_key(demo: Baco) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    with served(demo, api_keys=("key",)) as server:
        request = HEALTH.replace(b"/health", b"/metrics").replace(b"\r\n\r\n", b"\r\n" + upgrade)
        with connect(server.url, request + b"\r\n") as connection:
            assert connection.recv(65_536).startswith(b"HTTP/1.1 401")


def test_one_connection_is_enough_for_answers(demo: Baco) -> None:
    with served(demo, max_connections=1) as server:
        assert [server.ask(max_tokens=1).status_code for _ in range(2)] == [200, 200]


def test_proxies_are_addresses_or_networks() -> None:
    settings = Settings(trusted_proxies=("10.0.0.0/8", "::1"))
    assert [settings.trusts(one) for one in ("10.1.2.3", "::1", "127.0.0.1")] == [True, True, False]
    assert Settings().trusts("127.0.0.1")
    with pytest.raises(BacoError, match="trusted proxy 'nginx': give an address or a network"):
        Settings(trusted_proxies=("nginx",))


@contextmanager
def file_limit(files: int) -> Iterator[None]:
    """Set the number of files that this process may open; skip the test where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < files:
        pytest.skip(f"needs {files} open files, and the hard limit of this machine is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_incomplete_requests_beyond_the_limit_of_files_do_not_stop_other_clients() -> None:
    """300 sockets with half a body, of a process that may open 256 files."""
    with file_limit(1024), process(files=256) as (running, url), ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(url, PARTIAL_BODY))
        for _ in range(5):
            assert healthy(url)
        headers = {"Authorization": "Bearer one"}
        body = chat(PROMPT, max_tokens=1)
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=WAIT)
        assert answer.status_code == 200
        running.send_signal(signal.SIGTERM)
        _, logged = running.communicate(timeout=WAIT)
        assert running.returncode == 0
        assert "Traceback" not in logged
        assert len(logged) < 2000


def test_running_out_of_files_does_not_stop_other_clients() -> None:
    """This happens where an option allows more connections than files, or a library opens many."""
    options = ("--max-connections", "100000", "--max-incomplete", "100000")
    with file_limit(1024), process(*options, files=128) as (running, url), ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(url, PARTIAL_HEADER))
        for _ in range(5):
            assert healthy(url)
        running.send_signal(signal.SIGTERM)
        _, logged = running.communicate(timeout=WAIT)
        assert running.returncode == 0
        assert "cannot accept a connection (Too many open files)" in logged
        assert len(logged) < 2000  # once a minute


def test_two_thousand_idle_connections_do_not_stop_other_clients() -> None:
    with file_limit(2500), process("--header-timeout", "600", files=2500) as (running, url):
        with ExitStack() as stack:
            for _ in range(2000):
                stack.enter_context(connect(url))
            for _ in range(5):
                assert healthy(url)
        running.send_signal(signal.SIGTERM)
        assert running.wait(WAIT) == 0


def test_too_low_a_limit_on_files_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(BacoError, match=r"may open 40 files and needs .*: raise ulimit -n"):
        connection_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert connection_limit() == connections.NO_FILE_LIMIT


def test_a_log_does_not_repeat_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("baco.serve.middleware.time.monotonic", lambda: now[0])
    log = logging.getLogger("baco.test")
    log.addFilter(RepeatFilter(60))
    for turn in range(100):
        log.warning("cannot accept %s", turn)
        log.error("Fatal error\nprotocol: <object at 0x%x>" % turn)  # noqa: UP031
    log.warning("of another kind")
    try:
        raise RuntimeError
    except RuntimeError:
        log.exception("cannot accept %s", 1)
    assert [record.getMessage()[:16] for record in caplog.records] == [
        "cannot accept 0",
        "Fatal error\nprot",
        "of another kind",
        "cannot accept 1",
    ]
    now[0] = 60.0
    log.warning("cannot accept %s", "a %")
    assert caplog.messages[-1] == "cannot accept a % (99 more like this in the meantime)"
