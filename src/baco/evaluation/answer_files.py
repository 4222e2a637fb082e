"""Files of prompts and answers that any program wrote: JSONL, JSON, CSV, TSV or Parquet.

A row has a prompt with all its answers, or one answer; rows of one prompt are joined. Columns are
recognised by the names in `PROMPT`, `ANSWERS` and `ANSWER`.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.errors import BacoError, one_line
from baco.evaluation.records import Prompt
from baco.files import read_csv

PROMPT = ("prompt", "question", "instruction", "input", "query", "messages")
ANSWERS = ("answers", "generations", "responses", "completions", "outputs", "samples")
ANSWER = ("answer", "generation", "response", "completion", "output", "text")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class AnswerFile:
    """Prompts and their answers.

    Attributes:
        name: of the file.
        prompts: each once, in order of appearance.
        answers: of each prompt, [prompts][answers].
    """

    name: str
    prompts: Sequence[Prompt]
    answers: Sequence[Sequence[str]]

    @property
    def fewest(self) -> int:
        """The fewest answers to a prompt."""
        return min(map(len, self.answers))

    @property
    def most(self) -> int:
        """The most answers to a prompt."""
        return max(map(len, self.answers))


def read_answers(path: Path) -> AnswerFile:
    """The prompts and answers of a file.

    Raises:
        BacoError: it cannot be read, or a row lacks a prompt or an answer.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BacoError(f"{path}: its name must end in one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return _joined(str(path), _parquet(path))
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BacoError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BacoError(f"{path} is not valid UTF-8") from error
    return _of_text(str(path), text, suffix)


def parse_answers(text: str) -> AnswerFile:
    """The prompts and answers of standard input: JSON lines, one JSON list, or CSV with a heading.

    Raises:
        BacoError: as `read_answers`.
    """
    start = text.lstrip("\ufeff \t\r\n")[:1]
    return _of_text("standard input", text, {"{": ".jsonl", "[": ".json"}.get(start, ".csv"))


def _of_text(name: str, text: str, suffix: str) -> AnswerFile:
    text = text.removeprefix("\ufeff")
    if suffix in (".csv", ".tsv"):
        return _joined(name, _csv(name, text, "\t" if suffix == ".tsv" else ","))
    if suffix == ".json":
        return _joined(name, _json(name, text))
    return _joined(name, _jsonl(name, text))


def _jsonl(name: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(text.split("\n"), 1):
        if row.strip():
            where = f"{name}, line {number}"
            try:
                yield where, json.loads(row)
            except (ValueError, RecursionError) as error:
                raise BacoError(f"{where}: give a JSON object on every line") from error


def _json(name: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BacoError(f"{name}: give a JSON list of objects ({one_line(error)})") from error
    if not isinstance(rows, list):
        raise BacoError(f"{name}: give a JSON list of objects, or JSON lines (.jsonl)")
    for number, row in enumerate(rows, 1):
        yield f"{name}, entry {number}", row


def _csv(name: str, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    _, rows = read_csv(io.StringIO(text, newline=""), name, delimiter)
    return ((f"{name}, line {line}", row) for line, row in rows)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise BacoError("Parquet needs a library: pip install 'baco[evaluation]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise BacoError(f"{path} is not a Parquet file: {one_line(error)}") from error


def _joined(name: str, rows: Iterator[tuple[str, Any]]) -> AnswerFile:
    """The rows of each prompt together."""
    prompts: dict[str, Prompt] = {}
    answers: dict[str, list[str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise BacoError(f"{where}: give an object with a prompt and its answers")
        messages = _messages(row, where)
        key = json.dumps(messages)
        if key not in prompts:
            label = row.get("id")
            number = str(len(prompts) + 1) if label in (None, "") else str(label)
            prompts[key] = Prompt(number, tuple(messages))
            answers[key] = []
        answers[key] += _answers(row, where)
    if not prompts:
        raise BacoError(f"{name} holds no answers")
    return AnswerFile(name, list(prompts.values()), list(answers.values()))


def _messages(row: Mapping[str, Any], where: str) -> list[Any]:
    """The conversation of a row."""
    name = _column(row, PROMPT)
    if name is None:
        raise BacoError(f"{where}: no prompt; name its column {_listed(PROMPT)}")
    value = row[name]
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if isinstance(value, list) and value:
        turns = [turn for turn in value if isinstance(turn, dict)]
        if len(turns) == len(value) and all(
            isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")
        ):
            return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    raise BacoError(f"{where}: {name!r} is {_short(value)}; give a text, or a list of messages")


def _answers(row: Mapping[str, Any], where: str) -> list[str]:
    """The answers of a row: a list of them, or one."""
    name = _column(row, ANSWERS)
    if name is not None:
        value = row[name]
        if isinstance(value, str):  # a list in a cell of CSV
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if isinstance(value, list) and value:
            return [_text(answer, name, where) for answer in value]
        raise BacoError(f"{where}: {name!r} is {_short(row[name])}; give a list of texts")
    name = _column(row, ANSWER)
    if name is None:
        raise BacoError(
            f"{where}: no answer; name the column {_listed(ANSWERS)} (a list) or {_listed(ANSWER)} "
            "(one of them)"
        )
    return [_text(row[name], name, where)]


def _text(answer: Any, name: str, where: str) -> str:
    """An answer's text; answers of `baco batch` are objects with one."""
    text = answer.get("text") if isinstance(answer, dict) else answer
    if not isinstance(text, str):
        raise BacoError(f"{where}: {name!r} has {_short(answer)} for an answer; give a text")
    return text


def _column(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
