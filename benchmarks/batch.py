"""How a batch scales over replicas on this machine, and what bounds it.

    python -m benchmarks.batch [--workers 1 2 4] [--rows 128] [--json]
    python -m benchmarks.batch --hand-out 31250 [--replicas 64]   # shards of 6 kB that cost nothing

The same rows by one process without Ray, then by so many replicas, one after the other in one run.
Speed is taken from the first shard that is in its place to the last, so that starting processes and
loading pairs, which a long batch pays once, is told apart.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from baco.api import Baco
from baco.batch.batch import Batch, Executor, LocalExecutor, carry_out
from baco.batch.ray_cluster import Cluster
from baco.batch.replica import PairOptions
from baco.batch.replicas import BLOCKS_A_REPLICA, Replicas
from baco.batch.replicas import hand_out as spread
from baco.batch.rows import Row
from baco.evaluation.plan import machine
from baco.routing.router import Router

ROWS_A_SHARD = 4


@dataclass(frozen=True)
class Measured:
    """One batch.

    Attributes:
        name: who made it.
        first: seconds from the start of the command's work to the first shard in its place.
        tokens_per_second: from there to the last.
        shard: median seconds of a shard in its replica.
        busy: of all replicas' time between first and last, the share spent at shards.
    """

    name: str
    first: float
    tokens_per_second: float
    shard: float
    busy: float


def spell(baco: Baco) -> Router:
    """The router of all answers."""
    return baco.router("P-Punc:0.4")


@contextmanager
def place(workers: int | None) -> Iterator[Executor]:
    """This process, or so many replicas on this machine."""
    if workers is None:
        yield LocalExecutor()
        return
    with Cluster(workers=workers).reached() as share:
        yield Replicas(share)


def measure(pair: str, rows: list[Row], n: int, workers: int | None) -> Measured:
    """Answer all rows once."""
    copy = PairOptions({"name": pair, "max_rows": 256}, threads=1)
    settings = {"system": None, "switch": "word", "n": n, "seed": 1, "max_tokens": 64}
    batch = Batch(rows, copy, spell, settings, rows_a_shard=ROWS_A_SHARD)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, place(workers) as where:
        order = batch.order(Path(folder) / "out", where.look(batch), {})
        made = [(time.perf_counter() - started, one) for one in carry_out(batch, order, where)]
    # What the other replicas were at when the first shard came counts for none of them.
    (first, _), *rest = made
    span = rest[-1][0] - first
    seconds = [one.seconds for _, one in rest]
    return Measured(
        "one process, no Ray" if workers is None else f"{workers} replica{'s' * (workers > 1)}",
        first,
        sum(one.tokens for _, one in rest) / span,
        statistics.median(seconds),
        min(1.0, sum(seconds) / (span * (workers or 1))),
    )


class Idle:
    """A replica that has nothing to do."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"start": batch["start"]}


def hand_out(shards: int, replicas: int, most: int = 1000) -> None:
    """Print what Ray Data takes for a batch of so many shards, over the first of them."""
    items = [{"start": at, "stop": at, "rows": "x" * 6000} for at in range(shards)]
    before = psutil.Process().memory_info().rss
    with Cluster(workers=1).reached() as share:
        started = time.perf_counter()
        blocks = min(shards, BLOCKS_A_REPLICA * replicas)
        told = iter(spread(items, blocks, share, Idle).iter_rows())
        begun = time.perf_counter() - started
        next(told)
        started = time.perf_counter()
        handed = sum(1 for _ in itertools.islice(told, most))
        each = (time.perf_counter() - started) / handed * 1e3
        memory = psutil.Process().memory_info().rss
    print(
        f"{shards} shards in {blocks} blocks: {begun:.1f} s to begin, {each:.1f} ms each; "
        f"driver {memory >> 20} MiB, {memory - before >> 20} of them for Ray and the blocks"
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
        print(json.dumps([asdict(one) for one in all_measured]))
        return
    print(f"{given.pair}; {machine()}; {given.rows} prompts × {given.n} answers, one thread each\n")
    print(f"{'':22}first shard, s  tokens/s  ratio  shard, s  busy")
    for one in all_measured:
        ratio = one.tokens_per_second / all_measured[0].tokens_per_second
        print(
            f"{one.name:22}{one.first:14.1f}{one.tokens_per_second:10.0f}{ratio:7.2f}"
            f"{one.shard:10.2f}{one.busy:6.0%}"
        )


if __name__ == "__main__":
    main()
