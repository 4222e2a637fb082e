"""The run directory: everything about a run in files that describe themselves.

    run.json         configuration; versions and git revision of whoever began it
    prompts.jsonl    every prompt used
    samples.jsonl    a row a sample, in the order of the plan; no clock in it
    speed.jsonl      what was measured beside it
    scores/          METRIC.jsonl, a row a group of samples, and METRIC.json, how it was made
    *.parquet        the same as tables

Rows are appended, whole jobs at a time, so that a run that was killed is cut back to its last whole
job and goes on there.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

from baco.errors import BacoError
from baco.evaluation.records import Group, Prompt, Sample, Setting, grouped
from baco.files import NAME as LOCK
from baco.files import locked, write_atomic
from baco.sampling.seeds import check_version

T = TypeVar("T")

FORMAT = 1
# What a run that was killed while it was begun may leave; run.json comes last.
BEGUN = frozenset({LOCK, "prompts.jsonl", "prompts.jsonl.partial", "run.json.partial"})


@dataclass(frozen=True)
class Run:
    """A run directory that is there.

    Attributes:
        path: of the directory.
        config: what ``run.json`` holds.
    """

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a run to read or score it.

        Raises:
            BacoError: no run is there, or one of another format.
        """
        folder = Path(path)
        try:
            config = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BacoError(
                f"{folder} holds no run: give the directory that 'baco sweep --out' made"
            ) from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise BacoError(f"{folder} holds a run of another format: this baco reads {FORMAT}")
        return cls(folder, config)

    def prompts(self) -> Mapping[tuple[str, str], Prompt]:
        """Every prompt, by (task, id)."""
        return self._prompts

    @cached_property
    def _prompts(self) -> Mapping[tuple[str, str], Prompt]:
        found = {}
        for row in read_rows(self.path / "prompts.jsonl"):
            task = row.pop("task")
            row |= {"messages": tuple(row["messages"]), "paraphrases": tuple(row["paraphrases"])}
            found[task, row["id"]] = Prompt(**row)
        return found

    @property
    def settings(self) -> list[Setting]:
        """Every operating point, in the order of the plan."""
        return [Setting(**row) for row in self.config["settings"]]

    def samples(self) -> Iterator[Sample]:
        """The samples that are there, in the order of the plan; never all in memory."""
        for row in read_rows(self.path / "samples.jsonl"):
            row["pieces"] = tuple((text, source) for text, source in row["pieces"])
            yield Sample(**row)

    def groups(self) -> Iterator[Group]:
        """All n samples of a prompt at a setting together; one that is not whole is left out."""
        for group in grouped(self.samples(), self.prompts()):
            if len(group.samples) == self.config["n"]:
                yield group

    @property
    def drawn(self) -> int:
        """How many samples are there."""
        return count_rows(self.path / "samples.jsonl")

    @property
    def complete(self) -> bool:
        """Is every sample of the plan there?"""
        return self.drawn == self.expected

    @property
    def expected(self) -> int:
        """How many samples the plan has."""
        prompts = sum(task["prompts"] for task in self.config["tasks"])
        points = len(self.config["settings"]) * len(self.config["pairs"])
        return int(prompts * points * self.config["n"])

    def speed(self) -> Iterator[dict[str, Any]]:
        """Seconds and tokens of every group."""
        return read_rows(self.path / "speed.jsonl")

    def score_file(self, metric: str) -> Path:
        """Where a metric's scores are, or are to be."""
        return self.path / "scores" / f"{metric}.jsonl"

    def scores(self, metric: str) -> Iterator[dict[str, Any]]:
        """Rows of pair, task, method, setting, prompt and value, in the order of the groups."""
        return read_rows(self.score_file(metric))

    def about(self, metric: str) -> dict[str, Any]:
        """How a metric was made; empty where it has not been asked for."""
        path = self.score_file(metric).with_suffix(".json")
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def metrics(self) -> list[str]:
        """Names of the metrics that have scores."""
        return [name for name in self._asked() if count_rows(self.score_file(name))]

    def unavailable(self) -> dict[str, str]:
        """Metrics that could not run, and why."""
        told = {name: self.about(name) for name in self._asked()}
        return {name: str(t["unavailable"]) for name, t in told.items() if "unavailable" in t}

    def _asked(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "scores").glob("*.json"))


def begin(path: Path, config: Mapping[str, Any], prompts: Mapping[str, Sequence[Prompt]]) -> Run:
    """Make a run directory, or open the one of the same configuration.

    Args:
        path: a directory that is not there, is empty, or holds this very run or its beginnings.
        config: all that the samples hang on; under ``made`` what does not count when a run goes on.
        prompts: of every task.

    Raises:
        BacoError: a directory with something else in it, a run of other settings, or one that
            another process writes to.
    """
    told = json.loads(json.dumps({"format": FORMAT, **config}))
    begun = (path / "run.json").exists() or not path.exists()
    if not begun and (not path.is_dir() or {file.name for file in path.iterdir()} - BEGUN):
        raise BacoError(f"{path} is there already and holds no run: choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Two commands of different settings must not begin one directory together.
        with locked(path):
            if (path / "run.json").exists():
                return _continued(path, told)
            rows = [{"task": task, **asdict(p)} for task, asked in prompts.items() for p in asked]
            write_atomic(path / "prompts.jsonl", "".join(map(line, rows)))
            write_atomic(path / "run.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise BacoError(f"cannot write {path}: {error.strerror}") from error
    return Run(path, told)


def _continued(path: Path, config: Mapping[str, Any]) -> Run:
    """The run that is there; BacoError where it has other settings than ``config``."""
    run = Run.open(path)
    check_version(run.config.get("noise"), path)
    names = (config.keys() | run.config.keys()) - {"made"}
    differing = sorted(n for n in names if config.get(n) != run.config.get(n))
    if differing:
        raise BacoError(
            f"{path} holds a run of other settings ({', '.join(differing)}): give the same "
            "ones to go on with it, or choose another --out"
        )
    return run


def line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"


_FIELDS = [field.name for field in fields(Sample)]


def sample_line(sample: Sample) -> str:
    """A sample as a line."""
    return line({name: getattr(sample, name) for name in _FIELDS})


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a JSONL file; none where there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)


def count_rows(path: Path) -> int:
    """How many whole lines a file has."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def count_matching(path: Path, expected: Iterable[Mapping[str, Any]]) -> int:
    """How many rows at the beginning of a file are the expected ones, in order.

    Args:
        path: a JSONL file; one that is not there has no rows.
        expected: the fields that each row must have, with their values.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(takewhile(bool, map(matches, file, expected)))


def matches(text: bytes, fields: Mapping[str, Any]) -> bool:
    """Is a line whole, and a JSON object with these fields?"""
    if not text.endswith(b"\n"):
        return False
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and all(row.get(name) == fields[name] for name in fields)


def cut_back(path: Path, rows: int) -> None:
    """Keep the first `rows` lines of a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        for _ in range(rows):
            file.readline()
        file.truncate(file.tell())


def batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """The rows in lists of `size`; the last may be shorter."""
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some


def append(path: Path, lines: Iterable[str]) -> None:
    """Append lines, and wait until they are on the disk."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
