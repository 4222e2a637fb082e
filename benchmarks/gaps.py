"""How long a running stream waits for its next text while other clients keep the server busy.

    python -m benchmarks.gaps [--seconds 20] [--only NAME …] [--json]

Starts servers of its own on the demo pair with a context window of 65,536 tokens, so that neither
long prompts nor long answers end there. One client streams answers; the gaps between its events are
measured alone, and beside each of these loads:

    echo      4 clients score texts of 480 tokens (`echo` with log-probabilities)
    score     1 client scores a text of 8,000 tokens
    refused   3 clients send prompts of 900 kB, which exceed the context window
    ids       1 client sends such a prompt with n = 16 and `return_token_ids`
    tokens    1 client sends 150,000 token ids as a prompt
    long      1 client sends prompts of 8,000 tokens and asks for 16 answers of 8 tokens
    schema    1 client asks for 16 answers that fit a schema, another one each time
    endless   1 client sends a schema that compiles for hours
    method    2 clients ask a method for 4 answers, which calls the models several times

Every load is made by a process of its own that sends the next request as soon as it has an answer.
"""

import argparse
import asyncio
import json
import multiprocessing
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import launch
from benchmarks.serve import served

CONTEXT = 65_536
WARM_UP = 3.0
WORDS = "In summer the sea is warm, and we walk along the shore of Lisbon in the evening. "
PACKAGES = ("torch", "transformers", "tokenizers", "fastapi", "uvicorn", "httpx")
# Of the demo pair: the tokens that end an answer, which a long stream must not draw.
ENDS = {"0": -100, "1": -100}


@dataclass(frozen=True, slots=True)
class Load:
    """Load beside a stream: a number of clients, and the request that each repeats."""

    clients: int
    body: Callable[[], dict[str, Any]]
    path: str = "/v1/completions"


def _echo(characters: int) -> dict[str, Any]:
    return {
        "model": "baco/aligned",
        "prompt": (WORDS * 1000)[:characters],
        "echo": True,
        "logprobs": 5,
        "max_tokens": 0,
    }


def _refused() -> dict[str, Any]:
    return {"prompt": (WORDS * 20_000)[:900_000], "max_tokens": 8}


def _schema() -> dict[str, Any]:
    names = [f"field{random.getrandbits(32)}" for _ in range(4)]
    fields = {name: {"type": "string", "maxLength": 20} for name in names}
    schema = {"type": "object", "properties": fields, "required": names}
    return {"prompt": WORDS, "max_tokens": 64, "n": 16, "structured_outputs": {"json": schema}}


def _endless() -> dict[str, Any]:
    patterns = [{"type": "string", "pattern": f"[a-z]{{0,{n}}}x"} for n in range(1, 40)]
    return {"prompt": WORDS, "structured_outputs": {"json": {"allOf": patterns}}}


def _method() -> dict[str, Any]:
    messages = [{"role": "user", "content": "Recommend a summer destination"}]
    return {"model": "baco/verbalized", "messages": messages, "max_tokens": 64, "n": 4}


LOADS = {
    "echo": Load(4, lambda: _echo(1_860)),
    "score": Load(1, lambda: _echo(31_000)),
    "refused": Load(3, _refused),
    "ids": Load(1, lambda: _refused() | {"n": 16, "return_token_ids": True}),
    "tokens": Load(1, lambda: {"prompt": [700] * 150_000, "max_tokens": 8}),
    "long": Load(1, lambda: {"prompt": (WORDS * 1000)[:31_000], "max_tokens": 8, "n": 16}),
    "schema": Load(1, _schema),
    "endless": Load(1, _endless),
    "method": Load(2, _method, "/v1/chat/completions"),
}


@dataclass(frozen=True, slots=True)
class Gaps:
    """Waits of one stream, in milliseconds.

    Attributes:
        load: the other load of the server; ``none`` for no other.
        events: pieces of text received.
        median, p99, largest: gaps between two pieces of one answer.
        first: the longest wait for the first piece of an answer.
        requests: requests of the load that ended meanwhile.
        statuses: their HTTP statuses.
    """

    load: str
    events: int
    median: float
    p99: float
    largest: float
    first: float
    requests: int
    statuses: list[int]


def wide(folder: Path) -> str:
    """The demo pair with a context window of CONTEXT tokens."""
    weights = Path(str(resources.files("baco").joinpath("demo/weights")))
    for source in ("base", "aligned"):
        shutil.copytree(weights / source, folder / source)
        path = folder / source / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["max_position_embeddings"] = CONTEXT
        path.write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


async def watch(url: str, seconds: float, begun: Any) -> tuple[list[float], list[float]]:
    """Stream answers for so long: the gaps within answers, and the waits before their first text,
    in seconds. ``begun`` is set as soon as text comes.
    """
    gaps: list[float] = []
    firsts: list[float] = []
    end = time.perf_counter() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        seed = 0
        while (left := end - time.perf_counter()) > 0:
            last, own = time.perf_counter(), firsts
            try:
                async with asyncio.timeout(left):
                    async for _ in _pieces(http, seed):
                        now = time.perf_counter()
                        own.append(now - last)
                        last, own = now, gaps
                        begun.set()
            except TimeoutError:
                own.append(time.perf_counter() - last)  # it may have been longer
            seed += 1
    return gaps, firsts


async def _pieces(http: httpx.AsyncClient, seed: int) -> AsyncIterator[str]:
    body = {
        "prompt": "Question: Give me a four-sentence story about a dragon.\nAnswer:",
        "router": "P-Punc:0.4",
        "seed": seed,
        "max_tokens": 400,
        "logit_bias": ENDS,
        "stream": True,
    }
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield line


def press(url: str, name: str, stop: Any, statuses: Any) -> None:
    """Keep the server busy with a load until ``stop`` is set; put each status into ``statuses``."""

    load = LOADS[name]

    async def client(http: httpx.AsyncClient) -> None:
        while not stop.is_set():
            response = await http.post(load.path, json=load.body())
            statuses.put(response.status_code)

    async def all_() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            await asyncio.gather(*(client(http) for _ in range(load.clients)))

    asyncio.run(all_())


def measure(url: str, name: str, seconds: float) -> Gaps:
    """The gaps of a stream beside one load."""
    spawn = multiprocessing.get_context("spawn")
    stop, begun, replies = spawn.Event(), spawn.Event(), spawn.Queue()
    load = spawn.Process(target=press, args=(url, name, stop, replies)) if name in LOADS else None
    if load is not None:
        load.start()
    gaps, firsts = asyncio.run(watch(url, seconds, begun))
    stop.set()
    statuses = []
    if load is not None:
        load.join(5)
        load.terminate()
        load.join()
        while not replies.empty():
            statuses.append(replies.get())
    ordered = sorted(1000 * gap for gap in gaps) or [float("nan")]
    return Gaps(
        name,
        len(gaps) + len(firsts),
        statistics.median(ordered),
        ordered[max(0, -(-len(ordered) * 99 // 100) - 1)],
        ordered[-1],
        1000 * max(firsts),
        len(statuses),
        sorted(set(statuses)),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--only", nargs="+", choices=LOADS, default=list(LOADS))
    given = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        pair = wide(Path(folder) / "pair")
        for name in ("none", *given.only):
            with served(pair) as (url, _):  # a fresh server for each load
                measure(url, "none", WARM_UP)
                measured.append(measure(url, name, given.seconds))
            print(measured[-1], file=sys.stderr)
    report = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} processors",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "seconds": given.seconds,
        "gaps": [asdict(gaps) for gaps in measured],
    }
    print(json.dumps(report)) if given.json else show(report)


def show(report: dict[str, Any]) -> None:
    """Print a table."""
    print(f"{report['machine']}, Python {report['python']}, {report['versions']}")
    print(f"{report['seconds']:g} s a load; times in ms\n")
    usual = report["gaps"][0]["median"]
    print(
        f"{'load':10}{'events':>8}{'median':>9}{'p99':>9}{'largest':>10}{'× usual':>9}{'first':>9}"
        f"{'requests':>10}  statuses"
    )
    for row in report["gaps"]:
        print(
            "{load:10}{events:8}{median:9.1f}{p99:9.1f}{largest:10.1f}".format(**row)
            + f"{row['largest'] / usual:9.1f}{row['first']:9.0f}{row['requests']:10}"
            + f"  {', '.join(map(str, row['statuses'])) or '-'}"
        )


if __name__ == "__main__":
    launch(main)
