"""Rows of data sets, from a file or from the hub."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.batch import rows as prompt_rows
from baco.errors import BacoError, one_line
from baco.models import hub


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, its number from 1, and its place for error messages."""

    values: Mapping[str, Any]
    number: int
    where: str


def from_file(path: Path) -> Iterator[Row]:
    """Rows of a JSONL, CSV or Parquet file, of a JSON object by id, or the lines of a text file.

    Raises:
        BacoError: a file that cannot be read, or a line that is not a JSON object.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".parquet"):
            for number, row in prompt_rows.values(path, keep_columns=True, templated=True):
                yield Row(row, number, f"{path}, line {number}")
            return
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BacoError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BacoError(f"{path} is not valid UTF-8: give lines of text, or JSONL") from error
    # Not splitlines(): a JSON text may hold U+2028 and other characters that Python splits at.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".json":
        yield from _by_id(path, text)
    elif suffix in (".jsonl", ".ndjson"):
        for number, line in lines:
            where = f"{path}, line {number}"
            yield Row(_object(line, where), number, where)
    else:
        for number, line in lines:
            yield Row({"prompt": line.strip()}, number, f"{path}, line {number}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BacoError(f"{where}: half a surrogate pair is not a character") from error
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise BacoError(f'{where}: give a JSON object with "prompt" (text) or "messages" (a list)')
    return row


def _by_id(path: Path, text: str) -> Iterator[Row]:
    """The entries of one JSON object, whose keys are ids, or of a list."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BacoError(f"{path} is not JSON: give JSONL, one object on each line") from error
    if not isinstance(content, dict | list):
        raise BacoError(f"{path}: give a JSON object of prompts by id, or a list of them")
    entries = content.items() if isinstance(content, dict) else enumerate(content, 1)
    for number, (key, entry) in enumerate(entries, 1):
        where = f"{path}, entry {key!r}"
        if not isinstance(entry, dict):
            raise BacoError(f'{where}: give a JSON object with "prompt" (text)')
        own = {"id": key, "narrative_id": key} if isinstance(content, dict) else {}
        yield Row(own | entry, number, where)


def from_hub(name: str, source: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of a data set on the hub, as `source` selects them.

    Raises:
        BacoError: the library is not installed, or the data set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BacoError(
            "reading a data set needs a library: pip install 'baco[evaluation]'"
        ) from error
    place = str(source["hub"])
    instead = f"connect to the hub once, or give a local copy as {name}=PATH (JSONL)"
    try:
        with hub.reading():
            rows = iter(
                load_dataset(
                    place,
                    source.get("config"),
                    split=source.get("split", "test"),
                    streaming=bool(source.get("streaming", False)),
                )
            )
        yield from _wanted(place, rows, source.get("where", {}))
    except BacoError:
        raise
    except Exception as error:  # the library and what it reads with raise many kinds
        reason = hub.out_of_reach() or one_line(error)
        raise BacoError(
            f"task {name!r} cannot be read from {place} ({reason}): {instead}"
        ) from error


def _wanted(place: str, rows: Iterator[Any], where: Mapping[str, Any]) -> Iterator[Row]:
    for number, values in enumerate(rows, 1):
        if all(values.get(column) == value for column, value in where.items()):
            yield Row(values, number, f"{place}, row {number}")
