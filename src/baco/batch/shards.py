"""The job of ``baco batch``: answers to many prompts in a directory of shards.

    _manifest.json                             settings, seed, inputs, versions
    rows-000000000-000000127.parquet           the answers to these rows, the first and the last
    …

A dataset also has a card, ``README.md``, and its shards are in the folder ``data``.

A shard is a range of rows that are decoded together. It is written by the process that answers it,
in one step, under a name that follows from its rows: a shard is either complete or absent, and
making it again gives identical bytes, on whatever machine.
"""

import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baco.backends import HERE, backend_of
from baco.batch.answering import LoadSpec, PairInfo, answer, inspect
from baco.batch.formats import Format, encode
from baco.batch.job import (
    Advance,
    LocalExecutor,
    as_manifest,
    begin_folder,
    check_folder,
    check_settings,
    digest,
    ignore,
    read_manifest,
)
from baco.batch.layout import Layout, card
from baco.batch.rows import Row
from baco.errors import BacoError
from baco.files import locked, replacing, write_output
from baco.outputs import record
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import NOISE_VERSION
from baco.text.templates import today

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.batch.ray_executor import RayExecutor
    from baco.routing.router import Router

FORMAT = 1
# Readers of a folder of Parquet leave out what begins with an underscore.
MANIFEST = "_manifest.json"
# Of a dataset, as the Hugging Face hub names them.
CARD, DATA = "README.md", "data"
KIND, OTHER, COMMAND = "batch", "another directory", "baco batch"
# Answers of a shard by default: four times what is decoded at once, so that waiting rows take the
# places of those that end.
ANSWERS_A_SHARD = 1024


@dataclass(frozen=True, slots=True)
class Output:
    """Where shards go.

    Attributes:
        path: the directory, on storage that every writer sees.
        form: of the shards.
        rows: of all shards together.
        rows_a_shard: the last may have fewer.
        dataset: the columns of a dataset, with a row per answer; None for a row per prompt.
    """

    path: Path
    form: Format
    rows: int
    rows_a_shard: int
    dataset: Layout | None = None

    @property
    def folder(self) -> Path:
        """Where the shards of it are."""
        return self.path if self.dataset is None else self.path / DATA

    def shards(self) -> list[range]:
        """The rows of every shard."""
        size = self.rows_a_shard
        return [range(a, min(a + size, self.rows)) for a in range(0, self.rows, size)]

    def file(self, shard: range) -> Path:
        """Where a shard is, or is to be."""
        return self.folder / f"rows-{shard.start:09d}-{shard.stop - 1:09d}.{self.form}"

    def write(self, shard: range, records: Sequence[Mapping[str, Any]]) -> None:
        """Put a shard in its place, whole, on the disk.

        Args:
            shard: its rows.
            records: of :func:`baco.batch.formats.encode`; of a dataset, of :meth:`Layout.rows`.
        """
        target = self.file(shard)
        # Two machines may make one shard at once, where one of them was taken for lost.
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with replacing(target, partial):
                schema = None if self.dataset is None else self.dataset.schema()
                partial.write_bytes(encode(records, self.form, schema))
        except OSError as error:
            raise BacoError(f"cannot write {target}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What every process that makes shards needs; plain data, which is sent to other machines.

    Attributes:
        load: how it loads its copy of the pair.
        output: where shards go.
        manifest: of that directory.
        settings: keywords of ``Baco.stream_batch`` with router and seed.
    """

    load: LoadSpec
    output: Output
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A shard that is in its place.

    Attributes:
        shard: its rows.
        tokens, seconds: it took; none where it was there already.
        broken: prompts with answers that broke off,
        error: which and why, of the first of them.
    """

    shard: range
    tokens: int = 0
    seconds: float = 0.0
    broken: int = 0
    error: str = ""

    @property
    def prompts(self) -> int:
        """Rows in the shard."""
        return len(self.shard)


@dataclass(frozen=True, slots=True)
class Batch:
    """What is to be answered.

    Attributes:
        rows: all prompts.
        load: how a process loads the pair.
        choose_router: gives the router of a pair.
        settings: keywords of ``Baco.stream_batch`` but the router; ``seed`` may be None.
        form: of the shards.
        rows_a_shard: None: as many as make `ANSWERS_A_SHARD` answers.
        dataset: write a dataset, with a row per answer and a card.
        template: the text of the prompt template, for the record.
    """

    rows: Sequence[Row]
    load: LoadSpec
    choose_router: "Callable[[Baco], Router]"
    settings: Mapping[str, Any]
    form: Format = "jsonl"
    rows_a_shard: int | None = None
    dataset: bool = False
    template: str | None = None

    def inspect(self) -> tuple[PairInfo, "Baco"]:
        """Load the pair and check all rows; errors as for :func:`baco.batch.answering.inspect`."""
        baco = self.load.load()
        return inspect(baco, self.choose_router, self.settings, self.rows), baco

    def begin(
        self, path: Path, executor: "LocalExecutor | RayExecutor", provenance: Mapping[str, Any]
    ) -> "ShardJob":
        """Begin or continue a directory.

        Args:
            path: the directory; it is made where it is not there.
            executor: of the shards; it loads the pair.
            provenance: what the manifest says besides settings, such as versions.

        Raises:
            BacoError: a pair that cannot be loaded, a row that does not fit it, a directory of
                something else or of other settings, or one that another process writes to.
        """
        baco: Baco | None = None
        if isinstance(executor, LocalExecutor):
            pair, baco = self.inspect()
        else:
            pair = executor.call(self._pair_info)
        size = self.rows_a_shard or max(1, ANSWERS_A_SHARD // int(self.settings["n"]))
        load = self.load.arguments
        asked = {
            "pair": pair.pair,
            "fingerprint": pair.fingerprint,
            "weights": pair.weights,
            "backend": load.get("backend") or backend_of(pair.weights),
            "draft": load.get("draft"),
            # Only where it is so: batches that were begun before there was a choice go on.
            **({"trust_remote_code": True} if load.get("trust_remote_code") else {}),
            "max_rows": load["max_rows"],
            "threads": self.load.threads,
            "router": pair.router,
            **pair.router_files,
            "seed": self.settings.get("seed"),
            "noise": NOISE_VERSION,
            **pair.params,
            "prompts": digest([(row.prompt, row.kept) for row in self.rows]),
            "rows": len(self.rows),
            "rows_a_shard": size,
            "shards": self.form,
            **({"columns": digest([row.columns for row in self.rows])} if self.dataset else {}),
        }
        more = {"inputs": list(dict.fromkeys(row.path for row in self.rows)), "made": provenance}
        if self.template is not None:
            more["prompt_template"] = self.template
        if pair.dated:
            asked["date"] = load.get("date")
            more["date"] = asked["date"] or today()
        layout = Layout.of(self.rows) if self.dataset else None
        manifest = begin(path, asked, more)
        output = Output(path, self.form, len(self.rows), size, layout)
        output.folder.mkdir(exist_ok=True)
        if layout is not None and not (path / CARD).exists():
            write_output(path / CARD, card(manifest, layout))
        settings = {**self.settings, "seed": manifest["seed"], "router": pair.router}
        return ShardJob(self.rows, ShardSpec(self.load, output, manifest, settings), baco)

    def _pair_info(self) -> PairInfo:
        return self.inspect()[0]


def begin(path: Path, settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a directory, or read the one that is there.

    Args:
        path: the directory.
        settings: everything that the rows depend on; the seed may be None.
        more: what does not count when a batch is continued.

    Returns:
        The manifest, with a seed.

    Raises:
        BacoError: as for `Batch.begin`.
    """
    asked = json.loads(json.dumps(settings))
    seed = SamplingParams(seed=asked.get("seed")).seeded().seed
    manifest = {"format": FORMAT, "settings": asked, "seed": seed, **more}
    if begin_folder(path, {MANIFEST: as_manifest(manifest)}, KIND, OTHER):
        manifest = read_manifest(path / MANIFEST, FORMAT, KIND, COMMAND)
        check_settings(path, manifest["settings"], asked, OTHER)
    return manifest


def check_directory(path: Path) -> None:
    """Check a directory before any model is loaded.

    Raises:
        BacoError: it holds something that is not of a batch, or another command writes to it.
    """
    check_folder(path, [MANIFEST], KIND, OTHER)
    if path.is_dir():
        with locked(path):
            pass


def begun_backend(path: Path) -> str | None:
    """The backend in which a directory was begun, if it is one of this process."""
    if not (path / MANIFEST).exists():
        return None
    backend = read_manifest(path / MANIFEST, FORMAT, KIND, COMMAND)["settings"].get("backend")
    return backend if backend in HERE else None


@dataclass(frozen=True, slots=True)
class ShardJob:
    """The shards of a batch.

    Attributes:
        rows: all prompts.
        spec: for the processes that make shards.
        baco: the pair, where this process makes them.
    """

    rows: Sequence[Row]
    spec: ShardSpec
    baco: "Baco | None" = None
    ordered = False

    def held(self) -> AbstractContextManager[None]:
        """Hold the directory for this process; BacoError where another command writes to it."""
        return locked(self.spec.output.path)

    def missing(self) -> tuple[list[tuple[range, Sequence[Row]]], int]:
        """See `baco.batch.job.Output`."""
        output = self.spec.output
        for left in output.folder.glob(".*.partial"):
            left.unlink(missing_ok=True)
        names = {entry.name for entry in os.scandir(output.folder)}
        shards = [shard for shard in output.shards() if output.file(shard).name not in names]
        pieces = [(shard, self.rows[shard.start : shard.stop]) for shard in shards]
        return pieces, output.rows - sum(map(len, shards))

    def keep(self, result: ShardResult) -> None:
        """The process that made a shard has written it."""

    @property
    def worker(self) -> "Callable[[Advance | None], Replica]":
        """Makes a process ready for shards."""
        return partial(Replica, self.spec, self.baco)


class Replica:
    """One copy of the pair, and the shards that it makes.

    Args:
        spec: of the batch.
        baco: the pair; None: it is loaded for the first shard, and checked against the manifest.
        advance: receives the progress after each answer.
    """

    def __init__(
        self, spec: ShardSpec, baco: "Baco | None" = None, advance: Advance | None = None
    ) -> None:
        self.spec = spec
        self._baco, self._advance = baco, advance or ignore

    @property
    def baco(self) -> "Baco":
        """The pair."""
        if self._baco is None:
            self._check_shared()
            self._baco = self.spec.load.load()
            self._check_same(self._baco)
        return self._baco

    def __call__(self, piece: tuple[range, Sequence[Row]]) -> ShardResult:
        """Answer the rows of a shard and put it in its place; nothing to do where it is there.

        Raises:
            BacoError: a pair that cannot be loaded or is another one, a request that it refuses,
                an answer that broke off, storage that is not shared or cannot be written.
        """
        shard, rows = piece
        started, output, settings = time.perf_counter(), self.spec.output, self.spec.settings
        baco = self.baco
        baco.pair.renderer.date = self.spec.manifest.get("date")
        if output.file(shard).exists():
            return ShardResult(shard)
        answers = answer(baco, rows, settings, self._advance)
        sampling = {name: value for name, value in settings.items() if name != "router"}
        records = [
            {
                "row": number,
                "id": row.kept.get("id", number),
                **record(row.prompt, baco.pair, sampling, completions),
            }
            for number, row, completions in zip(shard, rows, answers, strict=True)
        ]
        if output.dataset is not None:
            records = list(output.dataset.rows(records, rows, answers))
        output.write(shard, records)
        errors = [
            f"{row.where}: {error}"
            for row, completions in zip(rows, answers, strict=True)
            if (error := next((c.error for c in completions if c.error), None)) is not None
        ]
        tokens = sum(len(c.token_ids) for completions in answers for c in completions)
        seconds = time.perf_counter() - started
        return ShardResult(shard, tokens, seconds, len(errors), "".join(errors[:1]))

    def _check_shared(self) -> None:
        path = self.spec.output.path
        try:
            seen = read_manifest(path / MANIFEST, FORMAT, KIND, COMMAND)
        except BacoError:
            seen = {}
        if seen != self.spec.manifest:
            raise BacoError(
                f"{platform.node()} does not see the manifest of {path}: give a directory on "
                "storage that all nodes share, by a path that is the same on all of them"
            )

    def _check_same(self, baco: "Baco") -> None:
        for name, here in (
            ("fingerprint", baco.pair.fingerprint),
            ("weights", baco.pair.weights_formats),
        ):
            if here != (begun := self.spec.manifest["settings"][name]):
                raise BacoError(
                    f"{platform.node()} holds another pair than the batch was begun with "
                    f"({name} {here}, not {begun}): make its files, device and dtype the same"
                )
