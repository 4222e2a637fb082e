"""How a batch scales over replicas on this machine, and what bounds it.

    python benchmarks/batch.py [--workers 1 2 4] [--rows 64] [--json]

The same rows by one process without Ray, then by so many replicas, one after the other in one run.
Speed is taken from the first shard that is in its place to the last, so that starting processes and
loading pairs, which a long batch pays once, is told apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from baco.api import Baco
from baco.batch.batch import Batch, Here, Place, carry_out
from baco.batch.replica import Copy
from baco.batch.replicas import Replicas
from baco.batch.rows import Row
from baco.cluster.connection import Cluster
from baco.evaluation.plan import machine
from baco.routing.routers import Router

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
def place(workers: int | None) -> Iterator[Place]:
    """This process, or so many replicas on this machine."""
    if workers is None:
        yield Here()
        return
    with Cluster(workers=workers).reached() as share:
        yield Replicas(share)


def measure(pair: str, rows: list[Row], n: int, workers: int | None) -> Measured:
    """Answer all rows once."""
    copy = Copy({"name": pair, "max_rows": 256}, threads=1)
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
        "one process, no Ray" if workers is None else f"{workers} replicas",
        first,
        sum(one.tokens for _, one in rest) / span,
        statistics.median(seconds),
        min(1.0, sum(seconds) / (span * (workers or 1))),
    )


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", default="demo")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
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
