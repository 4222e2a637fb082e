"""`baco serve` under load: many clients at once, with BACo and with the aligned model alone.

    python -m benchmarks.serve [--quick] [--json]

Starts a server of its own. At each level a number of clients stream one answer after another for
some seconds, first from the aligned model alone, then from BACo, on the same server with the same
questions. The first second of a level does not count. A thousand further requests then show whether
the server's memory grows.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any

import httpx
import psutil

from baco.errors import BacoError
from benchmarks import launch

WARM_UP = 1.0
PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "httpx")


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request: its client, its times in seconds of one clock, and the tokens of its answer."""

    client: int
    started: float
    first: float
    ended: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Level:
    """Figures of one model under ``clients`` clients.

    Attributes:
        requests: number that ended in the counted time.
        tokens_per_second, requests_per_second: of all clients together.
        first_p50, first_p95: milliseconds to the first text.
        p50, p95, p99: milliseconds to the end of an answer.
        fairness: Jain's index of the clients' tokens, (Σx)² / (n Σx²): 1 where all got as many.
        slowest: the slowest client's mean seconds a token, as a multiple of the median client's.
        server_cpu, client_cpu: processor seconds a second, of the server and of this program.
    """

    model: str
    clients: int
    requests: int
    tokens_per_second: float
    requests_per_second: float
    first_p50: float
    first_p95: float
    p50: float
    p95: float
    p99: float
    fairness: float
    slowest: float
    server_cpu: float
    client_cpu: float


@contextlib.contextmanager
def served(pair: str, **environment: str) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server on a free port, with these environment variables: its address and process."""
    command = [sys.executable, "-m", "baco", "serve", "--pair", pair, "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            address = re.search(r"at (http://\S+)", line)
            if address:
                yield address[1], psutil.Process(process.pid)
                break
        else:
            raise BacoError("the server did not start: try it by hand, baco serve")
    finally:
        process.terminate()
        process.communicate()


def prompts(pair: str) -> list[str]:
    """Questions that suit the pair: of the demo's own world, or open ones."""
    if pair == "demo":
        from baco.demo.world import questions

        return [question.text for question in questions("test", 200, seed=0)]
    text = (
        resources.files("baco")
        .joinpath("text/word_lists/open_prompts.txt")
        .read_text(encoding="utf-8")
    )
    return text.split("\n")[:-1]


async def ask(http: httpx.AsyncClient, client: int, body: dict[str, Any]) -> TimedRequest:
    """Stream one answer to its end."""
    started = time.perf_counter()
    first, tokens = 0.0, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            # A stream opens with an empty text before anything is decoded.
            if not first and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter()
            if '"completion_tokens":' in line:
                tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    ended = time.perf_counter()
    return TimedRequest(client, started, first or ended, ended, tokens)


async def drive(
    url: str, model: str, clients: int, questions: Sequence[str], *, seconds: float, requests: int
) -> list[TimedRequest]:
    """Let clients send one question after another, for ``seconds`` or up to ``requests`` in all."""
    numbers = itertools.count()
    end = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=clients)

    async def run_client(http: httpx.AsyncClient, client: int) -> list[TimedRequest]:
        answered = []
        while time.perf_counter() < end and (number := next(numbers)) < requests:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": questions[number % len(questions)]}],
                "seed": number,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            answered.append(await ask(http, client, body))
        return answered

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        all_ = await asyncio.gather(*(run_client(http, client) for client in range(clients)))
    return [answer for answered in all_ for answer in answered]


def level(
    url: str,
    server: psutil.Process,
    model: str,
    clients: int,
    questions: Sequence[str],
    seconds: float,
) -> Level:
    """Drive one model with ``clients`` clients and sum up."""
    before, own, started = _cpu(server), time.process_time(), time.perf_counter()
    answered = asyncio.run(
        drive(url, model, clients, questions, seconds=seconds + WARM_UP, requests=sys.maxsize)
    )
    took = time.perf_counter() - started
    begin, end = started + WARM_UP, started + WARM_UP + seconds
    counted = [request for request in answered if begin <= request.ended <= end]
    if len(counted) < clients:
        raise BacoError(
            f"{clients} clients had {len(counted)} answers in {seconds:g} s: give --seconds"
        )
    total = [request.ended - request.started for request in counted]
    first = [request.first - request.started for request in counted]
    by_client = [
        [request for request in answered if request.client == client] for client in range(clients)
    ]
    shares = [sum(request.tokens for request in own_) for own_ in by_client]
    pace = [
        sum(request.ended - request.started for request in own_) / max(1, share)
        for own_, share in zip(by_client, shares, strict=True)
    ]
    return Level(
        model=model,
        clients=clients,
        requests=len(counted),
        tokens_per_second=sum(request.tokens for request in counted) / seconds,
        requests_per_second=len(counted) / seconds,
        first_p50=1000 * percentile(first, 50),
        first_p95=1000 * percentile(first, 95),
        p50=1000 * percentile(total, 50),
        p95=1000 * percentile(total, 95),
        p99=1000 * percentile(total, 99),
        fairness=sum(shares) ** 2 / (clients * sum(share**2 for share in shares)),
        slowest=max(pace) / statistics.median(pace),
        server_cpu=(_cpu(server) - before) / took,
        client_cpu=(time.process_time() - own) / took,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def memory(
    url: str, server: psutil.Process, model: str, questions: Sequence[str], requests: int
) -> list[float]:
    """The server's resident memory in MiB before requests by 16 clients and after each quarter."""
    resident = [_resident(server)]
    for _ in range(4):
        asyncio.run(drive(url, model, 16, questions, seconds=3600, requests=requests // 4))
        time.sleep(0.5)
        resident.append(_resident(server))
        print(f"memory: {resident[-1]:.0f} MiB", file=sys.stderr)
    return resident


def _resident(server: psutil.Process) -> float:
    return float(server.memory_info().rss) / 2**20


def _cpu(server: psutil.Process) -> float:
    times = server.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="2 seconds a level, 200 requests")
    parser.add_argument("--pair", default="demo")
    parser.add_argument("--router", default="P-Punc:0.4")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, help="of a level; by default 8")
    parser.add_argument("--requests", type=int, help="for the memory test; by default 1000")
    given = parser.parse_args()
    seconds = given.seconds or (2.0 if given.quick else 8.0)
    requests = given.requests or (200 if given.quick else 1000)
    questions = prompts(given.pair)
    levels = []
    with served(given.pair) as (url, server):
        loaded = _resident(server)
        for clients in given.clients:
            for model in ("baco/aligned", f"baco/{given.router}"):
                levels.append(level(url, server, model, clients, questions, seconds))
                print(f"{model}, {clients} clients: {levels[-1]}", file=sys.stderr)
        resident = memory(url, server, f"baco/{given.router}", questions, requests)
    report = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} processors",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "pair": given.pair,
        "seconds": seconds,
        "levels": [asdict(figures) for figures in levels],
        "memory": {"loaded_mib": loaded, "requests": requests, "quarters_mib": resident},
    }
    print(json.dumps(report)) if given.json else show(report)


def show(report: dict[str, Any]) -> None:
    """Print a table."""
    print(f"{report['pair']}; {report['machine']}, Python {report['python']}, {report['versions']}")
    print(f"{report['seconds']:g} s a level; times in ms\n")
    print(
        f"{'model':18}{'clients':>8}{'req/s':>7}{'tok/s':>7}{'first':>7}{'p95':>7}{'end':>8}"
        f"{'p95':>7}{'p99':>7}{'Jain':>7}{'slowest':>9}{'CPU':>6}{'clients':>9}"
    )
    for figures in report["levels"]:
        print(
            "{model:18}{clients:8}{requests_per_second:7.1f}{tokens_per_second:7.0f}"
            "{first_p50:7.0f}{first_p95:7.0f}{p50:8.0f}{p95:7.0f}{p99:7.0f}{fairness:7.3f}"
            "{slowest:9.2f}{server_cpu:6.2f}{client_cpu:9.2f}".format(**figures)
        )
    usage = report["memory"]
    print(
        f"\nmemory of the server: {usage['loaded_mib']:.0f} MiB loaded; before and after each "
        f"quarter of {usage['requests']} requests by 16 clients: "
        + ", ".join(f"{mib:.0f}" for mib in usage["quarters_mib"])
        + " MiB"
    )


if __name__ == "__main__":
    launch(main)
