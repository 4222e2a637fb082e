"""Files that users name: locks of outputs, atomic writes, and CSV.

The lock of an output lets one process at a time write to it. It is a lock of the operating system
on a file beside the output. The system releases it when the process ends, however it ends, so a
lock file that is left behind blocks no later run.
"""

import csv
import errno
import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

from baco.errors import BacoError, one_line

log = logging.getLogger("baco")

LOCK = ".lock"
# Errors of file systems without locks, such as some shared ones.
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


@contextmanager
def locked(output: Path, *, wait: float = 0) -> Iterator[None]:
    """Hold an output for writing. It is not reentrant: a second lock in this process fails too.

    Args:
        output: a directory, locked by ``.lock`` in it, or the path of a file, locked by
            ``NAME.lock`` beside it; the latter lock file is removed again.
        wait: seconds to wait for another process that holds it.

    Raises:
        BacoError: another process holds it, or the lock file cannot be written.
    """
    from filelock import FileLock, Timeout

    is_folder = output.is_dir()
    path = output / LOCK if is_folder else output.with_name(output.name + LOCK)
    lock = FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except Timeout as error:
        raise BacoError(
            f"another process writes to {output}: wait until it has ended, or choose another output"
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise BacoError(f"cannot write {path}: {error.strerror}") from error
        log.warning(
            "%s has no locks (%s): do not start a second run on it", path.parent, error.strerror
        )
    try:
        yield
    finally:
        if not is_folder:
            # Before the release: a process that has opened this file sees that it lost its name,
            # and tries again.
            with suppress(OSError):
                path.unlink(missing_ok=True)
        lock.release()


def user_path(name: str) -> Path:
    """The path that a user wrote, which may begin with ``~``.

    Raises:
        BacoError: ``~`` names a user without a home folder here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise BacoError(f"{name}: no such user has a home folder here") from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one.

    Text is UTF-8 with plain line ends.

    Raises:
        OSError: it cannot be written; no partial file is left behind.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_output(path: Path, content: str) -> None:
    """`write_atomic` for a file that the user named; BacoError where it cannot be written."""
    try:
        write_atomic(path, content)
    except OSError as error:
        raise BacoError(f"cannot write {path}: {error.strerror}") from error


def read_csv(
    file: TextIO, name: object, delimiter: str = ","
) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """The columns of a CSV file, and its rows by line number; a row that ends early lacks cells.

    Args:
        file: opened with ``newline=""``; read as the rows are.
        name: of the file, for messages.
        delimiter: between cells.

    Raises:
        BacoError: it is damaged, a row has too many cells, or two columns have one name.
    """
    allow_long_cells()
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        with _csv_errors(name, reader):
            for row in reader:
                if None in row:
                    raise BacoError(f"{name}, line {reader.line_num}: more cells than columns")
                yield reader.line_num, {key: cell for key, cell in row.items() if cell is not None}

    with _csv_errors(name, reader):
        columns = list(reader.fieldnames or ())
    named = Counter(filter(None, columns))  # spreadsheets leave columns without a name
    twice = next((column for column, count in named.items() if count > 1), None)
    if twice is not None:
        raise BacoError(f"{name} has several columns {twice!r}: rename them")
    return columns, rows()


@contextmanager
def _csv_errors(name: object, reader: "csv.DictReader[str]") -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        # DictReader counts a line only once its row is whole.
        raise BacoError(f"{name}, line {reader.reader.line_num}: {one_line(error)}") from error


def allow_long_cells() -> None:
    """Let this process read CSV cells of any length; Python's own limit is 128 KiB."""
    csv.field_size_limit(2**31 - 1)


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """A partial file beside ``path``, for the block to write. At the end of the block it is synced
    to the disk and takes the place of ``path``. An error removes it.

    Args:
        path: the file to write. A symbolic link stays, and the file that it names is written.
        partial: the partial file, for callers that remove what killed writers left. By default its
            name has the process in it, so that two writers do not collide, and the next writer
            removes it after a kill.

    Raises:
        OSError: it cannot be written, or is no file: a device, for instance, would be replaced.
    """
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")
    if path.is_symlink():
        path = path.resolve()
    if partial is None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            writer = left.name.split(".")[-2]
            if writer.isdecimal() and not psutil.pid_exists(int(writer)):
                left.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
