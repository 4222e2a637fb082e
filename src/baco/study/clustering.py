"""Means over judgments that share raters and prompts, with intervals that allow for both.

Judgments of one rater resemble each other, and so do judgments about one prompt. Two judgments are
treated as independent only if they share neither. Everything is a pure function over arrays;
leading axes are studies, so that thousands of simulated studies are analysed in one call.

The interval is a t interval with a two-way clustered variance. It was chosen by simulated coverage
(`benchmarks/study.py`): the percentile bootstrap over raters and prompts is too narrow with few
raters who differ, and far too wide where they do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.indicators import Estimate, Floats
from baco.evaluation.inference import interval

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Clusters:
    """The rater and the prompt of every judgment.

    Attributes:
        rater, prompt: numbers from 0, [N].
    """

    rater: Ints
    prompt: Ints

    @cached_property
    def cell(self) -> Ints:
        """A number for every pair of a rater and a prompt that occurs, [N]."""
        pairs = self.rater * (int(self.prompt.max(initial=0)) + 1) + self.prompt
        cells: Ints = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
        return cells

    @cached_property
    def indicators(self) -> tuple[Any, Any, Any]:
        """Sparse matrices [N, clusters] with a one at each judgment's rater, prompt and cell."""
        from scipy import sparse

        rows = np.arange(len(self.rater))
        return tuple(
            sparse.csr_array((np.ones(len(rows)), (rows, labels)))
            for labels in (self.rater, self.prompt, self.cell)
        )

    def at(self, rows: NDArray[Any]) -> "Clusters":
        """The clusters of some of the judgments, numbered anew."""
        _, rater = np.unique(self.rater[rows], return_inverse=True)
        _, prompt = np.unique(self.prompt[rows], return_inverse=True)
        return Clusters(rater.astype(np.int64), prompt.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, or several, with the standard error and degrees of freedom of each.

    The error is NaN with fewer than two raters or two prompts.
    """

    value: Floats
    error: Floats
    freedom: Floats

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Lower and upper end of the interval at this level."""
        from scipy import special

        half = special.stdtrit(self.freedom, (1 + level) / 2) * self.error
        return self.value - half, self.value + half

    def two_sided(self) -> Floats:
        """The p-value of the hypothesis that the mean is zero."""
        from scipy import special

        p: Floats = 2 * special.stdtr(self.freedom, -np.abs(self.value) / self.error)
        return p

    def equivalence(self, margin: float) -> Floats:
        """The p-value of two one-sided tests that the mean is within plus or minus `margin`."""
        from scipy import special

        p: Floats = special.stdtr(self.freedom, (np.abs(self.value) - margin) / self.error)
        return p

    def estimate(self, low: float = -np.inf, high: float = np.inf) -> Estimate | None:
        """The figure with its 95% interval, cut to a scale; None where there is no interval."""
        if not np.isfinite(self.error):
            return None
        ends = np.clip(self.interval(), low, high)
        return Estimate(float(self.value), float(ends[0]), float(ends[1]))


def mean(values: Floats, clusters: Clusters, weights: Floats | None = None) -> Mean:
    """The mean of judgments [..., N], clustered by raters and prompts.

    Args:
        values: of every judgment.
        clusters: of every judgment.
        weights: of every judgment and study, [..., N]; 0 leaves a judgment out.
    """
    weights = np.ones_like(values) if weights is None else weights
    total = weights.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        center = (weights * values).sum(-1) / total
        influence = weights * (values - center[..., None]) / total[..., None]
        # If all judgments are equal, a single different one was possible: one step of the scale.
        least = 1 / total
    return clustered(center, influence, clusters, weights > 0, least)


def clustered(
    value: Floats,
    influence: Floats,
    clusters: Clusters,
    present: NDArray[np.bool_] | None = None,
    least: Floats | float = 0.0,
) -> Mean:
    """A statistic with the error that follows from the influence of every judgment on it.

    The variance is V_raters + V_prompts - V_cells (Cameron, Gelbach and Miller 2011), each with the
    factor G / (G - 1) of its number of clusters, and never less than any of the three. The degrees
    of freedom are Satterthwaite's of V_raters and V_prompts, at least the smaller number of
    clusters minus one.

    Args:
        value: of the statistic, [...].
        influence: the derivative of the statistic by each judgment's weight, [..., N].
        clusters: of every judgment.
        present: whether a judgment is in the study, [..., N]; by default all are.
        least: the smallest standard error.
    """
    parts, sizes = [], []
    for indicator in clusters.indicators:
        sums = influence @ indicator
        if present is None:
            size = np.full(np.shape(value), float(indicator.shape[1]))
        else:
            size = ((present.astype(np.float64) @ indicator) > 0).sum(-1).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((sums**2).sum(-1) * size / (size - 1))
        sizes.append(size)
    raters, prompts, cells = parts
    fewest = np.minimum(sizes[0], sizes[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum.reduce([raters + prompts - cells, raters, prompts, cells])
        variance = np.maximum(variance, np.square(least))
        spread = raters**2 / (sizes[0] - 1) + prompts**2 / (sizes[1] - 1)
        freedom = np.where(spread > 0, variance**2 / spread, fewest - 1)
    freedom = np.clip(freedom, fewest - 1, np.maximum(sizes[2] - 1, 1))
    enough = fewest >= 2
    return Mean(
        np.asarray(value, dtype=np.float64),
        np.where(enough, np.sqrt(variance), np.nan),
        np.where(enough, freedom, np.nan),
    )


def bootstrap_interval(
    values: Floats, clusters: Clusters, resamples: int, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of the mean of judgments [N] from the two-way cluster bootstrap.

    Raters and prompts are drawn with replacement, independently; a judgment counts as often as its
    rater times its prompt was drawn (Owen 2007). It is reported beside the t interval.
    """
    generator = np.random.default_rng(seed)
    counts = []
    for labels in (clusters.rater, clusters.prompt):
        size = int(labels.max()) + 1
        drawn = generator.multinomial(size, np.full(size, 1 / size), size=resamples)
        counts.append(drawn[:, labels])
    weights = (counts[0] * counts[1]).astype(np.float64)
    total = weights.sum(-1)
    drawn_any = total > 0
    return interval((weights[drawn_any] @ values) / total[drawn_any])


def holm(p_values: Floats | Sequence[float]) -> Floats:
    """P-values [..., k] adjusted for k tests by Holm's step-down method."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, axis=-1)
    factors = np.arange(p.shape[-1], 0, -1)
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, -1) * factors, axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1.0), -1)
    return adjusted
