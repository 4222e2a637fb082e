"""The directory of a batch: a manifest that describes it, and shards.

    _manifest.json                             settings, seed, inputs, versions
    rows-000000000-000000127.parquet           the answers to these rows, the first and the last
    …

Every file comes into its place in one step, under a name that follows from what it holds: so any
number of processes on any number of machines may write, be killed, and write again.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.batch.formats import Format, encode
from baco.errors import BacoError
from baco.files import NAME as LOCK
from baco.files import locked, write_atomic
from baco.sampling.seeds import check_version

FORMAT = 1
# Readers of a folder of Parquet leave out what begins with an underscore.
MANIFEST = "_manifest.json"
ATTEMPTS = ".attempts"
# So often may a shard take the process that makes it down before it is given up.
MOST_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Output:
    """Where shards go.

    Attributes:
        path: the directory, on storage that every writer sees.
        form: of the shards.
        rows: of all shards together.
        rows_a_shard: the last may have fewer.
    """

    path: Path
    form: Format
    rows: int
    rows_a_shard: int

    def shards(self) -> list[range]:
        """The rows of every shard."""
        size = self.rows_a_shard
        return [range(a, min(a + size, self.rows)) for a in range(0, self.rows, size)]

    def file(self, shard: range) -> Path:
        """Where a shard is, or is to be."""
        return self.path / f"rows-{shard.start:09d}-{shard.stop - 1:09d}.{self.form}"

    def missing(self) -> list[range]:
        """The shards that are not there."""
        there = {entry.name for entry in os.scandir(self.path)}
        return [shard for shard in self.shards() if self.file(shard).name not in there]

    def write(self, shard: range, records: Sequence[Mapping[str, Any]]) -> None:
        """Put a shard in its place, whole, on the disk."""
        target = self.file(shard)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                file.write(encode(records, self.form))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            raise BacoError(f"cannot write {target}: {error.strerror}") from error

    @contextmanager
    def attempt(self, shard: range) -> Iterator[None]:
        """Count who begins a shard and does not live to end it.

        Raises:
            BacoError: too many have not.
        """
        counter = self.path / ATTEMPTS / self.file(shard).stem
        counter.parent.mkdir(exist_ok=True)
        with counter.open("ab") as file:
            file.write(b".")
            begun = file.tell()
        if begun > MOST_ATTEMPTS:
            raise BacoError(
                f"rows {shard.start} to {shard.stop - 1} ended their process {MOST_ATTEMPTS} times"
                ": out of memory? Lower --max-rows or --memory, and run the command again"
            )
        yield
        counter.unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory for one driver; what killed writers left is swept out.

        Raises:
            BacoError: another command writes to it.
        """
        with locked(self.path):
            for left in self.path.glob(".*.partial"):
                left.unlink(missing_ok=True)
            self._forget_attempts()
            yield
            self._forget_attempts()

    def _forget_attempts(self) -> None:
        folder = self.path / ATTEMPTS
        if folder.is_dir():
            for counter in folder.iterdir():
                counter.unlink(missing_ok=True)
            folder.rmdir()


def refuse_other(path: Path) -> None:
    """BacoError where a directory holds something that no batch left: told before any model loads.

    Raises:
        BacoError: it does, or it is no directory.
    """
    if not path.exists():
        return
    if not path.is_dir() or (
        not (path / MANIFEST).exists() and any(not _begun(file.name) for file in path.iterdir())
    ):
        raise BacoError(f"{path} is there already and holds no batch: choose another directory")


def _begun(name: str) -> bool:
    return name == LOCK or name.startswith(MANIFEST)


def read_manifest(path: Path) -> dict[str, Any]:
    """What a directory says of itself.

    Raises:
        BacoError: it holds no batch, or one of another format.
    """
    try:
        told = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BacoError(f"{path} holds no batch: give the directory 'baco batch' made") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise BacoError(f"{path} holds a batch of another format: this baco reads {FORMAT}")
    return told


def begin(
    path: Path, settings: Mapping[str, Any], seed: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Make the manifest of a directory, or read the one of the same settings.

    Args:
        path: the directory; it is made where it is not there.
        settings: all that the rows hang on.
        seed: of the draws where ``settings["seed"]`` is None and nothing was begun.
        more: what does not count when a batch goes on.

    Returns:
        The manifest, with the seed of whoever began it.

    Raises:
        BacoError: a batch of other settings, a directory that cannot be written, or one that
            another process writes to.
    """
    told = json.loads(json.dumps(settings))
    refuse_other(path)
    made = {"format": FORMAT, "settings": told, "seed": seed, **more}
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Two commands of different settings must not begin one directory together.
        with locked(path):
            if (path / MANIFEST).exists():
                return _continued(path, told)
            write_atomic(path / MANIFEST, json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise BacoError(f"cannot write {path}: {error.strerror}") from error
    return made


def _continued(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest that is there; BacoError where its settings are others than ``settings``."""
    begun = read_manifest(path)
    check_version(begun["settings"].get("noise"), path)
    names = settings.keys() | begun["settings"].keys()
    differing = sorted(n for n in names if settings.get(n) != begun["settings"].get(n))
    if differing:
        raise BacoError(
            f"{path} holds a batch of other settings ({', '.join(differing)}): give the same "
            "ones to go on with it, or choose another directory"
        )
    return begun
