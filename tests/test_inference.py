"""P-values of few prompts, intervals and bounds: exact cases, the laws, and simulated coverage."""

from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from baco.evaluation.indicators import Measured, indicators
from baco.evaluation.inference import (
    difference_bounds,
    dominance_bounds,
    expansion,
    influence,
    interval,
    sign_flip_p,
)
from benchmarks.intervals import held, invented

PARTS = {"lexical": ("distinct_1",)}
VALUES = st.lists(st.floats(-9, 9, allow_nan=False, width=16), min_size=1, max_size=8)


@given(VALUES)
def test_sign_flips_are_all_flips(values: list[float]) -> None:
    row = np.array(values)
    distances = [abs(np.dot(signs, row)) for signs in product((1, -1), repeat=len(row))]
    expected = np.mean([distance >= abs(row.sum()) - 1e-9 for distance in distances])
    assert sign_flip_p(row) == pytest.approx(expected)
    assert sign_flip_p(row) >= 2 / 2 ** len(row)


def measured(prompts: int, lead: float, task: str = "") -> Measured:
    """Two methods at one setting each; one leads the other on every prompt."""
    rng = np.random.default_rng(0)
    own = np.array([[0.0], [1.0], [0.4 + lead], [0.4]])
    quality = own + 0.01 * rng.standard_normal((4, prompts))
    diversity = own[[1, 0, 2, 3]] + 0.01 * rng.standard_normal((4, prompts))
    return Measured(
        ["rest", "rest", "A", "B"],
        list("wxyz"),
        [None] * 4,
        [str(place) for place in range(prompts)],
        {"reward": quality, "distinct_1": diversity},
        task,
    )


@pytest.mark.parametrize("prompts", [1, 2, 4, 7])
def test_no_p_value_is_below_what_the_prompts_can_give(prompts: int) -> None:
    result = indicators([measured(prompts, 0.3)], PARTS, ("reward",), 400)
    for indicator in ("coverage", "dominance"):
        lead = result.compare("A", "B", indicator, "lexical")
        assert lead is not None
        assert lead.p_value >= min(1.0, 2 / 2**prompts)
    lead = result.compare("A", "B", part="lexical")
    assert lead is not None
    assert lead.p_value == pytest.approx(2 / 2**prompts)  # the lead is there on every prompt


def test_the_prompts_of_all_tasks_count_in_a_p_value() -> None:
    result = indicators(
        [measured(3, 0.3, "first"), measured(4, 0.3, "second")], PARTS, ("reward",), 100
    )
    lead = result.compare("A", "B", part="lexical")
    assert lead is not None
    assert lead.p_value == pytest.approx(2 / 2**7)
    alone = result.compare("A", "B", part="lexical", task="first")
    assert alone is not None
    assert alone.p_value == pytest.approx(2 / 2**3)


def test_the_influence_of_a_mean_is_its_values() -> None:
    values = np.array([3.0, -1.0, 4.0, 1.0, 5.0])
    without = np.array([np.delete(values, place).mean() for place in range(5)])
    assert influence(values.mean(), without) == pytest.approx(values)


def test_intervals_are_expanded_for_few_prompts() -> None:
    for prompts in (4, 10, 40):
        t = stats.t.ppf(0.975, prompts - 1) / stats.norm.ppf(0.975)
        expected = t * np.sqrt(prompts / (prompts - 1))
        assert expansion(prompts) == pytest.approx(expected, rel=0.01)
    draws = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    assert interval(draws) == pytest.approx((-1.96, 1.96), abs=0.001)
    low, high = interval(draws, 10)
    assert (low, high) == pytest.approx((-1.96 * expansion(10), 1.96 * expansion(10)), abs=0.01)


def test_differences_are_bounded_all_together() -> None:
    rng = np.random.default_rng(2)
    truth = np.linspace(0, 1, 6)
    hits = 0
    for _ in range(60):
        scores = truth[:, None] + rng.standard_normal((6, 30))
        weights = rng.multinomial(30, np.full(30, 1 / 30), size=200) / 30
        low, high = difference_bounds({"reward": scores}, weights)["reward"]
        apart = truth[:, None] - truth[None, :]
        hits += bool(((low <= apart) & (apart <= high)).all())
        assert (low == -high.T).all()
    assert hits >= 53


def test_bounds_of_dominance_equal_bounds_computed_by_hand() -> None:
    # 0 and 1 are on the front, 2 is behind 1; nothing is uncertain.
    quality, diversity = np.array([0.0, 1.0, 0.9]), np.array([1.0, 0.5, 0.4])
    exact = [(axis[:, None] - axis[None, :],) * 2 for axis in (quality, diversity)]
    rows = [np.array([0]), np.array([1, 2]), np.array([], dtype=np.intp)]
    bounds = dominance_bounds(exact[0], exact[1], rows)
    assert bounds[:2].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert np.isnan(bounds[2]).all()
    apart = dominance_bounds(exact[0], exact[1], [np.array([place]) for place in range(3)])
    assert apart.tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]]
    # 0.2 of uncertainty in each: 2 may be on the front beside 1, and 1 may be off it.
    loose = [(difference - 0.2, difference + 0.2) for difference, _ in exact]
    bounds = dominance_bounds(loose[0], loose[1], rows)
    assert bounds[0].tolist() == [1 / 3, 1.0]
    assert bounds[1].tolist() == [0.0, 2 / 3]


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """A wide band; `benchmarks/intervals.py` measures it.

    The plain bootstrap of Dominance fails: noise puts points of the rival on the front.
    """
    rows = held(partial(invented, behind=2.0), invented(None, 2.0), 60)
    shares = {row.figure: row for row in rows}
    for method in ("owner", "rival"):
        assert shares[f"Dominance of {method}"].plain < 0.8
        assert shares[f"Dominance of {method}"].now >= 0.95
        for name in ("Coverage", "Coverage at 3 settings"):
            assert shares[f"{name} of {method}"].now >= 0.85
    for name in ("Coverage", "Coverage at 3 settings", "Dominance"):
        assert shares[f"{name}, difference"].now >= 0.8
