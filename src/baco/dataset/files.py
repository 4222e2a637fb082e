"""The files and rows of a dataset: JSON lines, CSV or Parquet, by whatever program."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.batch.rows import values
from baco.errors import BacoError
from baco.evaluation.answer_files import ANSWER, ANSWERS, PROMPT
from baco.text.invalid_characters import fault_of

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a dataset.

    Attributes:
        prompt: the prompt as a text that is equal for equal prompts; empty if there is none.
        text: the answer.
        row: the columns of its row; of nested answers, those of the answer.
    """

    prompt: str
    text: str
    row: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset on disk.

    Attributes:
        path: the folder or file that the user named.
        files: its files of rows, in the order of their names.
        column: the column that holds the answers; None: the first of the usual names that a row
            has.
        nested: whether a row may have a list of answers.
    """

    path: Path
    files: tuple[Path, ...]
    column: str | None = None
    nested: bool = True

    @classmethod
    def open(cls, path: Path, column: str | None = None, *, nested: bool = True) -> "Dataset":
        """The dataset in a folder or a file. A folder's files are in it, or in ``data`` in it.

        Raises:
            BacoError: there are none.
        """
        if not path.is_dir():
            if not path.exists():
                raise BacoError(f"{path} is not there: give a file or the folder of a dataset")
            if path.suffix.lower() not in SUFFIXES:
                raise BacoError(f"{path}: its name must end in one of {', '.join(SUFFIXES)}")
            return cls(path, (path,), column, nested)
        for folder in (path / "data", path):
            if folder.is_dir() and (files := _files(folder)):
                return cls(path, files, column, nested)
        raise BacoError(f"{path} holds no file of rows: give {', '.join(SUFFIXES)}")

    @property
    def card(self) -> Path | None:
        """Its dataset card, if it has one."""
        card = self.path / CARD
        return card if card.is_file() else None

    def answers(self, file: Path) -> Iterator[Answer]:
        """The answers of a file in order, those of nested rows one after the other.

        Raises:
            BacoError: it cannot be read, or a row has no answer or is not Unicode text.
        """
        for where, row in rows(file):
            prompt = _prompt(row)
            name = self.column or _column(row, (*ANSWERS, *ANSWER))
            value = row.get(name) if name is not None else None
            if isinstance(value, list) and not self.nested:
                raise BacoError(
                    f"{where}: {name!r} is a list; give one answer a row, as baco batch --dataset "
                    "writes them"
                )
            for answer in value if isinstance(value, list) else [value]:
                text, own = answer, row
                if isinstance(answer, dict):
                    text, own = answer.get("text"), answer
                if not isinstance(text, str):
                    raise BacoError(f"{where}: {self._missing(name)}")
                if (fault := fault_of(prompt + text)) is not None:
                    raise BacoError(f"{where} {fault}")
                yield Answer(prompt, text, own)

    def __iter__(self) -> Iterator[Answer]:
        for file in self.files:
            yield from self.answers(file)

    def _missing(self, name: str | None) -> str:
        if name is None:
            return f"no answer; name its column {', '.join(ANSWER)}, or give --column"
        return f"the column {name!r} holds no text; give another one by --column"


def rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file with its place, for messages.

    Raises:
        BacoError: the file cannot be read, or a row is not a JSON object.
    """
    try:
        for line, value in values(file, keep_columns=True, templated=True):
            where = f"{file}, line {line}"
            if not isinstance(value, dict):
                raise BacoError(f"{where}: give a JSON object")
            yield where, value
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BacoError(f"cannot read {file}: {reason}") from error


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith((".", "_"))
    )


def _prompt(row: Mapping[str, Any]) -> str:
    name = _column(row, PROMPT)
    if name is None:
        return ""
    value = row[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _column(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)
