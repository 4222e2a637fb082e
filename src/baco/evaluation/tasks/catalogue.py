"""Tasks by name, and their prompts."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.evaluation.records import Prompt
from baco.evaluation.tasks import rows, world
from baco.evaluation.tasks.fields import Fields
from baco.plugins import plugins

HUB = "hub:"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task as it is in its TOML file.

    Attributes:
        help: a sentence for lists.
        source: of its rows: ``hub`` (with ``config``, ``split``, ``where``, ``streaming``),
        ``world``
            (the demo world) or ``published`` (a place that the user downloads them from).
        fields: how a row becomes a prompt, see :class:`Fields`.
        max_tokens: of its answers; None for the pair's default.
        limit: the default number of prompts; None for all.
        judge: ``demo`` where the demo world's judge can read the answers.
        verifier: a name in ``VERIFIERS`` where answers are right or wrong.
    """

    name: str
    help: str
    source: Mapping[str, Any]
    fields: Fields = field(default_factory=Fields)
    max_tokens: int | None = None
    limit: int | None = None
    judge: str | None = None
    verifier: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Named prompts, and how their answers are checked; see :class:`TaskFile`."""

    name: str
    source: str
    prompts: tuple[Prompt, ...]
    max_tokens: int | None = None
    judge: str | None = None
    verifier: str | None = None


@cache
def task_files() -> Mapping[str, TaskFile]:
    """Every named task; those of installed packages (``baco.tasks``) included.

    Raises:
        BacoError: an installed package's task cannot be read.
    """
    files = {
        file.name.removesuffix(".toml"): file
        for file in resources.files("baco.evaluation.tasks").iterdir()
        if file.name.endswith(".toml")
    }
    tasks = {name: _read(name, files[name]) for name in sorted(files)}
    for name, part in plugins("tasks").items():
        if name in tasks:
            raise BacoError(f"entry point {name!r} in baco.tasks: that task is built in")
        tasks[name] = _read(name, Path(part))
    return tasks


def _read(name: str, file: Path | Traversable) -> TaskFile:
    """The task of a TOML file.

    Raises:
        BacoError: a file that cannot be read or is not a task.
    """
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
        return TaskFile(name=name, fields=Fields(**entries.pop("fields", {})), **entries)
    except (OSError, ValueError, TypeError) as error:
        raise BacoError(f"task {name!r}: {file} is not a task file: {error}") from error


def check_limit(limit: int | None) -> None:
    """Check a number of prompts to take; None for all.

    Raises:
        BacoError: it is below 1.
    """
    if limit is not None and limit < 1:
        raise BacoError(f"limit is {limit}: take at least one prompt, or leave it out for all")


def load_task(spelling: str, limit: int | None = None) -> Task:
    """Load the task that a user names.

    Args:
        spelling: a name (``gsm8k``), a name with another source of its rows (``gsm8k=PATH`` or
            ``gsm8k=hub:ORG/DATASET``), or a file of prompts: JSONL, CSV or Parquet whose rows
            have ``prompt`` or ``messages`` and may have ``id``, ``category``, ``paraphrases``; or
            text, one a line.
        limit: the number of prompts to take from the beginning.

    Raises:
        BacoError: no such task or file, invalid rows, or no rows.
    """
    check_limit(limit)
    name, given, place = spelling.partition("=")
    known = task_files().get(name)
    if known is None:
        return _own(spelling, limit)
    limit = known.limit if limit is None else limit
    if given and place.startswith(HUB):
        source = dict(known.source) | {"hub": place.removeprefix(HUB)}
        prompts = known.fields.prompts(rows.from_hub(name, source), limit, place)
    elif given:
        prompts = known.fields.prompts(rows.from_file(Path(place)), limit, place)
    elif "world" in known.source:
        place = "the demo world"
        prompts = world.prompts(known.source["world"], limit)
    elif "hub" in known.source:
        place = HUB + str(known.source["hub"])
        prompts = known.fields.prompts(rows.from_hub(name, known.source), limit, place)
    else:
        raise BacoError(
            f"task {name!r} is not on the hub: fetch {known.source['published']} and give it as "
            f"{name}=PATH"
        )
    return Task(name, place, prompts, known.max_tokens, known.judge, known.verifier)


def _own(spelling: str, limit: int | None) -> Task:
    path = Path(spelling)
    if not path.is_file():
        near = difflib.get_close_matches(spelling, task_files(), n=3, cutoff=0.5)
        raise BacoError(
            f"unknown task {spelling!r}: use {', '.join(near or task_files())}, or a file of "
            "prompts (.jsonl, .csv, .parquet, or .txt with one on each line)"
        )
    prompts = Fields().prompts(rows.from_file(path), limit, spelling)
    return Task(path.stem, spelling, prompts)
