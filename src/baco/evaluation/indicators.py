"""Coverage and Dominance of methods over every pair of a diversity and a quality metric.

It takes scores of every setting and prompt and returns indicators with bootstrap intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from baco.evaluation.metrics import names
from baco.evaluation.pareto import Floats, coverage, normalised, pareto_front

__all__ = [
    "Comparison",
    "Estimate",
    "Floats",
    "Indicator",
    "Indicators",
    "Measured",
    "Part",
    "Resamples",
    "coverage",
    "indicators",
    "interval",
    "normalised",
    "pareto_front",
]

Space = tuple[str, str]  # (diversity, quality): a sub-space
Indicator = Literal["coverage", "dominance"]
Part = str | Space  # "lexical", "semantic", "overall", or one sub-space

KINDS: tuple[Literal["lexical", "semantic"], ...] = ("lexical", "semantic")
OVERALL = "overall"


@dataclass(frozen=True, slots=True)
class Resamples:
    """Bootstrap resamples: how often each prompt is drawn, [R, prompts].

    Methods measured on the same prompts share the resamples, so that differences are paired.
    """

    counts: Floats

    @classmethod
    def of(
        cls, prompts: int, resamples: int = 2000, seed: int | np.random.Generator = 0
    ) -> "Resamples":
        """`resamples` draws of all prompts with replacement."""
        generator = np.random.default_rng(seed)
        share = np.full(prompts, 1.0 / prompts)
        return cls(generator.multinomial(prompts, share, size=resamples).astype(np.float64))


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval that contains `level` of the draws [R]."""
    tail = (1.0 - level) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Measured:
    """The scores of one task, a row per setting.

    Attributes:
        methods: the method of each row; the rows of a method are its operating points.
        settings, values: its label and swept number.
        prompts: ids, the columns.
        metrics: by name, [settings, prompts]; higher is better, NaN where there is no score.
        task: its name.
    """

    methods: Sequence[str]
    settings: Sequence[str]
    values: Sequence[float | None]
    prompts: Sequence[str]
    metrics: Mapping[str, Floats]
    task: str = ""

    def figures(self, metric: str) -> Floats | None:
        """A metric's scores [settings, prompts] without gaps; None where it is unavailable.

        Where a setting gave a prompt nothing to measure, such as no token, it has the worst score
        of all settings on that prompt. A metric is unavailable if some prompt has no score at any
        setting, because means over different prompts cannot be compared.
        """
        scores = self.metrics.get(metric)
        if scores is None or not scores.size or np.isnan(scores).all(axis=0).any():
            return None
        return np.where(np.isnan(scores), np.nanmin(scores, axis=0), scores)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% bootstrap interval over prompts."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method's figure minus its rival's, its 95% interval, and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Indicators:
    """Coverage and Dominance of every method.

    Attributes:
        methods: in order of appearance.
        tasks: names; an indicator without a task is the mean over all.
        spaces: sub-spaces that every task has.
        left_out: sub-spaces that lack a metric on some task.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    spaces: tuple[Space, ...]
    left_out: tuple[Space, ...]
    parts: Mapping[str, Sequence[str]]
    # [methods, 1 + resamples]: the figure itself, then its resamples.
    draws: Mapping[tuple[Indicator, str, Space], Floats] = field(repr=False)

    def coverage(
        self, method: str, part: Part = OVERALL, task: str | None = None
    ) -> Estimate | None:
        """Coverage: the normalised area a method's points dominate, 0 to 1; None if unavailable."""
        return self.estimate("coverage", method, part, task)

    def dominance(
        self, method: str, part: Part = OVERALL, task: str | None = None
    ) -> Estimate | None:
        """Dominance: a method's share of the joint front, 0 to 1; None if unavailable."""
        return self.estimate("dominance", method, part, task)

    def estimate(
        self, indicator: Indicator, method: str, part: Part = OVERALL, task: str | None = None
    ) -> Estimate | None:
        """An indicator of a method, with its interval.

        Args:
            indicator: ``coverage`` or ``dominance``.
            method: one of ``methods``.
            part: ``lexical`` or ``semantic``, the mean over those sub-spaces; ``overall``, the mean
                of these two; or one sub-space, (diversity, quality).
            task: one of ``tasks``; by default the mean over all.

        Returns:
            None where the part has no sub-space, or the method was not run on the task.
        """
        drawn = self._drawn(indicator, method, part, task)
        return None if drawn is None else Estimate(float(drawn[0]), *interval(drawn[1:]))

    def compare(
        self,
        method: str,
        rival: str,
        indicator: Indicator = "coverage",
        part: Part = OVERALL,
        task: str | None = None,
    ) -> Comparison | None:
        """A method against a rival on the same resamples of prompts: a paired bootstrap.

        The p-value is two-sided: twice the share of the resamples that contradict the difference,
        each count plus one so that it is never 0 (Efron and Tibshirani 1993; Davison and Hinkley
        1997, 4.2).
        """
        own = self._drawn(indicator, method, part, task)
        other = self._drawn(indicator, rival, part, task)
        if own is None or other is None:
            return None
        difference = own - other
        against = min(int((difference[1:] <= 0).sum()), int((difference[1:] >= 0).sum()))
        p_value = min(1.0, 2 * (against + 1) / len(difference))
        return Comparison(float(difference[0]), *interval(difference[1:]), p_value)

    def _drawn(
        self, indicator: Indicator, method: str, part: Part, task: str | None
    ) -> Floats | None:
        if part == OVERALL:
            parts = [self._drawn(indicator, method, name, task) for name in self.parts]
            present = [draws for draws in parts if draws is not None]
            return np.mean(present, axis=0) if len(present) == len(parts) else None
        if isinstance(part, str):
            spaces = [space for space in self.spaces if space[0] in self.parts[part]]
        else:
            spaces = [space for space in self.spaces if space == part]
        tasks = self.tasks if task is None else (task,)
        row = self.methods.index(method)
        draws = [self.draws[indicator, name, space][row] for name in tasks for space in spaces]
        if not draws or np.isnan(draws).any():
            return None
        mean: Floats = np.mean(draws, axis=0)
        return mean


def indicators(
    measured: Sequence[Measured],
    parts: Mapping[str, Sequence[str]] | None = None,
    quality: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Indicators:
    """Coverage and Dominance of every method in every sub-space (arXiv 2511.05650, section 5.1).

    A point is a setting's mean over prompts of a diversity and a quality metric. Within a task both
    are min-max normalised over all points of all methods, and (0, 0) is the reference. Every
    resample is normalised again: the normalisation is part of the indicator, and points of a
    resample would otherwise leave the unit square. Tasks are resampled independently, all methods
    and metrics of a task together, so that every difference is paired.

    Args:
        measured: one for each task.
        parts: diversity metrics in groups; ``overall`` is the mean of the groups' means. By default
            all lexical and all semantic ones.
        quality: quality metrics, by default all.
        resamples: bootstrap resamples of prompts.
        seed: of the resamples.
    """
    parts = {kind: names(kind) for kind in KINDS} if parts is None else parts
    quality = names("quality") if quality is None else quality
    methods = tuple(dict.fromkeys(name for task in measured for name in task.methods))
    wanted = [(d, q) for group in parts.values() for d in group for q in quality]
    draws: dict[tuple[Indicator, str, Space], Floats] = {}
    generators = np.random.default_rng(seed).spawn(len(measured))
    for task, generator in zip(measured, generators, strict=True):
        points = _points(task, {name for space in wanted for name in space}, resamples, generator)
        for space in wanted:
            if points.keys() >= set(space):
                plane = np.stack([points[space[1]], points[space[0]]], axis=-1)
                covered, dominant = _plane(plane, task.methods, methods)
                draws["coverage", task.task, space] = covered
                draws["dominance", task.task, space] = dominant
    tasks = tuple(task.task for task in measured)
    spaces = tuple(s for s in wanted if all(("coverage", task, s) in draws for task in tasks))
    left_out = tuple(space for space in wanted if space not in spaces)
    return Indicators(methods, tasks, spaces, left_out, parts, draws)


def _points(
    task: Measured, metrics: set[str], resamples: int, generator: np.random.Generator
) -> dict[str, Floats]:
    """Normalised means of every available metric, [1 + resamples, settings]."""
    count = len(task.prompts)
    drawn = Resamples.of(count, resamples, generator).counts
    weights = np.concatenate([np.ones((1, count)), drawn]) / count
    return {
        name: normalised(weights @ scores.T)
        for name in metrics
        if (scores := task.figures(name)) is not None
    }


def _plane(points: Floats, owners: Sequence[str], methods: Sequence[str]) -> tuple[Floats, Floats]:
    """Coverage and Dominance [methods, R] of points [R, settings, 2]; NaN for other methods."""
    front = pareto_front(points)
    total = front.sum(axis=-1)
    covered = np.full((len(methods), len(points)), np.nan)
    dominant = covered.copy()
    for row, method in enumerate(methods):
        own = np.array([owner == method for owner in owners])
        if own.any():
            covered[row] = coverage(points[:, own])
            dominant[row] = front[:, own].sum(axis=-1) / total
    return covered, dominant
