"""Coverage and Dominance of methods over every pair of a diversity and a quality metric.

It takes scores of every setting and prompt and returns indicators with bootstrap intervals.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.inference import (
    FEW_PROMPTS,
    difference_bounds,
    dominance_bounds,
    influence,
    interval,
    sign_flip_p,
)
from baco.evaluation.metrics import names
from baco.evaluation.pareto import (
    Floats,
    best_at,
    coverage,
    coverage_at,
    normalised,
    pareto_front,
)

__all__ = [
    "Comparison",
    "Estimate",
    "Floats",
    "Indicator",
    "Indicators",
    "Measured",
    "Part",
    "Resamples",
    "fewest_settings",
    "indicators",
]

Space = tuple[str, str]  # (diversity, quality): a sub-space
Indicator = Literal["coverage", "coverage_at_k", "dominance", "best_at_k"]
Part = str | Space  # "lexical", "semantic", "overall", or one sub-space; of best_at_k: a metric

KINDS: tuple[Literal["lexical", "semantic"], ...] = ("lexical", "semantic")
OVERALL = "overall"
# The fewest settings with which a method counts for k of Coverage at k settings.
ENOUGH_SETTINGS = 5


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
    """A figure and its 95% interval over prompts."""

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
class Difference:
    """A method's figure minus its rival's on the prompts of one task.

    Attributes:
        draws: the difference itself, then its bootstrap resamples, [1 + R].
        without: the difference without each prompt, [N]; empty with many prompts.
        prompts: N.
    """

    draws: Floats
    without: Floats
    prompts: int


def combined(differences: Sequence[Difference]) -> Comparison:
    """The mean of differences that were measured on different prompts.

    The interval is an expanded percentile interval of the bootstrap. Below 20 prompts in all the
    p-value is that of all sign flips of the prompts' contributions (see `influence`), which is
    2 / 2^N at least. Otherwise it is twice the share of the resamples that contradict the
    difference, each count plus one so that it is never 0 (Efron and Tibshirani 1993; Davison and
    Hinkley 1997, 4.2).
    """
    draws = np.mean([difference.draws for difference in differences], axis=0)
    prompts = sum(difference.prompts for difference in differences)
    if prompts < FEW_PROMPTS:
        values = [
            influence(float(difference.draws[0]), difference.without) / difference.prompts
            for difference in differences
        ]
        p_value = sign_flip_p(np.concatenate(values))
    else:
        against = min(int((draws[1:] <= 0).sum()), int((draws[1:] >= 0).sum()))
        p_value = min(1.0, 2 * (against + 1) / len(draws))
    freedom = prompts - len(differences)
    return Comparison(float(draws[0]), *interval(draws[1:], freedom + 1), p_value)


@dataclass(frozen=True, slots=True)
class Indicators:
    """Coverage and Dominance of every method.

    Attributes:
        methods: in order of appearance.
        tasks: names; an indicator without a task is the mean over all.
        spaces: sub-spaces that every task has.
        left_out: sub-spaces that lack a metric on some task.
        k: settings at which methods are compared in `coverage_at_k` and `best_at_k`; None where no
            method has enough.
        prompts: their number on each task.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    spaces: tuple[Space, ...]
    left_out: tuple[Space, ...]
    parts: Mapping[str, Sequence[str]]
    k: int | None
    prompts: Mapping[str, int]
    # [methods, 1 + resamples]: the figure itself, then its resamples.
    draws: Mapping[tuple[Indicator, str, Part], Floats] = field(repr=False)
    # [methods, prompts]: the figure without each prompt; of few prompts only.
    without: Mapping[tuple[Indicator, str, Part], Floats] = field(repr=False)
    # [methods, 2]: bounds of Dominance.
    bounds: Mapping[tuple[str, Part], Floats] = field(repr=False)

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
            indicator: ``coverage``, ``dominance``, ``coverage_at_k`` (the mean Coverage of k of the
                method's settings), or ``best_at_k`` (the same mean of the best setting's value of
                one metric, such as ``utility_k``).
            method: one of ``methods``.
            part: ``lexical`` or ``semantic``, the mean over those sub-spaces; ``overall``, the mean
                of these two; or one sub-space, (diversity, quality). Of ``best_at_k``, a metric.
            task: one of ``tasks``; by default the mean over all.

        Returns:
            None where the part has no sub-space, the method was not run on the task, or it has
            fewer than k settings there.
        """
        drawn = self._drawn(indicator, method, part, task)
        if drawn is None:
            return None
        value = float(drawn[0])
        if indicator == "dominance":
            low, high = self._bounds(method, part, task)
            return Estimate(value, min(low, value), max(high, value))
        tasks = self._tasks(task)
        prompts = sum(self.prompts[name] - 1 for name in tasks) + 1
        return Estimate(value, *interval(drawn[1:], prompts))

    def compare(
        self,
        method: str,
        rival: str,
        indicator: Indicator = "coverage",
        part: Part = OVERALL,
        task: str | None = None,
    ) -> Comparison | None:
        """A method against a rival on the same resamples of prompts, see `combined`.

        Of Dominance there are bounds instead, which hold with 95% at least: p is 0.05, or what few
        prompts can give, where they exclude zero, and 1 elsewhere.
        """
        if indicator == "dominance":
            return self._dominance_lead(method, rival, part, task)
        differences = self.differences(method, rival, indicator, part, task)
        return None if differences is None else combined(differences)

    def differences(
        self,
        method: str,
        rival: str,
        indicator: Indicator = "coverage",
        part: Part = OVERALL,
        task: str | None = None,
    ) -> list[Difference] | None:
        """A method minus a rival on every task; None where one has no figure."""
        differences = []
        for name in self._tasks(task):
            own = self._drawn(indicator, method, part, name)
            other = self._drawn(indicator, rival, part, name)
            if own is None or other is None:
                return None
            without = np.zeros(0)
            if self.without:
                own_without = self._drawn(indicator, method, part, name, self.without)
                other_without = self._drawn(indicator, rival, part, name, self.without)
                assert own_without is not None
                assert other_without is not None
                without = own_without - other_without
            differences.append(Difference(own - other, without, self.prompts[name]))
        return differences or None

    def _dominance_lead(
        self, method: str, rival: str, part: Part, task: str | None
    ) -> Comparison | None:
        own = self.estimate("dominance", method, part, task)
        other = self.estimate("dominance", rival, part, task)
        if own is None or other is None:
            return None
        if method == rival:
            return Comparison(0.0, 0.0, 0.0, 1.0)
        low, high = own.low - other.high, own.high - other.low
        prompts = sum(self.prompts[name] for name in self._tasks(task))
        p_value = 1.0 if low <= 0 <= high else max(0.05, 2.0 ** (1 - prompts))
        return Comparison(own.value - other.value, low, high, p_value)

    def _tasks(self, task: str | None) -> tuple[str, ...]:
        return self.tasks if task is None else (task,)

    def _bounds(self, method: str, part: Part, task: str | None) -> tuple[float, float]:
        """Bounds of Dominance: the means over sub-spaces and tasks."""
        if part == OVERALL:
            ends = np.mean([self._bounds(method, name, task) for name in self.parts], axis=0)
        else:
            row = self.methods.index(method)
            ends = np.mean(
                [
                    self.bounds[name, space][row]
                    for name in self._tasks(task)
                    for space in self._spaces(part)
                ],
                axis=0,
            )
        return float(ends[0]), float(ends[1])

    def _spaces(self, part: Part) -> list[Space]:
        if isinstance(part, str):
            return [space for space in self.spaces if space[0] in self.parts[part]]
        return [space for space in self.spaces if space == part]

    def _drawn(
        self,
        indicator: Indicator,
        method: str,
        part: Part,
        task: str | None,
        kept: Mapping[tuple[Indicator, str, Part], Floats] | None = None,
    ) -> Floats | None:
        """Draws of a figure, or what else is `kept` of it: the mean over sub-spaces and tasks."""
        draws = self.draws if kept is None else kept
        tasks = self._tasks(task)
        row = self.methods.index(method)
        if indicator == "best_at_k":
            keys = [(indicator, name, part) for name in tasks]
            return _mean([draws[key][row] for key in keys if key in draws], len(tasks))
        if part == OVERALL:
            parts = [self._drawn(indicator, method, name, task, kept) for name in self.parts]
            present = [figures for figures in parts if figures is not None]
            return np.mean(present, axis=0) if len(present) == len(parts) else None
        spaces = self._spaces(part)
        figures = [draws[indicator, name, space][row] for name in tasks for space in spaces]
        return _mean(figures, len(figures))


def _mean(draws: Sequence[Floats], expected: int) -> Floats | None:
    """The mean of draws of an indicator; None where some are missing."""
    if not draws or len(draws) < expected or np.isnan(draws).any():
        return None
    mean: Floats = np.mean(draws, axis=0)
    return mean


def fewest_settings(measured: Sequence[Measured]) -> int | None:
    """k of Coverage at k settings: the fewest of any method with 5 or more on a task."""
    counts = [count for task in measured for count in Counter(task.methods).values()]
    return min((count for count in counts if count >= ENOUGH_SETTINGS), default=None)


def indicators(
    measured: Sequence[Measured],
    parts: Mapping[str, Sequence[str]] | None = None,
    quality: Sequence[str] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    k: int | None = None,
) -> Indicators:
    """Coverage and Dominance of every method in every sub-space (arXiv 2511.05650, section 5.1).

    A point is a setting's mean over prompts of a diversity and a quality metric. Within a task both
    are min-max normalised over all points of all methods, and (0, 0) is the reference. Every
    resample is normalised again: the normalisation is part of the indicator, and points of a
    resample would otherwise leave the unit square. Tasks are resampled independently, all methods
    and metrics of a task together, so that every difference is paired. Dominance has bounds instead
    (`dominance_bounds`), because bootstrap intervals of a front cover the truth too rarely.

    Args:
        measured: one for each task.
        parts: diversity metrics in groups; ``overall`` is the mean of the groups' means. By default
            all lexical and all semantic ones.
        quality: quality metrics, by default all.
        resamples: bootstrap resamples of prompts.
        seed: of the resamples.
        k: settings at which methods are compared; by default `fewest_settings`.
    """
    k = fewest_settings(measured) if k is None else k
    parts = {kind: names(kind) for kind in KINDS} if parts is None else parts
    quality = names("quality") if quality is None else quality
    methods = tuple(dict.fromkeys(name for task in measured for name in task.methods))
    wanted = [(d, q) for group in parts.values() for d in group for q in quality]
    draws: dict[tuple[Indicator, str, Part], Floats] = {}
    without: dict[tuple[Indicator, str, Part], Floats] = {}
    bounds: dict[tuple[str, Part], Floats] = {}
    has_few_prompts = sum(len(task.prompts) for task in measured) < FEW_PROMPTS
    generators = np.random.default_rng(seed).spawn(len(measured))
    for task, generator in zip(measured, generators, strict=True):
        drawn = prompt_weights(len(task.prompts), resamples, generator)
        weights = drawn
        if has_few_prompts:
            weights = np.concatenate([drawn, all_but_one(len(task.prompts))])
        scores = {
            name: rows
            for name in dict.fromkeys(name for space in wanted for name in space)
            if (rows := task.figures(name)) is not None
        }
        points = {name: normalised(weights @ rows.T) for name, rows in scores.items()}
        own = [np.flatnonzero([owner == method for owner in task.methods]) for method in methods]
        figures: dict[tuple[Indicator, Part], Floats] = {}
        between = difference_bounds(scores, drawn[1:], 1.0 - 0.05 / len(measured))
        for space in wanted:
            if points.keys() >= set(space):
                plane = np.stack([points[space[1]], points[space[0]]], axis=-1)
                for indicator, values in _plane(plane, own, k).items():
                    figures[indicator, space] = values
                first, second = (between[name] for name in space)
                bounds[task.task, space] = dominance_bounds(first, second, own)
        for name in names("utility"):
            rows = task.figures(name)
            if rows is not None and k is not None:
                best = partial(_best_at, weights @ rows.T, k)
                figures["best_at_k", name] = _by_method(own, best, len(weights), k)
        for (indicator, part), values in figures.items():
            draws[indicator, task.task, part] = values[:, : len(drawn)]
            if has_few_prompts:
                without[indicator, task.task, part] = values[:, len(drawn) :]
    tasks = tuple(task.task for task in measured)
    spaces = tuple(s for s in wanted if all(("coverage", task, s) in draws for task in tasks))
    left_out = tuple(space for space in wanted if space not in spaces)
    prompts = {task.task: len(task.prompts) for task in measured}
    return Indicators(methods, tasks, spaces, left_out, parts, k, prompts, draws, without, bounds)


def all_but_one(prompts: int) -> Floats:
    """Weights of all prompts but one, [prompts, prompts]; of a single prompt, itself."""
    if prompts == 1:
        return np.ones((1, 1))
    return (1.0 - np.eye(prompts)) / (prompts - 1)


def prompt_weights(prompts: int, resamples: int, seed: int | np.random.Generator) -> Floats:
    """Weights of prompts [1 + resamples, prompts]: equal ones, then those of every resample."""
    drawn = Resamples.of(prompts, resamples, seed).counts
    return np.concatenate([np.ones((1, prompts)), drawn]) / prompts


def _plane(
    points: Floats, rows: Sequence[NDArray[np.intp]], k: int | None
) -> dict[Indicator, Floats]:
    """The indicators [methods, R] of points [R, settings, 2].

    Args:
        points: of one plane, in R resamples.
        rows: the settings of every method; a method without any has NaN.
        k: settings of Coverage at k settings; methods with fewer have NaN there.
    """
    front = pareto_front(points)
    total = front.sum(axis=-1)
    count = len(points)
    return {
        "coverage": _by_method(rows, lambda own: coverage(points[:, own]), count),
        "dominance": _by_method(rows, lambda own: front[:, own].sum(axis=-1) / total, count),
        "coverage_at_k": _by_method(
            rows, lambda own: coverage_at(points[:, own], k or 1), count, k or len(front[0]) + 1
        ),
    }


def _best_at(means: Floats, k: int, own: NDArray[np.intp]) -> Floats:
    return best_at(means[:, own], k)


def _by_method(
    rows: Sequence[NDArray[np.intp]],
    figure: Callable[[NDArray[np.intp]], Floats],
    count: int,
    least: int = 1,
) -> Floats:
    """A figure of the settings of every method, [methods, count]; NaN with too few settings."""
    figures = np.full((len(rows), count), np.nan)
    for row, own in enumerate(rows):
        if len(own) >= least:
            figures[row] = figure(own)
    return figures
