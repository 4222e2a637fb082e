"""How a batch scales over replicas on this machine, and what limits it.

    python -m benchmarks.batch [--workers 1 2 4] [--rows 128] [--json]
    python -m benchmarks.batch --hand-out 31250 [--replicas 64]   # shards of 6 kB that cost nothing

The same rows by one process without Ray, then by each number of replicas, one after another in one
run. Speed is measured from the first finished shard to the last, so that starting processes and
loading pairs, which a long batch does once, is reported apart.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from baco.api import Baco
from baco.batch.answering import LoadSpec
from baco.batch.job import LocalExecutor, carry_out
from baco.batch.ray_cluster import Cluster, Share
from baco.batch.ray_executor import RayExecutor
from baco.batch.rows import Row
from baco.batch.shards import Batch
from baco.evaluation.plan import machine
from baco.routing.router import Router
from benchmarks import launch

ROWS_A_SHARD = 4


@dataclass(frozen=True)
class Measured:
    """One batch.

    Attributes:
        name: of the executor.
        first: seconds from the start of the work to the first finished shard.
        tokens_per_second: from the first finished shard to the last.
        shard: median seconds of a shard in its replica.
        busy: of all replicas' time between first and last, the share spent at shards.
    """

    name: str
    first: float
    tokens_per_second: float
    shard: float
    busy: float


def choose_router(baco: Baco) -> Router:
    """The router of all answers."""
    return baco.router("P-Punc:0.4")


@contextmanager
def executors(workers: int | None) -> Iterator[LocalExecutor | RayExecutor]:
    """This process, or ``workers`` replicas on this machine."""
    if workers is None:
        yield LocalExecutor()
        return
    with Cluster(workers=workers).reached() as share:
        yield RayExecutor(share)


def measure(pair: str, rows: list[Row], n: int, workers: int | None) -> Measured:
    """Answer all rows once, with one executor."""
    load = LoadSpec({"name": pair, "max_rows": 256}, threads=1)
    settings = {"system": None, "switch": "word", "n": n, "seed": 1, "max_tokens": 64}
    batch = Batch(rows, load, choose_router, settings, rows_a_shard=ROWS_A_SHARD)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, executors(workers) as executor:
        job = batch.begin(Path(folder) / "out", executor, {})
        results = [
            (time.perf_counter() - started, result)
            for result in carry_out(job, job.worker, executor)
        ]
    # Shards that other replicas had begun before the first one finished are not counted apart.
    (first, _), *rest = results
    span = rest[-1][0] - first
    seconds = [result.seconds for _, result in rest]
    return Measured(
        "one process, no Ray" if workers is None else f"{workers} replica{'s' * (workers > 1)}",
        first,
        sum(result.tokens for _, result in rest) / span,
        statistics.median(seconds),
        min(1.0, sum(seconds) / (span * (workers or 1))),
    )


def idle(_: object) -> Callable[[Any], int]:
    """A worker that does nothing."""
    return len


def hand_out(shards: int, replicas: int, most: int = 1000) -> None:
    """Print the time of handing out shards that cost nothing, measured on the first ``most``."""
    before = psutil.Process().memory_info().rss
    # Replicas that take no processor, so that many of them fit on this machine.
    workers = RayExecutor(Share(replicas, 0, 0))
    with Cluster(workers=1).reached(), workers.workers(idle, ordered=False) as results:
        sizes = iter(results("x" * 6000 for _ in range(shards)))
        next(sizes)
        started = time.perf_counter()
        count = sum(1 for _ in itertools.islice(sizes, most))
        each = (time.perf_counter() - started) / count * 1e3
        memory = psutil.Process().memory_info().rss
    print(
        f"{shards} shards by {replicas} replicas: {each:.1f} ms each; "
        f"driver {memory >> 20} MiB, {memory - before >> 20} of them for Ray and its calls"
    )


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", default="demo")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hand-out", type=int, metavar="SHARDS")
    parser.add_argument("--replicas", type=int, default=64, help="of --hand-out")
    given = parser.parse_args()
    if given.hand_out is not None:
        hand_out(given.hand_out, given.replicas)
        return
    rows = [Row(i, f"Give me dinner idea {i}", {}, "rows") for i in range(given.rows)]
    all_measured = [
        measure(given.pair, rows, given.n, workers) for workers in (None, *given.workers)
    ]
    if given.json:
        print(json.dumps([asdict(measured) for measured in all_measured]))
        return
    print(f"{given.pair}; {machine()}; {given.rows} prompts × {given.n} answers, one thread each\n")
    print(f"{'':22}first shard, s  tokens/s  ratio  shard, s  busy")
    for measured in all_measured:
        ratio = measured.tokens_per_second / all_measured[0].tokens_per_second
        print(
            f"{measured.name:22}{measured.first:14.1f}{measured.tokens_per_second:10.0f}{ratio:7.2f}"
            f"{measured.shard:10.2f}{measured.busy:6.0%}"
        )


if __name__ == "__main__":
    launch(main)
