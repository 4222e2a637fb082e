"""Shards by the replicas of a Ray cluster: Ray Data hands them out, and again where one is lost."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baco.batch.batch import Batch
from baco.batch.ray_cluster import Share, go_to, last_line
from baco.batch.replica import Advance, JobSpec, PairInfo, Replica, ShardResult, facts
from baco.batch.rows import Row
from baco.errors import BacoError

if TYPE_CHECKING:
    import ray.data

# Blocks a replica has: the one it is at, and one to go on with at once.
BLOCKS_AT_ONCE = 2
# Every block costs the driver time and memory, so that in large batches one has several shards; so
# many for each replica still leave little for the last one to do alone.
BLOCKS_A_REPLICA = 100


class Replicas:
    """The replicas of a cluster that is reached."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def look(self, batch: Batch) -> PairInfo:
        import ray

        task = ray.remote(**self.share.resources)(_look)
        try:
            told: PairInfo | BacoError = ray.get(task.remote(batch, str(Path.cwd())))
        except ray.exceptions.RayError as error:
            raise BacoError(
                f"a replica ended before its first answer: {last_line(error)}"
            ) from error
        if isinstance(told, BacoError):
            raise told
        return told

    def make(
        self, order: JobSpec, work: Sequence[tuple[range, Sequence[Row]]], advance: Advance
    ) -> Iterator[ShardResult]:
        import ray.util.client

        if ray.util.client.ray.is_connected():
            yield from self._make_from_afar(order, work, advance)
            return
        try:
            for row in self._stream(order, work).iter_rows():
                if row["error"]:
                    raise BacoError(row["error"])
                made = ShardResult(
                    range(row["start"], row["stop"]),
                    row["answers"],
                    row["tokens"],
                    row["seconds"],
                    row["broken"],
                    row["first_broken"],
                )
                advance(made.answers, made.tokens)
                yield made
        except ray.exceptions.RayError as error:
            raise BacoError(
                f"the cluster gave up: {last_line(error)}; the same command goes on where it was"
            ) from error

    def _make_from_afar(
        self, order: JobSpec, work: Sequence[tuple[range, Sequence[Row]]], advance: Advance
    ) -> Iterator[ShardResult]:
        """As `make`, by a driver inside the cluster: Ray Data does not run on Ray's client."""
        import ray

        driver = ray.remote(num_cpus=0)(_Driver).remote(self.share, order, work, str(Path.cwd()))
        try:
            while (told := ray.get(driver.next.remote())) is not None:
                if isinstance(told, BacoError):
                    raise told
                advance(told.answers, told.tokens)
                yield told
        except ray.exceptions.RayError as error:
            raise BacoError(
                f"the cluster gave up: {last_line(error)}; the same command goes on where it was"
            ) from error

    def _stream(
        self, order: JobSpec, work: Sequence[tuple[range, Sequence[Row]]]
    ) -> "ray.data.Dataset":
        items = [
            {
                "start": shard.start,
                "stop": shard.stop,
                "rows": json.dumps([asdict(row) for row in rows]),
            }
            for shard, rows in work
        ]
        blocks = min(len(items), BLOCKS_A_REPLICA * self.share.workers)
        return hand_out(items, blocks, self.share, _Actor, order, str(Path.cwd()))


def hand_out(
    items: list[dict[str, Any]], blocks: int, share: Share, actor: type, *arguments: Any
) -> "ray.data.Dataset":
    """Give items to replicas, one at a time, block by block; what they return as it comes.

    A block whose replica is lost begins anew with another, as often as it takes (Ray Data's own
    default): what is done is not done again, and `Output.attempt` ends what cannot be done.
    """
    import ray.data

    quiet()
    pool = ray.data.ActorPoolStrategy(
        # A pool that may shrink gives up the places of idle replicas to one that lost its node.
        min_size=1,
        max_size=share.workers,
        initial_size=share.workers,
        max_tasks_in_flight_per_actor=BLOCKS_AT_ONCE,
    )
    context = ray.data.DataContext.get_current()
    # Whatever is returned is as large as a block is to be: it comes at once, not with its block.
    context.target_max_block_size = 1
    # A replica may be lost, or given up for want of room, while it starts; that all of them cannot
    # start has been found out by who looked at the batch.
    context.max_consecutive_actor_init_deaths = -1
    return ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        actor, fn_constructor_args=arguments, batch_size=1, compute=pool, **share.resources
    )


def _look(batch: Batch, folder: str) -> PairInfo | BacoError:
    go_to(folder)
    try:
        return facts(batch.copy.take(), batch.spell, batch.settings, batch.rows)
    except BacoError as error:
        return error


class _Driver:
    """Drives a batch in the cluster, for a command that is outside."""

    def __init__(
        self,
        share: Share,
        order: JobSpec,
        work: Sequence[tuple[range, Sequence[Row]]],
        folder: str,
    ) -> None:
        go_to(folder)
        self.made = Replicas(share).make(order, work, lambda *_: None)

    def next(self) -> ShardResult | BacoError | None:
        """The next shard in its place; None after the last."""
        try:
            return next(self.made, None)
        except BacoError as error:
            return error


class _Actor:
    """A replica in a worker process of the cluster."""

    def __init__(self, order: JobSpec, folder: str) -> None:
        go_to(folder)
        self.replica = Replica(order)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """A shard in its place, or the one line that says why not."""
        start, stop = int(batch["start"][0]), int(batch["stop"][0])
        rows = [Row(**row) for row in json.loads(batch["rows"][0])]
        shard, error = range(start, stop), ""
        try:
            made = self.replica.make(shard, rows)
        except BacoError as refused:
            made, error = ShardResult(shard, 0, 0, 0.0), str(refused)
        return {
            "start": [start],
            "stop": [stop],
            "answers": [made.answers],
            "tokens": [made.tokens],
            "seconds": [made.seconds],
            "broken": [made.broken],
            "first_broken": [made.error],
            "error": [error],
        }


def quiet() -> None:
    """Leave the terminal to the command: Ray Data writes its log into files."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What ends a batch is told by the command in a line.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
