"""Geometry of a diversity-quality plane: the area that points cover, and their Pareto front.

A point is (quality, diversity), higher being better, zero the worst. Pure functions of numpy
arrays; where the points come from is another matter.
"""

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
    """Which points no other point of their plane beats: as good in both, better in one.

    Args:
        points: [..., N, 2]; every leading index is a plane of its own.

    Returns:
        bool [..., N]; points that coincide are on the front together.
    """
    points = np.asarray(points, dtype=np.float64)
    if not points.shape[-2]:
        return np.zeros(points.shape[:-1], dtype=np.bool_)
    order = np.lexsort((-points[..., 1], -points[..., 0]), axis=-1)
    across = np.take_along_axis(points[..., 0], order, axis=-1)
    height = np.take_along_axis(points[..., 1], order, axis=-1)
    # From right to left, highest first where equally far right: a point is beaten by the first of
    # those beside it if lower, and by any further right that is as high.
    fresh = np.diff(across, axis=-1, prepend=np.inf) != 0
    first = np.maximum.accumulate(np.where(fresh, np.arange(across.shape[-1]), 0), axis=-1)
    ceiling = np.maximum.accumulate(height, axis=-1)
    ceiling = np.concatenate([np.full_like(ceiling[..., :1], -np.inf), ceiling], axis=-1)
    free = height > np.take_along_axis(ceiling, first, axis=-1)
    free &= height == np.take_along_axis(height, first, axis=-1)
    front = np.empty(free.shape, dtype=np.bool_)
    np.put_along_axis(front, order, free, axis=-1)
    return front


def normalised(values: Floats) -> Floats:
    """Values of N points on 0 to 1, the worst of them to the best (min-max), [..., N].

    Where all are alike they are 0: a metric that tells no point from another covers nothing.
    Figures that differ by rounding alone are made the same.
    """
    low = values.min(axis=-1, keepdims=True)
    spread = values.max(axis=-1, keepdims=True) - low
    alike = spread <= 1e-12 * np.abs(values).max(axis=-1, keepdims=True)
    scaled: Floats = np.round((values - low) / np.where(alike, 1.0, spread), 12)
    return np.where(alike, 0.0, scaled)
