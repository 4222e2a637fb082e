"""Prompts from files: JSONL, CSV, Parquet, or text with a prompt on each line.

A prompt template writes the prompts of rows that have none: it is filled with a row's columns.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.files import read_csv
from baco.text.prompts import conversation, template_source
from baco.text.templates import Template, TemplateFailedError, today

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet", ".txt")
PROMPT = ("prompt", "messages")
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
        columns: its other columns, where they were asked for.
    """

    line: int
    prompt: Any
    kept: dict[str, Any]
    path: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """File and line, for error messages."""
        return f"{self.path}, line {self.line}"


def prompt_template(given: str) -> Template:
    """The prompt template that a user gave: Jinja text, or a file with it.

    Raises:
        BacoError: the file cannot be read, or the text is not valid Jinja.
    """
    source = template_source(given)
    template = Template("prompt", source, "the prompt template" + f" {given}" * (source != given))
    with suppress(TemplateFailedError):
        template.render({}, today())
    return template


def read_rows(
    paths: Iterable[Path], template: Template | None = None, *, keep_columns: bool = False
) -> list[Row]:
    """The rows of files and folders, checked; the files of a folder are sorted by name.

    Args:
        paths: the files and folders.
        template: of :func:`prompt_template`; it writes every prompt.
        keep_columns: keep the columns that are neither prompt nor id; with a template, all but the
            id. Otherwise they are read for the template alone.

    Raises:
        BacoError: a file cannot be read, there is no prompt, or rows are invalid, with their lines.
    """
    files = [file for path in paths for file in _files(path)]
    rows: list[Row] = []
    bad: list[tuple[str, int, str]] = []
    for file in files:
        try:
            for line, value in values(file, keep_columns, template is not None):
                try:
                    rows.append(_row(file, line, value, template, keep_columns))
                except BacoError as error:
                    bad.append((str(file), line, str(error)))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BacoError(f"cannot read {file}: {reason}") from error
    if bad:
        raise BacoError(_describe(bad))
    if not rows:
        named = ", ".join(map(str, files))
        lines = 'lines such as {"prompt": "…"}' if template is None else "rows for the template"
        raise BacoError(f"{named} holds no prompt: give {lines}")
    return rows


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise BacoError(f"{path} holds no file of prompts: give {', '.join(SUFFIXES)}")
    return files


def values(path: Path, keep_columns: bool, templated: bool) -> Iterator[tuple[int, Any]]:
    """The number and the JSON value of each line that is not empty; None where it is not JSON.

    Args:
        path: of the file.
        keep_columns: read all columns of a table, not only prompt and id.
        templated: no column must be a prompt.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _from_parquet(path, keep_columns or templated, templated)
        return
    if suffix == ".csv":
        yield from _from_csv(path, templated)
        return
    # A line ends with \n alone: a JSON text may hold U+2028 and others that Python splits at.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if suffix == ".txt":
                yield number, {"prompt": line.strip()}
            else:
                yield number, _json(line)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _from_csv(path: Path, templated: bool) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        columns, rows = read_csv(file, path)
        if not templated and "prompt" not in columns:
            raise BacoError(f"{path} has no column prompt: {_without_prompt(columns)}")
        yield from rows


def _without_prompt(columns: Iterable[str]) -> str:
    """What to do about a table without prompts."""
    listed = ", ".join(columns)
    return f"rename one of {listed}, or give a prompt template" if listed else "it is empty"


def _from_parquet(path: Path, all_columns: bool, templated: bool) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise BacoError(f"{path} needs a library: pip install pyarrow") from error
    try:
        file = pq.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise BacoError(f"{path} is not a Parquet file: {error}") from error
    names = file.schema_arrow.names
    columns = [name for name in names if all_columns or name in (*PROMPT, "id")]
    if not templated and not set(PROMPT) & set(columns):
        todo = _without_prompt(names)
        raise BacoError(f"{path} has neither a column prompt nor messages: {todo}")
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield number, {name: value for name, value in row.items() if value is not None}


def _row(path: Path, line: int, value: Any, template: Template | None, keep_columns: bool) -> Row:
    """A checked row. Its other columns are JSON values; what JSON does not have becomes a text.

    Raises:
        BacoError: it has no prompt, or the template needs a column that it does not have.
    """
    if not isinstance(value, dict) or not (
        template is not None
        or isinstance(value.get("prompt"), str)
        or isinstance(value.get("messages"), list)
    ):
        needed = '"prompt" (text) or "messages" (a list)'
        lines = "" if path.suffix.lower() in SUFFIXES else f"; {path.name} is read as JSON lines"
        raise BacoError(f"give a JSON object{f' with {needed}' * (template is None)}{lines}")
    if template is not None:
        prompt = _filled(template, value)
    else:
        prompt = value["prompt"] if isinstance(value.get("prompt"), str) else value["messages"]
    conversation(prompt)
    kept = {"id": value["id"]} if value.get("id") is not None else {}
    consumed = ("id",) if template is not None else ("id", *PROMPT)
    columns = {k: v for k, v in value.items() if keep_columns and k not in consumed}
    columns = json.loads(json.dumps(columns, default=str))
    try:
        json.dumps([prompt, kept, columns], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BacoError("a lone surrogate is not a character") from error
    except TypeError as error:
        raise BacoError("the id must be a text or a number") from error
    return Row(line, prompt, kept, str(path), columns)


def _filled(template: Template, columns: Mapping[str, Any]) -> str:
    """The prompt of a row. In the template, ``row`` has all columns by their names."""
    try:
        return template.render({"row": columns, **columns}, today()).text
    except TemplateFailedError as error:
        raise BacoError(f"{error}; the row has {', '.join(columns) or 'none'}") from error


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
