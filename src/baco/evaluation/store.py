"""The run directory: everything about a run, in files that describe themselves.

    run.json         configuration; versions, git revision and machine where the run began
    prompts.jsonl    every prompt used
    samples.jsonl    a row per sample, in the order of the plan; without times
    speed.jsonl      seconds and tokens of every prompt at every setting
    scores/          METRIC.jsonl, a row per group of samples, and METRIC.json, how it was computed
    *.parquet        the same as tables

Rows of whole jobs are appended. A run that was killed is cut back to its last whole job and
continues there.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from baco.batch.job import as_manifest, begin_folder, check_settings, line, read_manifest
from baco.evaluation.records import Group, Prompt, Sample, Setting, grouped

T = TypeVar("T")

FORMAT = 1
# What a user can choose where a directory holds something else.
OTHER = "another --out"


@dataclass(frozen=True)
class Run:
    """An existing run directory.

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
            BacoError: the directory holds no run, or one of another format.
        """
        folder = Path(path)
        config = read_manifest(folder / "run.json", FORMAT, "run", "baco sweep --out")
        return cls(folder, config)

    def prompts(self) -> Mapping[tuple[str, str], Prompt]:
        """Every prompt, by (task, id)."""
        return self._prompts

    @cached_property
    def _prompts(self) -> Mapping[tuple[str, str], Prompt]:
        prompts = {}
        for row in read_rows(self.path / "prompts.jsonl"):
            task = row.pop("task")
            row |= {"messages": tuple(row["messages"]), "paraphrases": tuple(row["paraphrases"])}
            prompts[task, row["id"]] = Prompt(**row)
        return prompts

    @property
    def settings(self) -> list[Setting]:
        """Every operating point, in the order of the plan."""
        return [Setting(**row) for row in self.config["settings"]]

    def samples(self) -> Iterator[Sample]:
        """The samples drawn so far, in the order of the plan; never all in memory."""
        for row in read_rows(self.path / "samples.jsonl"):
            row["pieces"] = tuple((text, source) for text, source in row["pieces"])
            yield Sample(**row)

    def groups(self) -> Iterator[Group]:
        """All n samples of a prompt at a setting together; incomplete groups are left out."""
        for group in grouped(self.samples(), self.prompts()):
            if len(group.samples) == self.config["n"]:
                yield group

    @property
    def drawn(self) -> int:
        """Number of samples drawn so far."""
        return count_rows(self.path / "samples.jsonl")

    @property
    def complete(self) -> bool:
        """Whether every sample of the plan was drawn."""
        return self.drawn == self.expected

    @property
    def expected(self) -> int:
        """Number of samples of the plan."""
        prompts = sum(task["prompts"] for task in self.config["tasks"])
        points = len(self.config["settings"]) * len(self.config["pairs"])
        return int(prompts * points * self.config["n"])

    def speed(self) -> Iterator[dict[str, Any]]:
        """Seconds and tokens of every group."""
        return read_rows(self.path / "speed.jsonl")

    def score_file(self, metric: str) -> Path:
        """The file of a metric's scores."""
        return self.path / "scores" / f"{metric}.jsonl"

    def scores(self, metric: str) -> Iterator[dict[str, Any]]:
        """Rows of pair, task, method, setting, prompt and value, in the order of the groups."""
        return read_rows(self.score_file(metric))

    def about(self, metric: str) -> dict[str, Any]:
        """How a metric was computed; empty where it was not requested."""
        path = self.score_file(metric).with_suffix(".json")
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def metrics(self) -> list[str]:
        """Names of the metrics that have scores."""
        return [name for name in self._requested() if count_rows(self.score_file(name))]

    def unavailable(self) -> dict[str, str]:
        """Metrics that could not run, on any task or on some, and why."""
        reasons = {}
        for name in self._requested():
            about = self.about(name)
            by_task = about.get("unavailable_for", {}).items()
            if "unavailable" in about:
                reasons[name] = str(about["unavailable"])
            elif by_task:
                reasons[name] = "; ".join(f"not scored on {task}: {why}" for task, why in by_task)
        return reasons

    def _requested(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "scores").glob("*.json"))


def begin(path: Path, config: Mapping[str, Any], prompts: Mapping[str, Sequence[Prompt]]) -> Run:
    """Make a run directory, or open the one of the same configuration.

    Args:
        path: a directory that does not exist, is empty, or holds this run or its beginnings.
        config: all that the samples depend on; ``made`` is not compared when a run continues.
        prompts: of every task.

    Raises:
        BacoError: a directory with something else in it, a run of other settings, or one that
            another process writes to.
    """
    settings = json.loads(json.dumps({"format": FORMAT, **config}))
    rows = [{"task": task, **asdict(p)} for task, own in prompts.items() for p in own]
    files = {"prompts.jsonl": "".join(map(line, rows)), "run.json": as_manifest(settings)}
    if not begin_folder(path, files, "run", OTHER):
        return Run(path, settings)
    run = Run.open(path)
    begun, new = ({k: v for k, v in c.items() if k != "made"} for c in (run.config, settings))
    check_settings(path, begun, new, OTHER)
    return run


_FIELDS = [field.name for field in fields(Sample)]


def sample_line(sample: Sample) -> str:
    """A sample as a line."""
    return line({name: getattr(sample, name) for name in _FIELDS})


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete rows of a JSONL file; none where there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)


def count_rows(path: Path) -> int:
    """Number of complete lines of a file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def batches(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """The rows in lists of `size`; the last may be shorter."""
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some
