"""Prompts from files: JSONL, Parquet, or text with a prompt on each line."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.text.prompts import conversation

SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".txt")
# Invalid rows that one error names.
NAMED = 10


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, its place in a file, and its ``id`` if it has one.

    Attributes:
        line: of its file, from 1; of a Parquet file, the row.
        prompt: a text or a list of messages.
        kept: ``{"id": …}``, or nothing.
        path: the file.
    """

    line: int
    prompt: Any
    kept: dict[str, Any]
    path: str

    @property
    def where(self) -> str:
        """File and line, for error messages."""
        return f"{self.path}, line {self.line}"


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of files and folders, checked; the files of a folder are sorted by name.

    Raises:
        BacoError: a file cannot be read, there is no prompt, or rows are invalid, with their lines.
    """
    files = [file for path in paths for file in _files(path)]
    rows: list[Row] = []
    bad: list[tuple[str, int, str]] = []
    for file in files:
        try:
            for line, value in _values(file):
                try:
                    rows.append(_row(file, line, value))
                except BacoError as error:
                    bad.append((str(file), line, str(error)))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BacoError(f"cannot read {file}: {reason}") from error
    if bad:
        raise BacoError(_describe(bad))
    if not rows:
        named = ", ".join(map(str, files))
        raise BacoError(f'{named} holds no prompt: give lines such as {{"prompt": "…"}}')
    return rows


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise BacoError(f"{path} holds no file of prompts: give {', '.join(SUFFIXES)}")
    return files


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the JSON value of each line that is not empty; None where it is not JSON."""
    if path.suffix == ".parquet":
        yield from _from_parquet(path)
        return
    # A line ends with \n alone: a JSON text may hold U+2028 and others that Python splits at.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if path.suffix == ".txt":
                yield number, {"prompt": line.strip()}
            else:
                yield number, _json(line)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _from_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BacoError(f"{path} needs a library: pip install pyarrow") from error
    try:
        file = pq.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BacoError(f"{path} is not a Parquet file: {error}") from error
    columns = [name for name in ("prompt", "messages", "id") if name in file.schema_arrow.names]
    if "prompt" not in columns and "messages" not in columns:
        raise BacoError(f"{path} has neither a column prompt nor messages: rename one")
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield number, {name: value for name, value in row.items() if value is not None}


def _row(path: Path, line: int, value: Any) -> Row:
    if not isinstance(value, dict) or not (
        isinstance(value.get("prompt"), str) or isinstance(value.get("messages"), list)
    ):
        raise BacoError('give a JSON object with "prompt" (text) or "messages" (a list)')
    prompt = value["prompt"] if isinstance(value.get("prompt"), str) else value["messages"]
    conversation(prompt)
    kept = {"id": value["id"]} if "id" in value else {}
    try:
        json.dumps([prompt, kept], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BacoError("a lone surrogate is not a character") from error
    except TypeError as error:
        raise BacoError("the id must be a text or a number") from error
    return Row(line, prompt, kept, str(path))


def _describe(bad: list[tuple[str, int, str]]) -> str:
    """One line about the invalid rows, with the reason of the first."""
    path, line, why = bad[0]
    message = f"{path}, line {line}: {why}"
    if more := [
        f"line {line}" if file == path else f"{file}, line {line}" for file, line, _ in bad[1:]
    ]:
        message += f"; {len(more)} more bad: {', '.join(more[:NAMED])}"
        message += ", …" if len(more) > NAMED else ""
    return message
