"""Resumable jobs: pieces of work, an output on disk, and the processes that do the work.

A job may be stopped at any moment; the same command continues it. Its manifest holds everything
that the results depend on, so that a job of other settings is refused. The output belongs to one
process at a time. Results are written whole, and those on disk are checked before they count as
done. This module knows nothing of prompts and models.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import takewhile
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

from baco.errors import BacoError
from baco.files import LOCK, locked, write_atomic
from baco.sampling.seeds import check_version

Piece = TypeVar("Piece")
Piece_co = TypeVar("Piece_co", covariant=True)
Result = TypeVar("Result")

# Receives progress: how many prompts were done, a fraction for some answers to one, and tokens.
Advance = Callable[[float, int], None]
# Called once in each process; returns the function that is called for each piece. Its argument
# receives the progress within pieces; it is None in worker processes.
Worker = Callable[[Advance | None], Callable[[Piece], Result]]
# Gives the results of pieces.
Map = Callable[[Iterable[Piece]], Iterator[Result]]

# The part of a path that was an address such as s3://bucket.
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")
# Pieces that wait at each worker process.
AHEAD = 2


# Where pieces are carried out.


class Executor(Protocol):
    """Carries out the pieces of a job: in this process, in its children or on a cluster."""

    def workers(
        self, worker: Worker[Piece, Result], advance: Advance | None = None, *, ordered: bool = True
    ) -> "AbstractContextManager[Map[Piece, Result]]":
        """Start workers, and stop them at the end of the block.

        Args:
            worker: prepares each process.
            advance: given to a worker in this process.
            ordered: results come in the order of their pieces, otherwise as they are ready.
        """


class LocalExecutor:
    """Carries out pieces in this process, one after the other."""

    @contextmanager
    def workers(
        self,
        worker: Worker[Piece, Result],
        advance: Advance | None = None,
        *,
        ordered: bool = True,  # noqa: ARG002 (there is one order)
    ) -> "Iterator[Map[Piece, Result]]":
        """See `Executor`."""
        yield partial(map, worker(advance or ignore))


class ProcessExecutor:
    """Carries out pieces in processes of this machine.

    Attributes:
        count: of processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    @contextmanager
    def workers(
        self,
        worker: Worker[Piece, Result],
        advance: Advance | None = None,  # noqa: ARG002 (the caller counts results)
        *,
        ordered: bool = True,
    ) -> "Iterator[Map[Piece, Result]]":
        """See `Executor`."""
        start = partial(_start_child, worker)
        pool = futures.ProcessPoolExecutor(self.count, get_context("spawn"), start)
        try:
            yield partial(hand_out, pool, self.count, ordered)
        finally:
            pool.shutdown(cancel_futures=True)


def processes(count: int) -> Executor:
    """An executor in this process for a count of 1, else one with that many processes."""
    return LocalExecutor() if count == 1 else ProcessExecutor(count)


def hand_out(
    pool: futures.Executor, workers: int, ordered: bool, pieces: Iterable[Piece]
) -> Iterator[Any]:
    """The results of pieces from processes that called `start_worker`, a few of them at a time."""
    pending: list[futures.Future[Any]] = []

    def ready() -> futures.Future[Any]:
        if ordered:
            return pending.pop(0)
        finished = next(futures.as_completed(pending))
        pending.remove(finished)
        return finished

    for piece in pieces:
        pending.append(pool.submit(_carry_out, piece))
        if len(pending) >= workers * AHEAD:
            yield ready().result()
    while pending:
        yield ready().result()


class _Process:
    """What a worker process calls for each piece."""

    function: Callable[[Any], Any]


def start_worker(worker: Worker[Any, Any]) -> None:
    """Prepare a worker process for pieces of `hand_out`."""
    _Process.function = staticmethod(worker(None))


def _carry_out(piece: Any) -> Any:
    return _Process.function(piece)


def _start_child(worker: Worker[Any, Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start_worker(worker)


def _end_with_parent() -> None:
    """End this process when its parent ends; a parent that is killed cannot end it."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def ignore(_: float, __: int) -> None:
    """Discard progress."""


# The job.


class Progress(Protocol):
    """Shows how far a job is."""

    def skip(self, there: int) -> None:
        """Count prompts that an earlier run answered."""

    def advance(self, done: float, tokens: int) -> None:
        """Count prompts and tokens that are newly done."""


class Counted(Protocol):
    """The result of a piece, as far as the engine reads it."""

    @property
    def prompts(self) -> int:
        """Prompts that were answered."""

    @property
    def tokens(self) -> int:
        """Tokens that were drawn for them."""


R = TypeVar("R", bound=Counted)
R_contra = TypeVar("R_contra", bound=Counted, contravariant=True)


class Output(Protocol[Piece_co, R_contra]):
    """Where the results of a job are kept. The caller holds its lock.

    Attributes:
        ordered: results are kept in the order of their pieces.
    """

    ordered: bool

    def missing(self) -> tuple[Sequence[Piece_co], int]:
        """The pieces that are still to do, and the prompts of the others.

        What is on disk is checked; what a killed run left unfinished is removed.
        """

    def keep(self, result: R_contra) -> None:
        """Write a result so that a kill leaves all of it or nothing that counts as done."""


def carry_out(
    output: Output[Piece, R],
    worker: Worker[Piece, R],
    executor: Executor,
    progress: Progress | None = None,
) -> Iterator[R]:
    """Carry out the pieces that are missing, and yield each result when it is kept.

    Raises:
        BacoError: whatever a piece raises; the results before it are kept.
    """
    pieces, done = output.missing()
    if progress is not None:
        progress.skip(done)
    if not pieces:
        return
    here = isinstance(executor, LocalExecutor)
    advance = ignore if progress is None else progress.advance
    with executor.workers(worker, advance, ordered=output.ordered) as results:
        for result in results(pieces):
            output.keep(result)
            if not here:
                advance(result.prompts, result.tokens)
            yield result


# Manifests.


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_settings(
    output: Path, begun: Mapping[str, Any], asked: Mapping[str, Any], other: str
) -> None:
    """Check that an output can be continued.

    Args:
        output: the file or folder.
        begun: the settings in its manifest.
        asked: those of this command, as JSON has them.
        other: what to choose instead, such as ``another directory``.

    Raises:
        BacoError: another version of the noise, or other settings, with their names.
    """
    check_version(begun.get("noise"), output)
    names = asked.keys() | begun.keys()
    if differing := sorted(name for name in names if asked.get(name) != begun.get(name)):
        raise BacoError(
            f"{output} was begun with other settings ({', '.join(differing)}): give the same "
            f"ones to continue it, or choose {other}"
        )


def check_folder(path: Path, files: Iterable[str], kind: str, other: str) -> None:
    """Check that a folder is a job's, empty, or not there.

    Args:
        path: of the folder.
        files: those that a job is begun with, the manifest last.
        kind: of job, such as ``batch``.
        other: what to choose instead.

    Raises:
        BacoError: it is a file, holds something else, or is an address such as ``s3://…``.
    """
    *_, manifest = names = tuple(files)
    if not path.exists():
        scheme = next((part for part in path.parts if _SCHEME.fullmatch(part)), None)
        if scheme is not None:  # it would be made as a folder of this name
            raise BacoError(f"{scheme}//… is not a folder: mount that storage, or choose {other}")
        return
    if (path / manifest).exists():
        return
    # A job that was killed when it began leaves some of its first files, whole or partial.
    if not path.is_dir() or not all(f.name.startswith((LOCK, *names)) for f in path.iterdir()):
        raise BacoError(f"{path} is there already and holds no {kind}: choose {other}")


def begin_folder(path: Path, files: Mapping[str, str], kind: str, other: str) -> bool:
    """Make a job's folder with its first files; arguments as for `check_folder`.

    Returns:
        Whether the manifest was there already; it is then left alone.

    Raises:
        BacoError: as for `check_folder`, a folder that cannot be written or that another process
            writes to.
    """
    check_folder(path, files, kind, other)
    *_, manifest = files
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Two commands of different settings must not begin one folder together.
        with locked(path):
            if (path / manifest).exists():
                return True
            for name, content in files.items():
                write_atomic(path / name, content)
    except OSError as error:
        raise BacoError(f"cannot write {path}: {error.strerror}") from error
    return False


def as_manifest(value: Mapping[str, Any]) -> str:
    """A manifest as the text of its file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_manifest(path: Path, version: int, kind: str, command: str) -> dict[str, Any]:
    """The manifest of a folder.

    Args:
        path: of the manifest.
        version: of its format.
        kind: of job.
        command: the command that makes such folders.

    Raises:
        BacoError: there is none, or one of another format.
    """
    folder = path.parent
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BacoError(
            f"{folder} holds no {kind}: give the directory that '{command}' made"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != version:
        raise BacoError(f"{folder} holds a {kind} of another format: this baco reads {version}")
    if "settings" not in manifest:
        raise BacoError(f"{path} is damaged: it has no settings; choose another directory")
    return manifest


# Files of lines, which a killed process may have left with a part of one at their end.


def line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def append(path: Path, lines: Iterable[str]) -> None:
    """Append lines, and wait until they are on the disk."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def cut_back(path: Path, rows: int) -> None:
    """Keep the first `rows` lines of a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        for _ in range(rows):
            file.readline()
        file.truncate(file.tell())


def count_matching(path: Path, expected: Iterable[Mapping[str, Any]]) -> int:
    """Lines at the beginning of a file that are the expected ones, in order.

    Args:
        path: a file of JSON lines; one that is not there has no lines.
        expected: the fields that each line must have, with their values.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(takewhile(bool, map(matches, file, expected)))


def matches(text: bytes, expected: Mapping[str, Any]) -> bool:
    """Whether a line is whole, and a JSON object with these fields."""
    if not text.endswith(b"\n"):
        return False
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and all(row.get(name) == expected[name] for name in expected)
