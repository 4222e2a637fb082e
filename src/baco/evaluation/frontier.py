"""Coverage of a method's points in a diversity-quality plane, and how sure of it one can be.

It knows points and numbers only: a point is (quality, diversity), higher being better, zero the
worst; where the points come from is another matter. Pure functions of numpy arrays.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def coverage(points: Floats) -> Floats:
    """Area dominated by points with (0, 0) as reference (the hypervolume; arXiv 2511.05650, 5.1).

    Args:
        points: [..., N, 2], finite and not negative; every leading index is a plane of its own.

    Returns:
        [...], the area of the union of the rectangles from (0, 0) to each point; 0 without points.

    Raises:
        ValueError: a coordinate is negative or not finite, or the last axis is not two long.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape[-1:] != (2,):
        raise ValueError(f"points have shape {points.shape}; expected two coordinates, [..., N, 2]")
    if not np.all(np.isfinite(points)) or np.any(points < 0):
        raise ValueError("points have negative or infinite coordinates; expected 0 or more")
    order = np.argsort(-points[..., 0], axis=-1, kind="stable")
    across = np.take_along_axis(points[..., 0], order, axis=-1)
    height = np.maximum.accumulate(np.take_along_axis(points[..., 1], order, axis=-1), axis=-1)
    following = np.concatenate([across[..., 1:], np.zeros_like(across[..., :1])], axis=-1)
    area: Floats = np.sum((across - following[..., : across.shape[-1]]) * height, axis=-1)
    return area


def pareto_front(points: Floats) -> NDArray[np.bool_]:
    """Which of the points [N, 2] no other point beats: as good in both, better in one. bool [N]."""
    points = np.asarray(points, dtype=np.float64)
    as_good = np.all(points[:, None] >= points[None], axis=-1)  # [by, of]
    better = np.any(points[:, None] > points[None], axis=-1)
    front: NDArray[np.bool_] = ~np.any(as_good & better, axis=0)
    return front


@dataclass(frozen=True, slots=True)
class Resamples:
    """Bootstrap resamples of prompts: how often each prompt is drawn, [R, prompts].

    Methods measured on the same prompts share the resamples, so that differences are paired.
    """

    counts: Floats

    @classmethod
    def of(cls, prompts: int, resamples: int = 2000, seed: int = 0) -> "Resamples":
        """`resamples` draws with replacement of as many prompts as there are."""
        generator = np.random.default_rng(seed)
        share = np.full(prompts, 1.0 / prompts)
        return cls(generator.multinomial(prompts, share, size=resamples).astype(np.float64))

    def coverage(self, values: Floats) -> Floats:
        """Coverage [R] in every resample, of values [points, prompts, 2] of one method."""
        means = np.einsum("rp,npc->rnc", self.counts, values) / self.counts.sum(1)[:, None, None]
        return coverage(means)


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval that holds `level` of the draws [R]."""
    tail = (1.0 - level) / 2
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)
