"""Coverage is the area that a method's points dominate: examples, a grid, and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from baco.evaluation.indicators import Resamples
from baco.evaluation.inference import interval
from baco.evaluation.pareto import coverage, pareto_front

POINTS = arrays(
    np.float64, st.tuples(st.integers(1, 12), st.just(2)), elements=st.floats(0, 1, width=32)
)


def test_one_point_covers_its_rectangle() -> None:
    assert coverage(np.array([[0.5, 0.4]])) == pytest.approx(0.2)


def test_three_points_by_hand() -> None:
    # Steps: up to 0.2 wide 0.9 high, then to 0.5 wide 0.6 high, then to 0.8 wide 0.1 high.
    points = np.array([[0.5, 0.6], [0.2, 0.9], [0.8, 0.1], [0.4, 0.5]])
    assert coverage(points) == pytest.approx(0.2 * 0.9 + 0.3 * 0.6 + 0.3 * 0.1)


def test_no_points_have_no_coverage() -> None:
    assert coverage(np.zeros((0, 2))) == 0.0


@pytest.mark.parametrize(
    "bad", [[[-0.1, 0.5]], [[np.nan, 0.5]], [[np.inf, 0.5]], [[1.0, 1.0, 1.0]]]
)
def test_impossible_points_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        coverage(np.array(bad))


@given(POINTS)
def test_coverage_is_the_share_of_a_grid_below_some_point(points: np.ndarray) -> None:
    points = np.round(points, 1)
    ticks = np.arange(0.05, 1, 0.1)  # cell centres: exact for points on the grid's lines
    x, y = np.meshgrid(ticks, ticks)
    below = (x[..., None] < points[:, 0]) & (y[..., None] < points[:, 1])
    assert coverage(points) == pytest.approx(below.any(-1).mean())


@given(POINTS, POINTS)
def test_more_points_never_cover_less(some: np.ndarray, more: np.ndarray) -> None:
    both = np.concatenate([some, more])
    assert coverage(both) >= max(coverage(some), coverage(more)) - 1e-12
    assert coverage(both) <= coverage(some) + coverage(more) + 1e-12


@given(POINTS)
def test_only_the_front_matters_and_neither_order_nor_axis_does(points: np.ndarray) -> None:
    area = coverage(points)
    assert coverage(points[pareto_front(points)]) == pytest.approx(area)
    assert coverage(points[::-1]) == pytest.approx(area)
    assert coverage(points[:, ::-1]) == pytest.approx(area)


@given(POINTS)
def test_no_point_of_the_front_is_beaten(points: np.ndarray) -> None:
    front = pareto_front(points)
    assert front.any()
    for point, on_front in zip(points, front, strict=True):
        beaten = (points >= point).all(1) & (points > point).any(1)
        assert on_front == (not beaten.any())


def test_planes_are_computed_side_by_side() -> None:
    planes = np.random.default_rng(0).random((5, 4, 2))
    assert coverage(planes) == pytest.approx([coverage(plane) for plane in planes])


def test_a_resample_is_a_mean_over_the_drawn_prompts() -> None:
    values = np.random.default_rng(1).random((3, 6, 2))
    resamples = Resamples.of(6, resamples=50, seed=2)
    assert (resamples.counts.sum(1) == 6).all()
    drawn = np.repeat(np.arange(6), resamples.counts[7].astype(int))
    means = np.einsum("p,npc->nc", resamples.counts[7], values) / 6
    assert coverage(means) == pytest.approx(coverage(values[:, drawn].mean(1)))


def test_an_interval_holds_95_percent_of_the_draws() -> None:
    assert interval(np.arange(1001) / 1000) == pytest.approx((0.025, 0.975))
