"""A batch from its rows to its shards, wherever they are made."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from baco.batch.formats import Format
from baco.batch.output import Output, begin
from baco.batch.replica import Advance, JobSpec, PairInfo, PairOptions, Replica, ShardResult, facts
from baco.batch.rows import Row
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import NOISE_VERSION
from baco.text.templates import today

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.routing.router import Router

# Answers of a shard where the caller does not say how many rows it is to have: four times what is
# decoded at once, so that the rows that wait fill up the places of those that ended.
ANSWERS_A_SHARD = 1024


@dataclass(frozen=True, slots=True)
class Batch:
    """What is asked for.

    Attributes:
        rows: all prompts.
        copy: how a process comes by the pair.
        spell: chooses the router of a pair.
        settings: keywords of ``Baco.stream_batch`` but the router; ``seed`` may be None.
        form: of the shards.
        rows_a_shard: None: as many as make `ANSWERS_A_SHARD` answers.
    """

    rows: Sequence[Row]
    copy: PairOptions
    spell: "Callable[[Baco], Router]"
    settings: Mapping[str, Any]
    form: Format = "jsonl"
    rows_a_shard: int | None = None

    @property
    def size(self) -> int:
        """Rows of a shard."""
        return self.rows_a_shard or max(1, ANSWERS_A_SHARD // int(self.settings["n"]))

    def order(self, path: Path, told: PairInfo, made: Mapping[str, Any]) -> JobSpec:
        """Begin or go on with a directory.

        Raises:
            BacoError: a directory of something else or of other settings.
        """
        prompts = json.dumps([(row.prompt, row.kept) for row in self.rows])
        asked = {
            "pair": told.pair,
            "fingerprint": told.fingerprint,
            "weights": told.weights,
            "backend": self.copy.load.get("backend", "local"),
            "draft": self.copy.load.get("draft"),
            # Only where it is so: batches that were begun before there was a choice go on.
            **({"trust_remote_code": True} if self.copy.load.get("trust_remote_code") else {}),
            "max_rows": self.copy.load["max_rows"],
            "threads": self.copy.threads,
            "router": told.router,
            "seed": self.settings.get("seed"),
            "noise": NOISE_VERSION,
            **told.params,
            "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
            "rows": len(self.rows),
            "rows_a_shard": self.size,
            "shards": self.form,
        }
        inputs = list(dict.fromkeys(row.path for row in self.rows))
        more: dict[str, Any] = {"inputs": inputs, "made": made}
        if told.dated:
            asked["date"] = self.copy.load.get("date")
            more["date"] = asked["date"] or today()
        seed = SamplingParams(seed=self.settings.get("seed")).seeded().seed
        assert seed is not None
        manifest = begin(path, asked, seed, more)
        output = Output(path, self.form, len(self.rows), self.size)
        decoded = {**self.settings, "seed": manifest["seed"], "router": told.router}
        return JobSpec(self.copy, output, manifest, decoded)


class Executor(Protocol):
    """Where shards are made."""

    def look(self, batch: Batch) -> PairInfo:
        """Load the pair and look at the whole batch.

        Raises:
            BacoError: a pair that cannot be loaded, or a row that does not fit it.
        """

    def make(
        self, order: JobSpec, work: Sequence[tuple[range, Sequence[Row]]], advance: Advance
    ) -> Iterator[ShardResult]:
        """Make shards; each is told of once it is in its place, in any order.

        Args:
            order: what they hang on.
            work: the rows of every shard that is missing.
            advance: told of answers as they end, where that can be told.

        Raises:
            BacoError: see :meth:`baco.batch.replica.Replica.make`.
        """


class LocalExecutor:
    """This very process."""

    def look(self, batch: Batch) -> PairInfo:
        self._baco = batch.copy.take()
        return facts(self._baco, batch.spell, batch.settings, batch.rows)

    def make(
        self, order: JobSpec, work: Sequence[tuple[range, Sequence[Row]]], advance: Advance
    ) -> Iterator[ShardResult]:
        replica = Replica(order, self._baco)
        for shard, rows in work:
            yield replica.make(shard, rows, advance)


def carry_out(
    batch: Batch, order: JobSpec, place: Executor, advance: Advance = lambda *_: None
) -> Iterator[ShardResult]:
    """Make the shards that are missing.

    Raises:
        BacoError: another command writes to the directory, or what the place says.
    """
    with order.output.held():
        work = [(s, batch.rows[s.start : s.stop]) for s in order.output.missing()]
        if work:
            yield from place.make(order, work, advance)
