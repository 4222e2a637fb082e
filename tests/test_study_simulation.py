"""Simulated studies: error rates and coverage, power, attention checks, side bias.

The figures of these claims at full size are made by `benchmarks/study.py`; the bands here are wide.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from baco.errors import BacoError
from baco.evaluation.indicators import Floats
from baco.study.clustering import Clusters, Mean, mean
from baco.study.comparisons import comparisons
from baco.study.exclusions import conducts, exclude
from baco.study.inter_rater import krippendorff_alpha
from baco.study.plan import Contrast, read_plan, text_hash
from baco.study.power import _sufficient, contrast_p_values, pilot_population, planned_power
from baco.study.schedule import schedule, texts_shown
from baco.study.simulation import (
    Layout,
    Population,
    balanced_layout,
    contrast_layout,
    contrast_strengths,
    draw,
    simulate,
    simulated_answers,
)
from baco.study.store import Judgment, Rater, as_judgments
from baco.study.study import Study
from tests.studies import answer, made_study

STUDIES = 600
LAYOUT = balanced_layout(raters=24, prompts=30, pairs=3)
SUPERIORITY = Contrast("c", "q", "A", "B", "superiority", "A is better.")
EQUIVALENCE = Contrast("c", "q", "A", "B", "equivalence", "A is as good.", margin=0.5)


def simulated(
    population: Population,
    *,
    difference: float = 0.0,
    layout: Layout = LAYOUT,
    seed: int = 0,
    rating: bool = False,
) -> Floats:
    """Treatment minus control of every judgment, [studies, N]."""
    drawn = draw(
        layout,
        np.array([difference, 0.0]),
        "rating" if rating else "preference",
        population,
        np.random.default_rng(seed),
        STUDIES,
    )
    return np.where(layout.left == 0, drawn.difference, -drawn.difference)


def means(values: Floats, layout: Layout = LAYOUT) -> Mean:
    return mean(values, Clusters(layout.rater, layout.prompt))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    return made_study(folder, run={"prompts": 24}, prompts=18, raters=12)


def judgments_of(study: Study, population: Population, raters: int, seed: int) -> list[Judgment]:
    """Judgments of simulated raters, without the store."""
    generator = np.random.default_rng(seed)
    schedules = [schedule(study.plan, number) for number in range(raters)]
    return [
        judgment
        for given in simulated_answers(study.plan, schedules, population, generator)
        for answer in given
        for judgment in as_judgments(study.plan, answer, "simulated")
    ]


@pytest.mark.parametrize("spreads", [(0.0, 0.0), (0.6, 1.5), (1.2, 0.5)])
@pytest.mark.parametrize("rating", [False, True])
def test_without_an_effect_a_contrast_is_significant_in_five_percent(
    spreads: tuple[float, float], rating: bool
) -> None:
    population = Population(rater_spread=spreads[0], prompt_spread=spreads[1])
    p = means(simulated(population, rating=rating)).two_sided()
    # Where neither raters nor prompts differ, the larger of the variances is a little too large.
    least = 0.02 if any(spreads) else 0.005
    assert least < (p < 0.05).mean() < 0.085


@pytest.mark.parametrize("spreads", [(0.0, 0.0), (0.6, 1.5), (1.2, 0.5)])
@pytest.mark.parametrize("raters", [6, 24])
def test_intervals_contain_the_win_rate_in_ninety_five_percent(
    spreads: tuple[float, float], raters: int
) -> None:
    layout = balanced_layout(raters, 30, 3)
    population = Population(0.65, *spreads)
    difference = population.difference()
    low, high = means(
        simulated(population, difference=difference, layout=layout), layout
    ).interval()
    true = population.effect - 0.5
    assert 0.91 < ((low < true) & (true < high)).mean() < 0.995


def test_the_effect_of_a_population_is_its_win_rate() -> None:
    population = Population(effect=0.7, rater_spread=0.8, prompt_spread=1.2, ties=0.3)
    values = simulated(population, difference=population.difference())
    assert values.mean() + 0.5 == pytest.approx(0.7, abs=0.01)
    equal = simulated(Population(rater_spread=0, prompt_spread=0, ties=0.3))
    assert (equal == 0).mean() == pytest.approx(0.3, abs=0.01)


def test_equivalence_at_the_margin_is_claimed_in_at_most_five_percent() -> None:
    population = Population(rater_spread=0.4, prompt_spread=0.4)
    differences = np.linspace(0, 2, 21)
    centers = [simulated(population, difference=d, rating=True).mean() for d in differences]
    at_margin = float(np.interp(0.5, centers, differences))
    p = contrast_p_values(
        EQUIVALENCE, LAYOUT, simulated(population, difference=at_margin, rating=True, seed=1)
    )
    assert (p < 0.05).mean() < 0.085
    p = contrast_p_values(EQUIVALENCE, LAYOUT, simulated(population, rating=True))
    assert (p < 0.05).mean() > 0.5


def test_a_better_control_never_supports_superiority() -> None:
    values = simulated(Population(effect=0.2), difference=-3.0)
    assert (contrast_p_values(SUPERIORITY, LAYOUT, values) == 1).all()


@pytest.mark.parametrize("side", [1.5, -1.5])
def test_a_side_bias_moves_no_contrast(side: float) -> None:
    population = Population(side=side)
    values = simulated(population)
    left_wins = np.where(LAYOUT.left == 0, values, -values)
    assert abs(left_wins.mean()) > 0.1  # the bias is there
    effect = means(values)
    assert abs(effect.value.mean()) < 4 * effect.value.std() / STUDIES**0.5
    assert (effect.two_sided() < 0.05).mean() < 0.085
    strong = Population(effect=0.7, side=side)
    assert means(simulated(strong, difference=strong.difference())).value.mean() > 0.1


@pytest.mark.parametrize("per_rater", [None, 6])
def test_a_layout_of_any_size_has_the_balance_of_the_schedules(
    study: Study, per_rater: int | None
) -> None:
    plan = dataclasses.replace(study.plan, prompts_per_rater=per_rater)
    each = (per_rater or 18) // 3
    for contrast in plan.contrasts:
        planned = contrast_layout(plan, contrast, 36)
        balanced = balanced_layout(36, 18, 3, per_rater)
        for layout in (planned, balanced):
            assert set(np.bincount(layout.rater)) == {each}
            assert set(np.bincount(layout.prompt)) == {36 * each // 18}
            assert layout.left.mean() == 0.5


def test_planned_power_is_reached_by_analysed_studies(study: Study) -> None:
    """The share of whole simulated studies, exclusions included, that support a contrast."""
    population = Population(effect=0.68, rater_spread=0.3, prompt_spread=0.8)
    planned = planned_power(study.plan, population, excluded=0.0, search=False)[0]
    contrast = planned.contrast
    question = study.plan.question[contrast.question]
    supported = []
    for seed in range(50):
        kept, _ = exclude(study.plan, judgments_of(study, population, 12, seed))
        rows, values = comparisons(study.plan, question, kept).between(
            contrast.treatment, contrast.control
        )
        effect = mean(values, rows.clusters)
        supported.append(effect.value > 0 and effect.two_sided() < study.plan.analysis.alpha)
    assert 0.5 < planned.alone < 0.97
    assert np.mean(supported) == pytest.approx(planned.alone, abs=0.15)


def test_power_grows_with_the_effect_and_its_search_finds_the_numbers(study: Study) -> None:
    weak = planned_power(study.plan, Population(effect=0.6), studies=100)
    strong = planned_power(study.plan, Population(effect=0.8), studies=100)
    assert strong[0].power > weak[0].power
    assert not weak[0].sufficient(study.plan)
    # With 18 prompts that differ this much no number of raters is sufficient, but more prompts are.
    assert weak[0].raters_needed is None
    assert weak[0].prompts_needed is not None and weak[0].prompts_needed > 18
    assert strong[0].raters_needed is not None
    assert strong[0].judgments_needed == strong[0].raters_needed * 6
    assert strong[0].alone >= strong[0].power


@pytest.mark.parametrize("needed", [1, 10, 11, 95, 330, 391, 400])
def test_the_search_finds_every_number_up_to_the_most(needed: int) -> None:
    found = _sufficient(lambda raters: float(raters >= needed), 0.8, 10, 404)
    assert found == -(-needed // 10) * 10
    assert _sufficient(lambda raters: float(raters > 400), 0.8, 10, 404) is None


def test_excluded_raters_cost_power(study: Study) -> None:
    population = Population(effect=0.75, prompt_spread=0.5)
    whole = planned_power(study.plan, population, excluded=0.0, search=False)[0]
    half = planned_power(study.plan, population, excluded=0.5, search=False)[0]
    assert half.alone < whole.alone - 0.1


def test_simulated_raters_answer_their_schedules_through_the_store(tmp_path: Path) -> None:
    study = made_study(tmp_path, prompts=6, raters=4)
    ids = simulate(study, 3, Population(), seed=1)
    assert study.simulated
    raters = study.store.raters()
    assert [rater.state for rater in raters] == ["finished"] * 3
    for rater in raters:
        assert rater.id in ids and rater.id.startswith("simulated-")
        assert rater.number is not None
        shown = [(s.item.id, s.position, s.left) for s in schedule(study.plan, rater.number)]
        given = study.store.answers(rater.id)
        assert [(a.item, a.position, a.left) for a in given] == shown
        assert all(
            set(a.responses) == {q.id for q in study.plan.asked(study.plan.item[a.item].unit)}
            for a in given
        )
    more = simulate(study, 2, Population(), seed=2)
    assert not set(more) & set(ids)
    study.close()


def test_equal_seeds_simulate_equal_answers(tmp_path: Path) -> None:
    answers = []
    for name in ("a", "b"):
        study = made_study(tmp_path / name)
        simulate(study, 2, Population(), seed=3)
        answers.append([(a.item, a.responses, a.seconds) for a in study.store.answers()])
        study.close()
    assert answers[0] == answers[1]


def test_a_study_with_answers_of_people_is_not_simulated(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    rater = study.store.add_rater()
    assert rater is not None
    study.store.update_rater(rater.id, "consented")
    with pytest.raises(BacoError, match="has answers of people"):
        simulate(study, 1, Population())
    study.close()


def test_a_study_with_imported_judgments_is_not_simulated(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    screen = schedule(study.plan, 0)[0]
    people = Rater("ann", None, "imported", "finished")
    study.store.add_imported({people.id: people.origin}, [answer(study, people, screen)])
    with pytest.raises(BacoError, match="has answers of people"):
        simulate(study, 1, Population())


@pytest.mark.parametrize("change", [{"effect": 1.0}, {"lazy": 1.5}, {"noise": 0.0}])
def test_populations_out_of_range_are_refused(study: Study, change: dict[str, float]) -> None:
    with pytest.raises(BacoError, match=f"--{next(iter(change))} is"):
        planned_power(study.plan, Population(**change))


def test_lazy_raters_are_excluded_and_attentive_ones_are_not(study: Study) -> None:
    lazy = judgments_of(study, Population(lazy=1), 12, 0)
    kept, exclusions = exclude(study.plan, lazy)
    assert not kept
    assert {e.rater for e in exclusions if e.item is None} == {str(n) for n in range(12)}
    attentive = judgments_of(study, Population(slips=0), 12, 0)
    assert exclude(study.plan, attentive)[1] == []


def test_lazy_raters_who_take_their_time_fail_the_checks(study: Study) -> None:
    slow = [
        dataclasses.replace(j, seconds=60.0) for j in judgments_of(study, Population(lazy=1), 12, 1)
    ]
    _, exclusions = exclude(study.plan, slow)
    reasons = [e.reason for e in exclusions]
    assert len(reasons) >= 11
    assert all("attention checks" in reason for reason in reasons)


def test_a_single_judgment_given_too_fast_is_excluded_with_its_times(study: Study) -> None:
    judgments = judgments_of(study, Population(slips=0), 1, 0)
    item = next(j.item for j in judgments if j.kind == "comparison")
    quick = [dataclasses.replace(j, seconds=0.1) if j.item == item else j for j in judgments]
    kept, (exclusion,) = exclude(study.plan, quick)
    assert exclusion.item == item
    assert "words in 0.1 s: less than the" in exclusion.reason
    assert exclusion.judgments == sum(j.item == item for j in judgments)
    assert len(kept) == len(judgments) - exclusion.judgments


def test_the_median_of_two_times_is_between_them(study: Study) -> None:
    judgments = [j for j in judgments_of(study, Population(), 1, 1) if j.kind == "comparison"]
    seconds = dict(zip(sorted({j.item for j in judgments}), (10.0, 20.0), strict=False))
    timed = [
        dataclasses.replace(j, seconds=seconds[j.item]) for j in judgments if j.item in seconds
    ]
    assert [c.seconds for c in conducts(study.plan, timed)] == [15]


def test_one_sided_and_incomplete_raters_are_excluded(study: Study) -> None:
    judgments = judgments_of(study, Population(slips=0), 2, 0)
    left = [
        dataclasses.replace(j, side="left")
        if j.rater == "0" and j.kind == "comparison" and j.side
        else j
        for j in judgments
    ]
    begun = [j for j in left if j.rater == "0" or j.position < 5]
    first, second = exclude(study.plan, begun)[1]
    assert first.reason.startswith("chose left in")
    assert second.reason.startswith("answered 5 of")
    assert [c.rater for c in conducts(study.plan, begun)] == ["0", "1"]


def test_alpha_falls_with_noise() -> None:
    layout = balanced_layout(24, 30, 1)
    alphas = []
    for noise in (0.2, 1.0, 5.0):
        population = Population(noise=noise, prompt_spread=2)
        drawn = draw(
            layout, np.zeros(2), "preference", population, np.random.default_rng(0)
        ).difference[0]
        treatment = np.where(layout.left == 0, drawn, -drawn)
        counts = np.zeros((30, 3))
        np.add.at(counts, (layout.prompt, (2 * treatment + 1).astype(int)), 1)
        alphas.append(float(krippendorff_alpha(counts)))
    assert alphas[0] > alphas[1] > alphas[2]


def test_a_pilots_spreads_are_found_again(study: Study) -> None:
    population = Population(effect=0.5, rater_spread=0.9, prompt_spread=1.4, ties=0.35)
    judgments = judgments_of(study, population, 90, 0)
    pilot = pilot_population(study.plan, judgments, Population())
    assert pilot.rater_spread == pytest.approx(0.9, abs=0.35)
    assert pilot.prompt_spread == pytest.approx(1.4, abs=0.5)
    assert pilot.ties == pytest.approx(0.35, abs=0.05)
    with pytest.raises(BacoError, match="the pilot has no pair of methods"):
        pilot_population(study.plan, judgments[:3], Population())


def test_strengths_follow_the_planned_contrasts(study: Study) -> None:
    plan = study.plan
    treatment, aligned, base = plan.methods
    by_question = {
        id: dict(zip(plan.methods, contrast_strengths(plan, plan.question[id], 1.0), strict=True))
        for id in ("diversity", "diversity_rating", "quality", "quality_rating", "overall")
    }
    for id in ("diversity", "diversity_rating"):
        strengths = by_question[id]
        assert strengths[treatment] - strengths[aligned] == pytest.approx(1)
    assert by_question["quality"][treatment] - by_question["quality"][base] == pytest.approx(1)
    equal = by_question["quality_rating"]
    assert equal[treatment] == pytest.approx(equal[aligned])
    assert not any(by_question["overall"].values())


def test_the_committed_plan_has_its_texts_and_its_planned_power() -> None:
    """The plan in docs is sized for a win rate of 65%; its texts are those that it names."""
    folder = Path(__file__).parents[1] / "docs/results/study-demo"
    plan = read_plan(folder / "plan.json")
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    assert {hash: text_hash(texts[hash]) for hash in texts_shown(plan)} == {
        hash: hash for hash in texts_shown(plan)
    }
    powers = planned_power(plan, Population(effect=0.65), studies=300, search=False)
    assert [p.contrast.test for p in powers] == ["superiority", "equivalence", "superiority"]
    assert all(p.sufficient(plan) for p in powers)
