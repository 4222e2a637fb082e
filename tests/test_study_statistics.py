"""The statistics of a study equal those of reference libraries."""

import choix
import krippendorff
import numpy as np
import pytest
import statsmodels.api
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from baco.evaluation.indicators import Floats
from baco.study.bradley_terry import LEFT, RIGHT, TIE, davidson
from baco.study.clustering import Clusters, Ints, bootstrap_interval, clustered, holm, mean
from baco.study.inter_rater import agreement, gwet_ac, krippendorff_alpha

# Ratings of 12 units by 4 raters, 0 where there is none, and what irrCAC 0.4.4 makes of them.
RATINGS = [
    [5, 0, 0, 0], [1, 0, 1, 2], [2, 1, 2, 0], [1, 3, 0, 1], [1, 1, 1, 2], [5, 5, 0, 5],
    [0, 5, 5, 4], [2, 0, 3, 0], [1, 1, 1, 1], [1, 2, 2, 1], [0, 2, 1, 1], [3, 4, 2, 4],
    [4, 3, 4, 5], [4, 3, 2, 4], [1, 3, 0, 2], [2, 2, 0, 0], [4, 3, 4, 5], [0, 4, 0, 0],
    [1, 1, 0, 2], [2, 0, 1, 2], [2, 2, 0, 3], [2, 0, 1, 0], [5, 4, 5, 0], [0, 4, 2, 0],
    [2, 3, 4, 4], [3, 2, 2, 4], [4, 3, 0, 5], [4, 3, 4, 0], [1, 2, 1, 2], [4, 5, 5, 3],
]  # fmt: skip
# 40 units and 3 raters: nearly everybody says yes.
SKEWED_COUNTS = [[0, 2], *[[0, 3]] * 29, *[[1, 2]] * 10]


def table(seed: int, units: int = 30, raters: int = 6, missing: float = 0.4) -> Floats:
    """Ratings from 0 to 4, NaN where there is none."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, units)[:, None]
    ratings: Floats = np.clip(truth + rng.integers(-1, 2, (units, raters)), 0, 4).astype(float)
    ratings[rng.random(ratings.shape) < missing] = np.nan
    return ratings


def counted(ratings: Floats, categories: int = 5) -> Floats:
    counts: Floats = (ratings[..., None] == np.arange(categories)).sum(1).astype(float)
    return counts


def preferences(
    seed: int, tie: float, judgments: int = 400, methods: int = 4
) -> tuple[Ints, Ints, Ints, Clusters]:
    """Judgments of Davidson's model: left, right, outcome, clusters."""
    rng = np.random.default_rng(seed)
    left = rng.integers(0, methods, judgments)
    right = (left + rng.integers(1, methods, judgments)) % methods
    strength = np.exp(np.linspace(0.5, -0.5, methods))
    a, b = strength[left], strength[right]
    draw = rng.random(judgments) * (a + b + tie * np.sqrt(a * b))
    outcome = np.where(draw < a, LEFT, np.where(draw < a + b, RIGHT, TIE))
    clusters = Clusters(rng.integers(0, 12, judgments), rng.integers(0, 40, judgments))
    return left, right, outcome, clusters


@pytest.mark.parametrize("seed", range(4))
def test_alpha_equals_the_krippendorff_package(seed: int) -> None:
    ratings = table(seed)
    theirs = krippendorff.alpha(reliability_data=ratings.T, level_of_measurement="ordinal")
    assert krippendorff_alpha(counted(ratings)) == pytest.approx(theirs, abs=1e-12)


def test_alpha_of_units_that_count_twice_is_alpha_of_the_doubled_table() -> None:
    ratings = table(0)
    weights = np.array([[1.0] * 30, [2.0] * 15 + [0.0] * 15])
    one, other = krippendorff_alpha(counted(ratings), weights)
    assert one == pytest.approx(krippendorff_alpha(counted(ratings)))
    doubled = np.concatenate([ratings[:15], ratings[:15]])
    assert other == pytest.approx(krippendorff_alpha(counted(doubled)))


def test_alpha_is_undefined_where_all_ratings_are_equal() -> None:
    assert np.isnan(krippendorff_alpha(np.array([[3.0, 0.0], [2.0, 0.0]])))


def test_gwets_ac_equals_irrcac() -> None:
    ratings = np.array(RATINGS) - 1.0
    ratings[ratings < 0] = np.nan
    assert gwet_ac(counted(ratings)) == pytest.approx(0.65804, abs=1e-5)


def test_ac_is_high_where_alpha_is_low_because_one_answer_is_usual() -> None:
    counts = np.array(SKEWED_COUNTS, dtype=float)
    assert gwet_ac(counts) == pytest.approx(0.80328, abs=1e-5)
    assert krippendorff_alpha(counts) < 0


def test_agreement_reports_units_and_raters_with_two_ratings_and_covers_alpha() -> None:
    ratings = table(1)
    ratings[0] = np.nan
    ratings[0, 2] = 3  # one rating alone
    result = agreement(ratings, np.arange(30), 5)
    assert result is not None
    assert result.units == int(((~np.isnan(ratings)).sum(1) >= 2).sum())
    assert result.raters == 6
    assert result.alpha is not None and result.gwet is not None
    assert result.alpha.value == pytest.approx(krippendorff_alpha(counted(ratings)))
    assert result.gwet.value == pytest.approx(gwet_ac(counted(ratings)))
    assert result.alpha.low < result.alpha.value < result.alpha.high
    same = [row for row in ratings if (~np.isnan(row)).sum() >= 2]
    pairs = [(a, b) for row in same for i, a in enumerate(row) for b in row[i + 1 :]]
    known = [(a, b) for a, b in pairs if not np.isnan(a + b)]
    assert result.equal == pytest.approx(np.mean([a == b for a, b in known]))


def test_agreement_needs_a_unit_with_two_ratings() -> None:
    assert agreement(np.array([[1.0, np.nan], [np.nan, 0.0]]), np.arange(2), 2) is None


@pytest.mark.parametrize("seed", range(3))
def test_strengths_without_ties_equal_choix(seed: int) -> None:
    left, right, outcome, clusters = preferences(seed, tie=0)
    ours = davidson(left, right, outcome, 4, clusters)
    assert ours is not None and ours.tie is None
    wins = [(a, b) if o == LEFT else (b, a) for a, b, o in zip(left, right, outcome, strict=True)]
    theirs = choix.opt_pairwise(4, wins, alpha=0, tol=1e-12)
    assert [e.value for e in ours.methods] == pytest.approx(theirs - theirs.mean(), abs=1e-5)


def test_strengths_with_ties_maximise_davidsons_likelihood() -> None:
    left, right, outcome, clusters = preferences(3, tie=0.8)

    def loss(x: Floats) -> float:
        strength = np.exp(np.append(x[:3], -x[:3].sum()))
        a, b = strength[left], strength[right]
        tie = np.exp(x[3]) * np.sqrt(a * b)
        odds = np.stack([a, tie, b])[outcome, np.arange(len(left))]
        return float(-np.log(odds / (a + b + tie)).sum())

    best = optimize.minimize(loss, np.zeros(4), tol=1e-10).x
    ours = davidson(left, right, outcome, 4, clusters)
    assert ours is not None and ours.tie is not None
    assert [e.value for e in ours.methods][:3] == pytest.approx(best[:3], abs=1e-4)
    assert ours.tie == pytest.approx(best[3], abs=1e-4)


def test_errors_of_strengths_equal_a_logistic_regressions() -> None:
    left, right, outcome, _ = preferences(4, tie=0, methods=2)
    sign = np.where(left == 0, 1.0, -1.0)
    won = np.where(outcome == LEFT, sign > 0, sign < 0)
    every = np.arange(len(left))
    ours = davidson(left, right, outcome, 2, Clusters(every, every))
    assert ours is not None
    theirs = statsmodels.api.Logit(won, np.ones(len(won))).fit(cov_type="HC0", disp=False)
    error = theirs.bse[0] * np.sqrt(400 / 399)
    # The strengths are plus and minus half the log odds.
    half_width = (ours.methods[0].high - ours.methods[0].low) / 2
    assert ours.methods[0].value == pytest.approx(theirs.params[0] / 2, abs=1e-6)
    assert half_width / stats.t.ppf(0.975, 399) == pytest.approx(error / 2, rel=1e-6)


def test_strengths_are_absent_where_a_method_never_won() -> None:
    left, right = np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0])
    clusters = Clusters(np.arange(4), np.arange(4))
    assert davidson(left, right, np.array([0, 2, 0, 2]), 2, clusters) is None
    # Ties alone do not bound the gap between the only two methods ...
    assert davidson(left, right, np.array([0, 2, 0, 1]), 2, clusters) is None
    # ... but they do where other judgments determine how likely ties are.
    left, right = np.array([0, 0, 1, 1, 0, 0]), np.array([1, 2, 2, 2, 1, 2])
    clusters = Clusters(np.arange(6), np.arange(6))
    assert davidson(left, right, np.array([0, 0, 0, 2, 1, 1]), 3, clusters) is not None


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_a_mean_equals_statsmodels_two_way_clusters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rater, prompt = np.divmod(np.arange(240), 20)
    keep = rng.random(240) < 0.7
    rater, prompt = rater[keep], prompt[keep]
    values = rng.normal(size=12)[rater] + rng.normal(size=20)[prompt] + rng.normal(size=len(rater))
    ours = mean(values, Clusters(rater, prompt))
    theirs = statsmodels.api.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": np.stack([rater, prompt], axis=1)}
    )
    assert float(ours.value) == pytest.approx(theirs.params[0])
    assert float(ours.error) == pytest.approx(theirs.bse[0])


def test_without_shared_raters_or_prompts_the_tests_are_students() -> None:
    values = np.random.default_rng(0).normal(0.2, 1, 40)
    ours = mean(values, Clusters(np.arange(40), np.arange(40)))
    theirs = DescrStatsW(values)
    assert ours.interval() == pytest.approx(theirs.tconfint_mean())
    assert float(ours.two_sided()) == pytest.approx(theirs.ttest_mean(0)[1])
    assert float(ours.equivalence(0.6)) == pytest.approx(theirs.ttost_mean(-0.6, 0.6)[0])


def test_judgments_of_one_cell_count_as_one_cluster() -> None:
    """Doubling every judgment adds no information."""
    rng = np.random.default_rng(1)
    rater, prompt = np.divmod(np.arange(60), 10)
    values = rng.normal(size=60)
    once = mean(values, Clusters(rater, prompt))
    twice = mean(np.tile(values, 2), Clusters(np.tile(rater, 2), np.tile(prompt, 2)))
    assert float(twice.error) == pytest.approx(float(once.error))


def test_a_judgment_of_weight_zero_is_left_out() -> None:
    rng = np.random.default_rng(2)
    rater, prompt = np.divmod(np.arange(60), 10)
    values, weights = rng.normal(size=(2, 60)), np.ones((2, 60))
    weights[1, rater == 3] = 0
    both = mean(values, Clusters(rater, prompt), weights)
    kept = rater != 3
    alone = mean(values[1, kept], Clusters(rater, prompt).at(np.flatnonzero(kept)))
    assert both.value[1] == pytest.approx(float(alone.value))
    assert both.error[1] == pytest.approx(float(alone.error))
    assert both.freedom[1] == pytest.approx(float(alone.freedom))


def test_one_rater_or_one_prompt_gives_no_interval() -> None:
    values = np.arange(5.0)
    zeros, every = np.zeros(5, dtype=np.int64), np.arange(5)
    assert mean(values, Clusters(zeros, every)).estimate() is None
    assert mean(values, Clusters(every, zeros)).estimate() is None


def test_unanimous_judgments_do_not_have_an_interval_of_width_zero() -> None:
    rater, prompt = np.divmod(np.arange(60), 10)
    estimate = mean(np.ones(60), Clusters(rater, prompt)).estimate(0, 1)
    assert estimate is not None
    assert estimate.value == 1 and estimate.high == 1
    assert 0.9 < estimate.low < 1


def test_influence_of_a_constant_statistic_has_no_error() -> None:
    clusters = Clusters(np.arange(4), np.arange(4))
    assert float(clustered(np.asarray(1.0), np.zeros(4), clusters).error) == 0


def test_the_bootstrap_draws_whole_raters() -> None:
    """With three raters who always say 0, 1 and 2 the ends of the interval are 0 and 2."""
    rater, prompt = np.divmod(np.arange(90), 30)
    clusters = Clusters(rater, prompt)
    assert bootstrap_interval(rater.astype(float), clusters, 4000) == (0, 2)
    assert bootstrap_interval(np.ones(90), clusters, 100) == (1, 1)


def test_holms_adjustment_equals_statsmodels() -> None:
    p = np.random.default_rng(0).random((3, 5)) ** 3
    theirs = [multipletests(row, method="holm")[1] for row in p]
    assert holm(p) == pytest.approx(np.array(theirs))
