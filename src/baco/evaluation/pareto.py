"""Geometry of a diversity-quality plane: the area that points dominate, and their Pareto front.

A point is (quality, diversity); higher is better, and zero is the worst. Pure functions of arrays.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def coverage(points: Floats) -> Floats:
    """Area dominated by points with (0, 0) as reference (the hypervolume; arXiv 2511.05650, 5.1).

    Args:
        points: [..., N, 2], finite and not negative; every leading index is a separate plane.

    Returns:
        [...], the area of the union of the rectangles from (0, 0) to each point; 0 without points.

    Raises:
        ValueError: a coordinate is negative or not finite, or the last axis is not two long.
    """
    points = _checked(points)
    order = np.argsort(-points[..., 0], axis=-1, kind="stable")
    across = np.take_along_axis(points[..., 0], order, axis=-1)
    height = np.maximum.accumulate(np.take_along_axis(points[..., 1], order, axis=-1), axis=-1)
    area: Floats = np.sum(-np.diff(across, axis=-1, append=0.0) * height, axis=-1)
    return area


def coverage_at(points: Floats, k: int) -> Floats:
    """Mean `coverage` of all subsets of k of the points.

    The area of a union never falls when a point is added, so methods with different numbers of
    points are compared at one k. The mean is exact: a place that c of the N points dominate is
    dominated by a subset of k unless all k are among the other N − c, so it counts with weight
    1 − C(N − c, k) / C(N, k).

    Args:
        points: [..., N, 2], as in `coverage`.
        k: 1 to N; for k = N this is `coverage`.

    Returns:
        [...], the mean area. Cost: N² a plane.

    Raises:
        ValueError: as `coverage`, or k is out of range.
    """
    points = _checked(points)
    count = points.shape[-2]
    if not 1 <= k <= count:
        raise ValueError(f"k is {k}; expected 1 to {count}, the number of points")
    weight = np.array([1.0 - comb(count - c, k) / comb(count, k) for c in range(count + 1)])
    order = np.argsort(points[..., 0], axis=-1)
    across = np.take_along_axis(points[..., 0], order, axis=-1)
    height = np.take_along_axis(points[..., 1], order, axis=-1)
    widths = np.diff(across, axis=-1, prepend=0.0)
    area = np.zeros(points.shape[:-2])
    below = np.zeros((*points.shape[:-2], 1))
    for level in np.moveaxis(np.sort(height, axis=-1), -1, 0):
        # In the strip between two levels: how many points reach over it, from each x to the right.
        reaching = (height >= level[..., None]).astype(np.intp)
        counts = np.cumsum(reaching[..., ::-1], axis=-1)[..., ::-1]
        area += np.sum(widths * weight[counts], axis=-1) * (level - below[..., 0])
        below = level[..., None]
    return area


def best_at(values: Floats, k: int) -> Floats:
    """Mean of the highest of all subsets of k of N values, [..., N] to [...].

    Raises:
        ValueError: k is not 1 to N.
    """
    count = values.shape[-1]
    if not 1 <= k <= count:
        raise ValueError(f"k is {k}; expected 1 to {count}, the number of values")
    # The r-th lowest value is the highest of C(r - 1, k - 1) subsets.
    share = np.array([comb(rank, k - 1) / comb(count, k) for rank in range(count)])
    mean: Floats = np.sort(values, axis=-1) @ share
    return mean


def pareto_front(points: Floats) -> NDArray[np.bool_]:
    """Which points are not dominated: no other point is as good in both and better in one.

    Args:
        points: [..., N, 2]; every leading index is a separate plane.

    Returns:
        bool [..., N]; points that coincide are on the front together.
    """
    points = np.asarray(points, dtype=np.float64)
    if not points.shape[-2]:
        return np.zeros(points.shape[:-1], dtype=np.bool_)
    order = np.lexsort((-points[..., 1], -points[..., 0]), axis=-1)
    across = np.take_along_axis(points[..., 0], order, axis=-1)
    height = np.take_along_axis(points[..., 1], order, axis=-1)
    # From right to left, and from high to low at equal x: a point is dominated by a higher one at
    # the same x, or by any further right that is as high.
    fresh = np.diff(across, axis=-1, prepend=np.inf) != 0
    first = np.maximum.accumulate(np.where(fresh, np.arange(across.shape[-1]), 0), axis=-1)
    ceiling = np.maximum.accumulate(height, axis=-1)
    ceiling = np.concatenate([np.full_like(ceiling[..., :1], -np.inf), ceiling], axis=-1)
    free = height > np.take_along_axis(ceiling, first, axis=-1)
    free &= height == np.take_along_axis(height, first, axis=-1)
    front = np.empty(free.shape, dtype=np.bool_)
    np.put_along_axis(front, order, free, axis=-1)
    return front


def beyond(points: Floats, rivals: Floats) -> Floats:
    """How far points are beyond the front of rivals, [N].

    The front is the line through the rivals' Pareto-optimal points, since a sampling parameter
    between two settings gives a point between theirs. A point's lead is what it must lose in both
    coordinates at once to be on the line (the additive epsilon indicator of Zitzler et al. 2003,
    with its sign turned): positive beyond the front, negative behind it.

    Args:
        points: [N, 2].
        rivals: [M, 2], at least one.
    """
    points, rivals = np.asarray(points, np.float64), np.asarray(rivals, np.float64)
    front = np.unique(rivals[pareto_front(rivals)], axis=0)
    start = front[:, None]  # [M, 1, 2], x ascending and y descending
    end = np.concatenate([front[1:], front[-1:]])[:, None]
    # Along a segment the lead in x falls and the lead in y rises; the larger is least where equal.
    over, span = points - start, end - start  # [M, N, 2], [M, 1, 2]
    length = span[..., 0] - span[..., 1]
    crossing = (over[..., 0] - over[..., 1]) / np.where(length > 0, length, 1.0)
    place = np.where(length > 0, np.clip(crossing, 0.0, 1.0), 0.0)
    lead: Floats = (over - place[..., None] * span).max(axis=-1).min(axis=0)
    return lead


def normalised(values: Floats) -> Floats:
    """Min-max normalise values of N points, [..., N], to 0 for the worst and 1 for the best.

    Where all are equal they become 0: a metric that separates no points covers no area. Values that
    differ only by rounding become equal.
    """
    low = values.min(axis=-1, keepdims=True)
    spread = values.max(axis=-1, keepdims=True) - low
    alike = spread <= 1e-12 * np.abs(values).max(axis=-1, keepdims=True)
    scaled: Floats = np.round((values - low) / np.where(alike, 1.0, spread), 12)
    return np.where(alike, 0.0, scaled)


def _checked(points: Floats) -> Floats:
    points = np.asarray(points, dtype=np.float64)
    if points.shape[-1:] != (2,):
        raise ValueError(f"points have shape {points.shape}; expected two coordinates, [..., N, 2]")
    if not np.all(np.isfinite(points)) or np.any(points < 0):
        raise ValueError("points have negative or infinite coordinates; expected 0 or more")
    return points
