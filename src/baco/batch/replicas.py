"""Shards by the replicas of a Ray cluster: Ray Data hands them out, and again where one is lost."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baco.batch.batch import Batch
from baco.batch.replica import Advance, Facts, Made, Order, Replica, facts
from baco.batch.rows import Row
from baco.cluster.connection import Share, go_to
from baco.errors import BacoError

if TYPE_CHECKING:
    import ray.data

# Shards a replica has: the one it makes, and one to go on with at once.
SHARDS_A_REPLICA = 2


class Replicas:
    """The replicas of a cluster that is reached."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def look(self, batch: Batch) -> Facts:
        import ray

        task = ray.remote(**self.share.resources)(_look)
        try:
            told: Facts | BacoError = ray.get(task.remote(batch, str(Path.cwd())))
        except ray.exceptions.RayError as error:
            raise BacoError(f"a replica ended before its first answer: {_line(error)}") from error
        if isinstance(told, BacoError):
            raise told
        return told

    def make(
        self, order: Order, work: Sequence[tuple[range, Sequence[Row]]], advance: Advance
    ) -> Iterator[Made]:
        import ray.util.client

        if ray.util.client.ray.is_connected():
            yield from self._make_from_afar(order, work, advance)
            return
        try:
            for row in self._stream(order, work).iter_rows():
                if row["error"]:
                    raise BacoError(row["error"])
                made = Made(
                    range(row["start"], row["stop"]), row["answers"], row["tokens"], row["seconds"]
                )
                advance(made.answers, made.tokens)
                yield made
        except ray.exceptions.RayError as error:
            raise BacoError(
                f"the cluster gave up: {_line(error)}; the same command goes on where it was"
            ) from error

    def _make_from_afar(
        self, order: Order, work: Sequence[tuple[range, Sequence[Row]]], advance: Advance
    ) -> Iterator[Made]:
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
                f"the cluster gave up: {_line(error)}; the same command goes on where it was"
            ) from error

    def _stream(
        self, order: Order, work: Sequence[tuple[range, Sequence[Row]]]
    ) -> "ray.data.Dataset":
        import ray.data

        quiet()
        items = [
            {
                "start": shard.start,
                "stop": shard.stop,
                "rows": json.dumps([asdict(row) for row in rows]),
            }
            for shard, rows in work
        ]
        pool = ray.data.ActorPoolStrategy(
            # A pool that may shrink gives up the places of idle replicas to one that lost its node.
            min_size=1,
            max_size=self.share.workers,
            initial_size=self.share.workers,
            max_tasks_in_flight_per_actor=SHARDS_A_REPLICA,
        )
        # A block a shard: a replica that is lost costs the shards it had, and they are made again
        # as often as it takes (Ray Data's own default); `Output.attempt` ends what cannot be made.
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(order, str(Path.cwd())),
            batch_size=1,
            compute=pool,
            **self.share.resources,
        )


def _look(batch: Batch, folder: str) -> Facts | BacoError:
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
        order: Order,
        work: Sequence[tuple[range, Sequence[Row]]],
        folder: str,
    ) -> None:
        go_to(folder)
        self.made = Replicas(share).make(order, work, lambda *_: None)

    def next(self) -> Made | BacoError | None:
        """The next shard in its place; None after the last."""
        try:
            return next(self.made, None)
        except BacoError as error:
            return error


class _Actor:
    """A replica in a worker process of the cluster."""

    def __init__(self, order: Order, folder: str) -> None:
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
            made, error = Made(shard, 0, 0, 0.0), str(refused)
        return {
            "start": [start],
            "stop": [stop],
            "answers": [made.answers],
            "tokens": [made.tokens],
            "seconds": [made.seconds],
            "error": [error],
        }


def quiet() -> None:
    """Leave the terminal to the command: Ray Data writes its log into files."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _line(error: Exception) -> str:
    told = [line.strip() for line in str(error).splitlines() if line.strip()]
    return told[-1] if told else type(error).__name__
