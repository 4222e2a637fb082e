"""A real server on loopback, in a thread of the test process or in a process of its own."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import httpx
import psutil
import pytest

from baco import Baco, register_router
from baco.decoder import Decoder
from baco.engine.isolation import IsolatingEngine
from baco.outputs import Chunk
from baco.routing.rules import RULES
from baco.routing.signals import Signals
from baco.serve.app import create_app
from baco.serve.connections import Connections
from baco.serve.engine_thread import EngineThread
from baco.serve.server import Server
from baco.serve.settings import Settings
from baco.sockets import bind

PROMPT = "Recommend a summer destination"
ROUTER = "P-Punc:0.4"
WAIT = 240  # seconds: machines that run all tests at once are slow


class _Records(logging.Handler):
    """The lines that one thread logs: that of a server, of several in this process."""

    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self._thread = thread
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread.ident:
            self.lines.append(record.getMessage())


@dataclass
class Served:
    """A running server: where it is, its engine thread, and what it wrote into its access log."""

    url: str
    engine_thread: EngineThread
    connections: Connections
    server: Server
    records: _Records = field(repr=False)

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT)

    def ask(self, **body: Any) -> httpx.Response:
        """A chat completion."""
        with self.client as client:
            return client.post("/v1/chat/completions", json=chat(**body))

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.records.lines]

    def entry(self, reply: httpx.Response) -> dict[str, Any]:
        """The access log's entry for a reply. It is written after the reply is sent."""
        entries: list[dict[str, Any]] = []

        def written() -> bool:
            entries[:] = [e for e in self.log() if e["id"] == reply.headers["X-Request-Id"]]
            return bool(entries)

        wait_for(written)
        return entries[0]

    def metric(self, name: str) -> float:
        """The sample of a metric, labels included in the name as Prometheus writes them."""
        with self.client as client:
            page = client.get("/metrics").text
        samples = [line for line in page.splitlines() if line.startswith(f"{name} ")]
        return float(samples[0].split()[-1]) if samples else 0.0

    @property
    def rounds(self) -> int:
        """Steps that its decoder has decoded anything in; a decoder is made for a first prompt."""
        decoder = self.engine_thread._decoder
        if decoder is None:
            return 0
        assert isinstance(decoder.engine, IsolatingEngine)
        return decoder.engine.stats.steps

    @property
    def arrived(self) -> int:
        """Answers in the decoder, and jobs that the engine thread takes before its next step."""
        decoder, queued = self.engine_thread._decoder, self.engine_thread._work.qsize()
        return queued if decoder is None else queued + decoder.waiting + decoder.running

    def settles(self) -> None:
        """Wait until nothing is open or in the batch."""
        wait_for(lambda: not self.engine_thread.open and not self.engine_thread.load.running)


def chat(prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "router": ROUTER} | fields


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of a stream, without the final ``[DONE]``."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def connect(url: str, sent: bytes = b"") -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT)
    connection.sendall(sent)
    return connection


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that other programs are not given. A server of the test may listen at it.

    It is bound here the whole time: a free port that is only looked up may be taken by then.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()  # elsewhere nothing else could bind it
        yield port


def post_request(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def wait_for(condition: Any) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Does a process run? One that has ended but was not waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def served(baco: Baco, port: int = 0, **settings: Any) -> Iterator[Served]:
    """Serve a pair on ``port``; 0 takes a free one."""
    app = create_app(baco, Settings(**settings))
    bound = bind("127.0.0.1", port)
    started = threading.Event()
    server = Server(app, 0, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    records = _Records(thread)
    access = logging.getLogger("baco.access")
    access.setLevel(logging.INFO)
    access.addHandler(records)
    thread.start()
    assert started.wait(WAIT)
    port = bound.getsockname()[1]
    try:
        state = app.state
        yield Served(
            f"http://127.0.0.1:{port}", state.engine_thread, state.connections, server, records
        )
    finally:
        server.should_exit = True
        thread.join()
        access.removeHandler(records)


class Decision(threading.Event):
    """A router decides once this is set. ``awaited`` is set when a step waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.awaited = threading.Event()


@contextmanager
def waiting_router(name: str) -> Iterator[Decision]:
    """A router that waits for an event before it decides."""
    decides = Decision()

    def decide(signals: Signals) -> Any:
        decides.awaited.set()
        assert decides.wait(WAIT)
        return signals.max_base < 2

    register_router(name, decide)
    try:
        yield decides
    finally:
        decides.set()
        del RULES[name]


class Steps:
    """Steps of the decoders in this process, which a test takes one at a time."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)
        self._taken: SimpleQueue[list[Chunk]] = SimpleQueue()
        self._free = False

    def take(self) -> list[Chunk]:
        """Let a decoder take one step, once there is something to decode; the step's chunks."""
        self._allowed.release()
        return self._taken.get(timeout=WAIT)

    def release(self) -> None:
        """Let all decoders go on by themselves."""
        self._free = True
        self._allowed.release()

    def held(self, decoder: Decoder, step: Callable[[Decoder], list[Chunk]]) -> list[Chunk]:
        """A decoder's step, which waits until a test takes it."""
        if not self._free:
            assert self._allowed.acquire(timeout=WAIT)
        if self._free:
            self._allowed.release()  # for the next decoder that waits
        chunks = step(decoder)
        self._taken.put(chunks)
        return chunks


@contextmanager
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Decoders of this process take a step only when the test says so."""
    steps, step = Steps(), Decoder.step
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "step", lambda decoder: steps.held(decoder, step))
        try:
            yield steps
        finally:
            steps.release()


@contextmanager
def process(
    *options: str, files: int | None = None, before: str = ""
) -> Iterator[tuple[subprocess.Popen, str]]:
    """``baco serve`` as people start it, on a free port.

    Args:
        options: of the command.
        files: that the process may open (``ulimit -n``).
        before: what the process does first, as Python.
    """
    program = f"{before}\nfrom baco.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--port", "0"]
    limited = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh"] if files else []
    running = subprocess.Popen(
        [*limited, *command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"BACO_API_KEY": "one two"},
    )
    assert running.stderr is not None
    try:
        lines = iter(running.stderr.readline, "")
        address = next(match for line in lines if (match := re.search(r"http://\S+", line)))
        yield running, address[0]
    finally:
        running.kill()
        running.wait()
