"""Coverage and Dominance over sub-spaces: hand-computed fronts, a library as oracle, and the laws.

"Adding a dominated point changes nothing" is a law of the plane: neither the area covered nor the
joint front knows of it. Normalisation looks at all points, so there the point must lie within the
range that the others span, or it would move the scale for all methods.
"""

from dataclasses import replace
from itertools import combinations

import moocore
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from baco.evaluation.indicators import Indicators, Measured, fewest_settings, indicators
from baco.evaluation.inference import interval
from baco.evaluation.metrics import names as metric_names
from baco.evaluation.pareto import best_at, coverage, coverage_at, normalised, pareto_front


def planes(most: int) -> st.SearchStrategy[np.ndarray]:
    """Planes of 1 to `most` points."""
    shape = st.tuples(st.integers(1, most), st.just(2))
    return arrays(np.float64, shape, elements=st.floats(0, 1, width=16))


PLANE = planes(12)
LEXICAL, SEMANTIC = metric_names("lexical"), metric_names("semantic")
QUALITY = metric_names("quality")
PARTS = {"lexical": ("distinct_1",), "semantic": ("vendi",)}
SPACE = ("distinct_1", "reward")


def measured(
    rows: dict[str, list[tuple[float, float]]], prompts: int = 1, task: str = "t", noise: float = 0
) -> Measured:
    """Methods with their (quality, diversity) points, the same on every prompt except for noise."""
    methods = [name for name, points in rows.items() for _ in points]
    points = np.array([point for points in rows.values() for point in points], dtype=float)
    rng = np.random.default_rng(0)
    quality, diversity = (
        points[:, [axis]] + noise * rng.standard_normal((len(points), prompts)) for axis in (0, 1)
    )
    return Measured(
        methods,
        [str(index) for index in range(len(methods))],
        [None] * len(methods),
        [str(index) for index in range(prompts)],
        {"reward": quality, "distinct_1": diversity, "vendi": 1 + diversity},
        task,
    )


def computed(task: Measured, *more: Measured, resamples: int = 200) -> Indicators:
    return indicators([task, *more], PARTS, ("reward",), resamples)


def values(result: Indicators, indicator: str, part: object = "overall") -> dict[str, float]:
    figures = {}
    for method in result.methods:
        estimate = result.estimate(indicator, method, part)  # type: ignore[arg-type]
        assert estimate is not None
        figures[method] = estimate.value
    return figures


# A and B share a plane that spans 0 to 2 in quality and 0 to 4 in diversity.
BY_HAND = {"A": [(0.0, 4.0), (1.0, 2.0)], "B": [(2.0, 0.0), (1.0, 3.0), (0.5, 3.0)]}


def test_coverage_and_dominance_equal_figures_computed_by_hand() -> None:
    result = computed(measured(BY_HAND))
    # A: (0, 1), (.5, .5) cover .5 × .5. B: (1, 0), (.5, .75), (.25, .75) cover .5 × .75.
    assert values(result, "coverage") == pytest.approx({"A": 0.25, "B": 0.375})
    # The joint front: A's (0, 1), B's (1, 0) and (.5, .75).
    assert values(result, "dominance") == pytest.approx({"A": 1 / 3, "B": 2 / 3})


def test_points_that_coincide_share_the_front() -> None:
    result = computed(measured({"A": [(1, 1), (0, 0)], "B": [(1, 1)]}))
    assert values(result, "dominance") == {"A": 0.5, "B": 0.5}


def test_a_metric_with_equal_values_gives_no_coverage() -> None:
    result = computed(measured({"A": [(1.0, 0.3)], "B": [(0.0, 0.3)]}))
    assert values(result, "coverage") == {"A": 0.0, "B": 0.0}


@given(PLANE)
def test_coverage_is_moocore_s_hypervolume(points: np.ndarray) -> None:
    assert coverage(points) == pytest.approx(
        moocore.hypervolume(points, ref=[0, 0], maximise=True), abs=1e-12
    )


@settings(max_examples=30)
@given(points=planes(6), k=st.integers(1, 6))
def test_coverage_at_k_is_the_mean_over_all_subsets(points: np.ndarray, k: int) -> None:
    k = min(k, len(points))
    every = [list(chosen) for chosen in combinations(range(len(points)), k)]
    expected = np.mean([coverage(points[chosen]) for chosen in every])
    assert coverage_at(points, k) == pytest.approx(expected, abs=1e-12)
    best = np.mean([points[chosen, 0].max() for chosen in every])
    assert best_at(points[:, 0], k) == pytest.approx(best, abs=1e-12)


@given(PLANE)
def test_coverage_at_all_settings_is_coverage(points: np.ndarray) -> None:
    assert coverage_at(points, len(points)) == pytest.approx(coverage(points), abs=1e-12)
    assert best_at(points[:, 0], len(points)) == points[:, 0].max()
    for k in (0, len(points) + 1):
        with pytest.raises(ValueError, match=f"k is {k}; expected 1 to"):
            coverage_at(points, k)
        with pytest.raises(ValueError, match=f"k is {k}; expected 1 to"):
            best_at(points[:, 0], k)


@given(PLANE)
def test_the_front_is_moocore_s(points: np.ndarray) -> None:
    expected = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    assert pareto_front(points).tolist() == expected.tolist()


def test_planes_have_fronts_side_by_side() -> None:
    planes = np.round(np.random.default_rng(0).random((3, 50, 8, 2)), 1)
    fronts = pareto_front(planes)
    assert fronts.shape == (3, 50, 8)
    for place in np.ndindex(3, 50):
        expected = moocore.is_nondominated(planes[place], maximise=True, keep_weakly=True)
        assert fronts[place].tolist() == expected.tolist()


POINTS = st.lists(
    st.tuples(st.sampled_from("ABC"), st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=12
)


def _rows(points: list[tuple[str, int, int]]) -> dict[str, list[tuple[float, float]]]:
    rows: dict[str, list[tuple[float, float]]] = {}
    for name, quality, diversity in points:
        rows.setdefault(name, []).append((quality, diversity))
    return rows


@given(points=POINTS)
def test_dominance_over_all_methods_sums_to_one(points: list[tuple[str, int, int]]) -> None:
    result = computed(measured(_rows(points), prompts=3, noise=0.5), resamples=20)
    for space in result.spaces:
        total = sum(result.draws["dominance", "t", space])
        assert total == pytest.approx(1.0)  # and in every resample
    assert sum(values(result, "dominance").values()) == pytest.approx(1.0)


@given(points=POINTS, place=st.integers(0, 11), share=st.floats(0, 1))
def test_a_dominated_point_within_the_range_changes_nothing(
    points: list[tuple[str, int, int]], place: int, share: float
) -> None:
    plane = np.array([point[1:] for point in points], dtype=float)
    over = plane[place % len(plane)]
    under = plane.min(axis=0) + share * (over - plane.min(axis=0))
    assume((under < over - 1e-6).any())
    before = computed(measured(_rows(points)), resamples=1)
    owner = points[place % len(points)][0]
    rows = _rows(points)
    rows[owner].append((float(under[0]), float(under[1])))
    after = computed(measured(rows), resamples=1)
    for indicator in ("coverage", "dominance"):
        assert values(after, indicator) == pytest.approx(values(before, indicator), abs=1e-9)


@given(
    points=POINTS,
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    name=st.sampled_from(["reward", "distinct_1", "vendi"]),
)
def test_scaling_a_metric_changes_nothing(
    points: list[tuple[str, int, int]], scale: float, shift: float, name: str
) -> None:
    plain = measured(_rows(points), prompts=4, noise=0.3)
    scaled = measured(_rows(points), prompts=4, noise=0.3)
    scaled.metrics[name][:] = scale * scaled.metrics[name] + shift
    before, after = computed(plain, resamples=20), computed(scaled, resamples=20)
    for indicator in ("coverage", "dominance"):
        assert values(after, indicator) == pytest.approx(values(before, indicator), abs=1e-6)


@given(points=POINTS, seed=st.integers(0, 99))
def test_the_order_of_points_changes_nothing(points: list[tuple[str, int, int]], seed: int) -> None:
    mixed = [points[place] for place in np.random.default_rng(seed).permutation(len(points))]
    before, after = computed(measured(_rows(points))), computed(measured(_rows(mixed)))
    for indicator in ("coverage", "dominance"):
        assert values(after, indicator) == pytest.approx(values(before, indicator))


def test_normalised_values_run_from_worst_to_best() -> None:
    assert normalised(np.array([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert normalised(np.array([[5.0, 5.0], [-1.0, 1.0]])).tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert normalised(np.array([0.1 + 0.2, 0.3])).tolist() == [0.0, 0.0]


# --- aggregates ---


def test_parts_are_means_over_their_sub_spaces_and_overall_their_mean() -> None:
    rng = np.random.default_rng(3)
    names = (*LEXICAL, *SEMANTIC, *QUALITY)
    task = Measured(
        ["A", "A", "B", "B", "C"],
        list("vwxyz"),
        [None] * 5,
        list("123456"),
        {name: rng.random((5, 6)) for name in names},
    )
    result = indicators([task], resamples=10)
    assert len(result.spaces) == 22
    assert not result.left_out
    for indicator in ("coverage", "dominance"):
        each = {space: values(result, indicator, space) for space in result.spaces}
        for method in "ABC":
            lexical = np.mean([each[d, q][method] for d in LEXICAL for q in QUALITY])
            semantic = np.mean([each[d, q][method] for d in SEMANTIC for q in QUALITY])
            assert values(result, indicator, "lexical")[method] == pytest.approx(lexical)
            assert values(result, indicator, "semantic")[method] == pytest.approx(semantic)
            expected = (lexical + semantic) / 2  # of 12 and 10 sub-spaces: not their pooled mean
            assert values(result, indicator)[method] == pytest.approx(expected)


def test_a_sub_space_is_computed_from_its_two_metrics_means() -> None:
    task = measured({"A": [(0, 4), (1, 2)], "B": [(2, 0), (1, 3)]}, prompts=7, noise=1.0)
    result = computed(task)
    points = np.stack(
        [
            normalised(task.metrics["reward"].mean(1)),
            normalised(task.metrics["distinct_1"].mean(1)),
        ],
        axis=-1,
    )
    assert values(result, "coverage", SPACE) == pytest.approx(
        {"A": coverage(points[:2]), "B": coverage(points[2:])}
    )


def curve(settings: int, seed: int) -> list[tuple[float, float]]:
    """Settings anywhere on one curve."""
    places = np.random.default_rng(seed).random(settings)
    return [(float(np.sqrt(1 - place)), float(np.sqrt(place))) for place in places]


def test_more_settings_of_the_same_kind_win_in_full_coverage_but_not_at_k_settings() -> None:
    ends = [(0.0, 1.0), (1.0, 0.0)]
    leads, fair = [], []
    for seed in range(20):
        rows = {"many": curve(20, seed), "few": curve(5, 100 + seed), "ends": ends}
        result = computed(measured(rows), resamples=1)
        assert result.k == 5
        full, at_k = values(result, "coverage"), result.compare("many", "few", "coverage_at_k")
        assert at_k is not None
        leads.append(full["many"] - full["few"])
        fair.append(at_k.difference)
        assert result.estimate("coverage_at_k", "ends") is None  # too few settings
        few = result.estimate("coverage_at_k", "few")
        assert few is not None
        assert few.value == pytest.approx(full["few"])  # k of 5 settings is all of them
    assert min(leads) > 0
    assert abs(np.mean(fair)) < 0.05 < np.mean(leads)


def test_k_is_the_fewest_of_the_methods_with_five_settings_on_any_task() -> None:
    first = measured({"A": curve(9, 0), "B": curve(6, 1), "C": curve(4, 2)}, task="first")
    second = measured({"A": curve(9, 0), "B": curve(5, 1)}, task="second")
    assert fewest_settings([first]) == 6
    assert fewest_settings([first, second]) == 5
    assert fewest_settings([measured(BY_HAND)]) is None
    result = computed(measured(BY_HAND))
    assert result.k is None
    assert result.estimate("coverage_at_k", "A") is None


def test_the_best_of_k_settings_is_compared_in_metrics_that_stand_for_themselves() -> None:
    task = measured({"A": curve(6, 0), "B": curve(5, 1)}, prompts=8, noise=0.1)
    scores = {**task.metrics, "utility_k": np.tile(np.arange(11.0)[:, None], 8)}
    task = replace(task, metrics=scores)
    result = computed(task)
    figure = result.estimate("best_at_k", "A", "utility_k")
    assert figure is not None
    assert figure.value == pytest.approx((5 * 5 + 4) / 6)  # 5 unless it is the one left out
    lead = result.compare("B", "A", "best_at_k", "utility_k")
    assert lead is not None
    assert lead.difference == pytest.approx(10 - 29 / 6)
    assert result.estimate("best_at_k", "A", "effective_distance") is None


def test_tasks_are_normalised_apart_and_averaged() -> None:
    first, second = (
        measured(BY_HAND, task="first"),
        measured({"A": [(9, 9)], "B": [(0, 0)]}, 1, "b"),
    )
    result = computed(first, second)
    assert result.coverage("A", task="first").value == pytest.approx(0.25)  # type: ignore[union-attr]
    assert result.coverage("A", task="b").value == pytest.approx(1.0)  # type: ignore[union-attr]
    assert values(result, "coverage") == pytest.approx({"A": 0.625, "B": 0.1875})


def test_metrics_that_a_task_lacks_are_left_out_and_listed() -> None:
    first, second = measured(BY_HAND, task="first"), measured(BY_HAND, task="second")
    second.metrics["vendi"][:] = np.nan
    result = indicators([first, second], PARTS, QUALITY, 10)
    assert result.spaces == (SPACE,)
    assert result.left_out == (
        ("distinct_1", "perplexity"),
        ("vendi", "reward"),
        ("vendi", "perplexity"),
    )
    assert result.coverage("A", "lexical") is not None
    assert result.coverage("A", "semantic") is None
    assert result.coverage("A") is None  # one of the two parts is missing
    assert result.compare("A", "B") is None


def test_a_setting_without_a_figure_is_worth_the_worst_of_the_others() -> None:
    task = measured(BY_HAND, prompts=2)
    task.metrics["reward"][0, 1] = np.nan
    figures = task.figures("reward")
    assert figures is not None
    assert figures[:, 1].tolist() == [0.5, 1.0, 2.0, 1.0, 0.5]
    task.metrics["reward"][:, 0] = np.nan
    assert task.figures("reward") is None  # no setting has a score for this prompt
    assert task.figures("perplexity") is None


# --- how sure ---


def test_intervals_hold_the_figures_of_resampled_prompts() -> None:
    task = measured(BY_HAND, prompts=12, noise=0.5)
    result = computed(task, resamples=50)
    drawn = result.draws["coverage", "t", SPACE]
    rng = np.random.default_rng(0).spawn(1)[0]
    counts = rng.multinomial(12, np.full(12, 1 / 12), size=50)
    prompts = np.repeat(np.arange(12), counts[7])  # the eighth resample, drawn out
    points = np.stack(
        [normalised(task.metrics[name][:, prompts].mean(1)) for name in ("reward", "distinct_1")],
        axis=-1,
    )
    assert drawn[:, 8] == pytest.approx([coverage(points[:2]), coverage(points[2:])])
    estimate = result.coverage("A", SPACE)
    assert estimate is not None
    assert (estimate.low, estimate.high) == pytest.approx(interval(drawn[0, 1:], 12))


def test_without_noise_intervals_have_no_width() -> None:
    result = computed(measured(BY_HAND, prompts=25))
    estimate = result.coverage("B")
    assert estimate is not None
    assert estimate.low == pytest.approx(estimate.high)
    sure = result.compare("B", "A")
    assert sure is not None
    assert (sure.difference, sure.low, sure.high) == pytest.approx((0.125, 0.125, 0.125))
    assert sure.p_value == pytest.approx(2 / 201)  # 200 resamples, none against: never 0


def test_a_comparison_is_paired() -> None:
    # The prompts differ wildly, the two methods on each hardly: unpaired, this would drown.
    rng = np.random.default_rng(1)
    prompts = 5 * rng.standard_normal((1, 40))
    gap = np.array([[0.0], [10.0], [0.8], [1.0]])
    quality = prompts * np.array([[1.0], [0.0], [1.0], [1.0]]) + gap
    diversity = np.tile([[1.0], [0.0], [1.0], [1.0]], (1, 40))
    task = Measured(
        ["rest", "rest", "worse", "better"],
        list("abcd"),
        [None] * 4,
        [str(index) for index in range(40)],
        {"reward": quality, "distinct_1": diversity},
    )
    result = indicators([task], {"lexical": ("distinct_1",)}, ("reward",), 500)
    comparison = result.compare("better", "worse")
    assert comparison is not None
    assert comparison.low > 0
    assert comparison.p_value == pytest.approx(2 / 501)
    better, worse = result.coverage("better"), result.coverage("worse")
    assert better is not None
    assert worse is not None
    assert better.low < worse.high  # their own intervals overlap


def test_a_method_is_not_different_from_itself() -> None:
    result = computed(measured(BY_HAND, prompts=9, noise=0.4))
    same = result.compare("A", "A", "dominance")
    assert same is not None
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_dominance_is_compared_on_any_number_of_prompts() -> None:
    apart = {"A": [(0.0, 0.0)], "B": [(1.0, 1.0)]}
    result = computed(measured(apart, prompts=1100, noise=0.01), resamples=20)
    sure = result.compare("B", "A", "dominance")
    assert sure is not None
    assert (sure.difference, sure.p_value) == (1.0, 0.05)


def test_swapping_the_methods_turns_the_comparison_round() -> None:
    result = computed(measured(BY_HAND, prompts=9, noise=0.8))
    forth, back = result.compare("A", "B"), result.compare("B", "A")
    assert forth is not None
    assert back is not None
    assert (forth.difference, forth.low) == pytest.approx((-back.difference, -back.high))
    assert forth.p_value == back.p_value


def test_the_same_seed_gives_the_same_intervals() -> None:
    task = measured(BY_HAND, prompts=9, noise=0.8)
    assert computed(task).coverage("A") == computed(task).coverage("A")
    other = indicators([task], PARTS, ("reward",), 200, seed=1)
    assert other.coverage("A") != computed(task).coverage("A")
