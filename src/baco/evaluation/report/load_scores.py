"""From a run's directory to arrays: what every setting scored on every prompt, and what it cost.

One pass over the samples; they are never all in memory. A setting that lacks a score on some
prompt is left out whole, and named, so that all points are means over the same prompts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.errors import BacoError
from baco.evaluation.indicators import Measured
from baco.evaluation.records import Group, Prompt
from baco.evaluation.store import Run

ACCURACY = "accuracy"
Key = tuple[str, str]  # (method, setting)
Place = tuple[str, str, str, str, str]  # (pair, task, method, setting, prompt)


@dataclass(slots=True)
class Cost:
    """What one setting's answers are like, beyond the metrics.

    Attributes:
        value: the swept number.
        answers: how many there are.
        tokens: of all answers together.
        spoken: tokens from base, of the answers that have sources,
        sourced: and all tokens of those answers.
        switches: of all answers together, where they are known.
        cut: answers that ended at the limit of length.
        seconds: measured while they were generated; 0 where nothing was.
    """

    value: float | None = None
    answers: int = 0
    tokens: int = 0
    spoken: float = 0.0
    sourced: int = 0
    switches: int = 0
    cut: int = 0
    seconds: float = 0.0
    timed_tokens: int = 0

    def add(self, group: Group) -> None:
        """Count a prompt's samples in."""
        for sample in group.samples:
            self.value = sample.value
            self.answers += 1
            self.tokens += sample.tokens
            self.switches += sample.switches or 0
            self.cut += sample.finish_reason == "length"
            if sample.base_share is not None:
                self.spoken += sample.base_share * sample.tokens
                self.sourced += sample.tokens

    @property
    def base_share(self) -> float | None:
        """Share of the tokens whose source is base; None where no answer has sources."""
        return self.spoken / self.sourced if self.sourced else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all samples of a batch per second, as it was measured."""
        return self.timed_tokens / self.seconds if self.seconds else None


@dataclass(slots=True)
class Findings:
    """One task on one pair.

    Attributes:
        measured: scores of every complete setting, [settings, prompts].
        costs: of every setting, by (method, label).
        prompts: in the order of `measured`.
        accuracy: share of right answers, [settings, prompts]; None where nothing verifies.
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


def gather(run: Run) -> list[Findings]:
    """What a run found, task after task, pair after pair.

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
        _findings(pair, task, known[task], of_task, names, scores)
        for (pair, task), of_task in costs.items()
    ]


def _findings(
    pair: str,
    task: str,
    prompts: list[Prompt],
    costs: dict[Key, Cost],
    names: Sequence[str],
    scores: Mapping[str, Mapping[Place, float]],
) -> Findings:
    ids = [prompt.id for prompt in prompts]
    places = {key: [(pair, task, *key, prompt) for prompt in ids] for key in costs}
    # A task has the metrics that anything on it was scored by; a verifier, say, is a task's own.
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
    return Findings(
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
    """Every score by its place; NaN where a metric found nothing to measure."""
    return {
        (row["pair"], row["task"], row["method"], row["setting"], row["prompt"]): (
            np.nan if row["value"] is None else row["value"]
        )
        for row in rows
    }


def _add_speed(run: Run, costs: Mapping[tuple[str, str], Mapping[Key, Cost]]) -> None:
    for row in run.speed():
        cost = costs.get((row["pair"], row["task"]), {}).get((row["method"], row["setting"]))
        if cost is not None:
            cost.seconds += row["seconds"]
            cost.timed_tokens += row["tokens"]


def by_pair(findings: Sequence[Findings]) -> Iterator[tuple[str, list[Findings]]]:
    """The tasks of each pair together."""
    for pair in dict.fromkeys(found.pair for found in findings):
        yield pair, [found for found in findings if found.pair == pair]
