"""From a run's directory to arrays: the scores of every setting on every prompt, and their cost.

The samples are read once and are never all in memory. A setting without a score on some prompt is
left out and named, so that all points are means over the same prompts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.errors import BacoError
from baco.evaluation.indicators import Measured
from baco.evaluation.methods.answer_file import AnswersOfFile
from baco.evaluation.records import Group, Prompt
from baco.evaluation.store import Run

ACCURACY = "accuracy"
Key = tuple[str, str]  # (method, setting)
Place = tuple[str, str, str, str, str]  # (pair, task, method, setting, prompt)


@dataclass(slots=True)
class Cost:
    """Tokens, sources and time of one setting's answers.

    Attributes:
        value: the swept number.
        answers: their number.
        tokens: of all answers together.
        base_tokens, sourced: tokens from base and all tokens, of the answers that have sources.
        cut: answers that ended at the limit of length.
        mixed: whether any answer has tokens from both models at once.
        seconds, timed_tokens: measured while the answers were generated; 0 where nothing was.
    """

    value: float | None = None
    answers: int = 0
    tokens: int = 0
    base_tokens: float = 0.0
    sourced: int = 0
    cut: int = 0
    mixed: bool = False
    seconds: float = 0.0
    timed_tokens: int = 0

    def add(self, group: Group) -> None:
        """Add a prompt's samples."""
        for sample in group.samples:
            self.value = sample.value
            self.answers += 1
            self.tokens += sample.tokens
            self.cut += sample.finish_reason == "length"
            self.mixed |= any(source is None for _, source in sample.pieces)
            if sample.base_share is not None:
                self.base_tokens += sample.base_share * sample.tokens
                self.sourced += sample.tokens

    @property
    def base_share(self) -> float | None:
        """Share of the tokens whose source is base; None where no answer has sources, or where
        tokens are mixed.
        """
        return self.base_tokens / self.sourced if self.sourced else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all samples of a batch together, as measured."""
        return self.timed_tokens / self.seconds if self.seconds else None


@dataclass(slots=True)
class TaskScores:
    """The scores of one task on one pair.

    Attributes:
        measured: scores of every complete setting, [settings, prompts].
        costs: of every setting, by (method, label).
        prompts: in the order of `measured`.
        accuracy: share of right answers, [settings, prompts]; None without a verifier.
        missing: settings left out for lack of samples or scores.
    """

    pair: str
    task: str
    measured: Measured
    costs: Mapping[Key, Cost]
    prompts: Sequence[Prompt]
    accuracy: NDArray[np.float64] | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[Key]:
        """(method, label) of every row of `measured`."""
        return list(zip(self.measured.methods, self.measured.settings, strict=True))

    @property
    def categories(self) -> list[str]:
        """The prompts' categories, in order; empty where there are fewer than two."""
        named = list(dict.fromkeys(p.category for p in self.prompts if p.category is not None))
        return named if len(named) > 1 else []

    def only(self, category: str) -> Measured:
        """The scores on the prompts of one category."""
        return self.at([place for place, p in enumerate(self.prompts) if p.category == category])

    def at(self, places: Sequence[int]) -> Measured:
        """The scores on some of the prompts."""
        return Measured(
            methods=self.measured.methods,
            settings=self.measured.settings,
            values=self.measured.values,
            prompts=[self.measured.prompts[place] for place in places],
            metrics={name: rows[:, places] for name, rows in self.measured.metrics.items()},
            task=self.task,
        )


def load_scores(run: Run) -> list[TaskScores]:
    """The scores of a run, task by task, pair by pair.

    Raises:
        BacoError: a run without samples or without scores.
    """
    costs: dict[tuple[str, str], dict[Key, Cost]] = {}
    for group in run.groups():
        of_task = costs.setdefault((group.pair, group.task), {})
        of_task.setdefault((group.method, group.setting), Cost()).add(group)
    if not costs:
        raise BacoError(f"{run.path} holds no samples yet: run 'baco sweep' on it first")
    names = [name for name in run.metrics() if name != ACCURACY]
    if not names:
        raise BacoError(f"{run.path} holds no scores yet: run 'baco score {run.path}' first")
    _add_speed(run, costs)
    scores = {name: _by_place(run.scores(name)) for name in run.metrics()}
    known: dict[str, list[Prompt]] = {}
    for (task, _), prompt in run.prompts().items():
        known.setdefault(task, []).append(prompt)
    return [
        _task_scores(pair, task, known[task], of_task, names, scores)
        for (pair, task), of_task in costs.items()
    ]


def _task_scores(
    pair: str,
    task: str,
    prompts: list[Prompt],
    costs: dict[Key, Cost],
    names: Sequence[str],
    scores: Mapping[str, Mapping[Place, float]],
) -> TaskScores:
    ids = [prompt.id for prompt in prompts]
    places = {key: [(pair, task, *key, prompt) for prompt in ids] for key in costs}
    # A task has the metrics that some setting was scored by on it; a verifier belongs to one task.
    names = [
        n for n in names if any(place in scores[n] for row in places.values() for place in row)
    ]
    if not names:
        raise BacoError(f"task {task!r} on {pair!r} has no scores yet: let 'baco sweep' go on")
    kept = [key for key in costs if all(p in scores[n] for n in names for p in places[key])]
    if not kept:
        raise BacoError(
            f"task {task!r} on {pair!r} has no setting that is scored on all {len(ids)} prompts "
            "yet: let 'baco sweep' go on"
        )
    accuracy = None
    if ACCURACY in scores:
        accuracy = _array(scores[ACCURACY], [places[key] for key in kept])
        accuracy = None if np.isnan(accuracy).any() else accuracy
    return TaskScores(
        pair,
        task,
        Measured(
            methods=[method for method, _ in kept],
            settings=[setting for _, setting in kept],
            values=[costs[key].value for key in kept],
            prompts=ids,
            metrics={name: _array(scores[name], [places[key] for key in kept]) for name in names},
            task=task,
        ),
        costs,
        prompts,
        accuracy,
        [setting for method, setting in costs if (method, setting) not in kept],
    )


def _array(scores: Mapping[Place, float], places: Sequence[Sequence[Place]]) -> NDArray[np.float64]:
    """Scores [settings, prompts], NaN where there is none."""
    return np.array([[scores.get(place, np.nan) for place in row] for row in places])


def _by_place(rows: Iterable[Mapping[str, Any]]) -> dict[Place, float]:
    """Every score by its place; NaN where a metric had nothing to measure."""
    return {
        (row["pair"], row["task"], row["method"], row["setting"], row["prompt"]): (
            np.nan if row["value"] is None else row["value"]
        )
        for row in rows
    }


def _add_speed(run: Run, costs: Mapping[tuple[str, str], Mapping[Key, Cost]]) -> None:
    # Answers of a file were read, not generated.
    files = {(s.method, s.label) for s in run.settings if s.options["kind"] == AnswersOfFile().name}
    for row in run.speed():
        key = (row["method"], row["setting"])
        cost = costs.get((row["pair"], row["task"]), {}).get(key)
        if cost is not None and key not in files:
            cost.seconds += row["seconds"]
            cost.timed_tokens += row["tokens"]


def by_pair(scores: Sequence[TaskScores]) -> Iterator[tuple[str, list[TaskScores]]]:
    """The tasks of each pair together."""
    for pair in dict.fromkeys(task.pair for task in scores):
        yield pair, [task for task in scores if task.pair == pair]
