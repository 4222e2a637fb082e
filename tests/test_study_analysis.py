"""The analysis of a study, its report and its section in the report of a run."""

import csv
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from baco.errors import BacoError
from baco.evaluation.store import Run
from baco.study.analysis import StudyResults, analyse
from baco.study.comparisons import comparisons
from baco.study.findings import MIXED, SIMULATED, Findings, findings
from baco.study.plan import Plan
from baco.study.schedule import training
from baco.study.simulation import Population, simulate
from baco.study.store import Judgment
from baco.study.study import Study
from baco.study.study_report import as_json, study_findings, study_section, write_study_report
from baco.study.validity import Validity, validity
from tests.pages import new_page
from tests.studies import METHODS, answer, fill, made_study, write_run

NO_METRICS = Validity((), {}, {})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A simulated study with a strong effect and some lazy raters."""
    simulated_study = made_study(
        tmp_path_factory.mktemp("study"), run={"prompts": 22}, prompts=18, raters=12
    )
    simulate(simulated_study, 14, Population(effect=0.75, lazy=0.25, prompt_spread=0.8), seed=4)
    yield simulated_study
    simulated_study.close()


@pytest.fixture(scope="module")
def judgments(study: Study) -> list[Judgment]:
    return list(study.judgments())


@pytest.fixture(scope="module")
def results(study: Study, judgments: Sequence[Judgment]) -> StudyResults:
    return analyse(study.plan, judgments)


def found(results: StudyResults, study: Study, *origins: str) -> Findings:
    return findings(results, NO_METRICS, study.store.versions(), origins or ("simulated",))


def test_a_contrast_counts_wins_of_the_treatment_on_either_side(
    study: Study, judgments: Sequence[Judgment], results: StudyResults
) -> None:
    contrast = results.without_exclusions[0]
    treatment, control = contrast.contrast.treatment, contrast.contrast.control
    wins = ties = losses = 0
    for j in judgments:
        if j.kind != "comparison" or j.question != contrast.contrast.question:
            continue
        if {j.left_method, j.right_method} != {treatment, control}:
            continue
        preferred = {"left": j.left_method, "right": j.right_method, "tie": ""}[j.side or "tie"]
        wins += preferred == treatment
        ties += preferred == ""
        losses += preferred == control
    assert (contrast.wins, contrast.ties, contrast.losses) == (wins, ties, losses)
    assert contrast.judgments == wins + ties + losses
    assert contrast.estimate is not None
    assert contrast.estimate.value == pytest.approx((wins + ties / 2) / contrast.judgments)


def test_the_planned_effect_is_found_and_reported_in_a_sentence(
    study: Study, results: StudyResults
) -> None:
    first = results.contrasts[0]
    assert first.contrast.primary
    assert first.estimate is not None
    assert 0.5 < first.estimate.low < first.estimate.value < first.estimate.high <= 1
    assert first.verdict(0.05) == "supported"
    line = found(results, study).outcomes[0]
    assert line.startswith(f"Supported: {first.contrast.hypothesis}")
    assert re.search(
        r"wins \d\d\.\d% \[\d\d\.\d%, \d\d\.\d%\], Holm's p (= 0\.0\d\d|< 0\.001)", line
    )


def test_swapped_sides_change_nothing_but_the_bias(
    study: Study, judgments: Sequence[Judgment], results: StudyResults
) -> None:
    flip = {"left": "right", "right": "left", "tie": "tie"}
    swapped = [
        dataclasses.replace(
            j,
            left_method=j.right_method,
            right_method=j.left_method,
            side=None if j.side is None else flip[j.side],  # type: ignore[arg-type]
            left_rating=j.right_rating,
            right_rating=j.left_rating,
            expected=None if j.expected is None else flip[j.expected],  # type: ignore[arg-type]
        )
        for j in judgments
    ]
    other = analyse(study.plan, swapped)
    for ours, theirs in zip(results.contrasts, other.contrasts, strict=True):
        assert ours.estimate == theirs.estimate
        assert ours.adjusted == theirs.adjusted
        assert ours.treatment_left == pytest.approx(1 - theirs.treatment_left)
    for (_, strengths), (_, swapped_strengths) in zip(
        results.strengths, other.strengths, strict=True
    ):
        assert strengths is not None and swapped_strengths is not None
        assert [e.value for e in strengths.methods] == pytest.approx(
            [e.value for e in swapped_strengths.methods]
        )
    for opinion, swapped_opinion in zip(results.opinions, other.opinions, strict=True):
        assert opinion.mean is not None and swapped_opinion.mean is not None
        assert dataclasses.astuple(opinion.mean) == pytest.approx(
            dataclasses.astuple(swapped_opinion.mean)
        )
    assert results.agreements == other.agreements
    for side, swapped_side in zip(results.sides, other.sides, strict=True):
        assert side.left is not None and swapped_side.left is not None
        assert side.left.value == pytest.approx(1 - swapped_side.left.value)


def test_opinions_are_means_over_both_sides(
    study: Study, judgments: Sequence[Judgment], results: StudyResults
) -> None:
    excluded = {e.rater for e in results.exclusions if e.item is None}
    for opinion in results.opinions:
        ratings = [
            rating
            for j in judgments
            if j.kind == "comparison"
            and j.question == opinion.question.id
            and j.rater not in excluded
            for method, rating in (
                (j.left_method, j.left_rating),
                (j.right_method, j.right_rating),
            )
            if method == opinion.method
        ]
        assert opinion.ratings == len(ratings)
        assert opinion.mean is not None
        assert opinion.mean.value == pytest.approx(np.mean([r for r in ratings if r is not None]))


def test_everything_is_exploratory_but_the_planned_contrasts(results: StudyResults) -> None:
    assert len(results.contrasts) == 3
    assert len(results.comparisons) == 6 * 3
    assert all(c.adjusted is None for c in results.comparisons)
    assert not any(c.supported(1.0) for c in results.comparisons)


def test_holm_is_over_all_planned_contrasts(results: StudyResults) -> None:
    p = sorted(c.p_value for c in results.contrasts if c.p_value is not None)
    adjusted = sorted(c.adjusted for c in results.contrasts if c.adjusted is not None)
    expected = np.maximum.accumulate([3 * p[0], 2 * p[1], p[2]])
    assert adjusted == pytest.approx(np.minimum(expected, 1))


def test_exclusions_are_applied_and_both_results_are_reported(
    study: Study, results: StudyResults
) -> None:
    excluded = {r.conduct.rater for r in results.raters if r.excluded}
    assert 1 <= len(excluded) <= 7
    assert excluded == {e.rater for e in results.exclusions if e.item is None}
    assert results.kept < results.judgments
    main, whole = results.contrasts[0], results.without_exclusions[0]
    assert main.judgments < whole.judgments
    tables = {table.name: table for table in found(results, study).tables}
    assert len(tables["exclusions"].rows) == len(results.exclusions)
    assert all(row[-1] for row in tables["exclusions"].rows)
    assert tables["robustness"].rows[0][7:9] == [whole.judgments, whole.estimate]


def test_raters_who_do_not_read_agree_less_with_others(results: StudyResults) -> None:
    by_exclusion: dict[bool, list[float]] = {True: [], False: []}
    for rater in results.raters:
        assert rater.agreement is not None
        by_exclusion[bool(rater.excluded)].append(rater.agreement)
    assert np.mean(by_exclusion[True]) < np.mean(by_exclusion[False])


def test_unanimous_ties_are_analysed(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    fill(study, 4)
    results = analyse(study.plan, list(study.judgments()))
    first = results.contrasts[0]
    assert first.ties == first.judgments > 0
    assert first.estimate is not None and first.estimate.value == 0.5
    assert first.verdict(0.05) == "not shown"
    assert all(strengths is None for _, strengths in results.strengths)
    assert all(side.left is None for side in results.sides)
    assert results.agreements[0][1] is not None
    assert results.agreements[0][1].alpha is None  # all ratings are equal
    text = found(results, study).tables
    assert all(table.markdown() and table.csv() for table in text)
    study.close()


def test_one_rater_gives_no_interval_but_a_report(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    fill(study, 1)
    results = analyse(study.plan, list(study.judgments()))
    assert results.contrasts[0].estimate is None
    report = found(results, study, "human")
    assert report.outcomes[0].startswith("Too few raters or prompts: ")
    assert report.warning == ""
    study.close()


def test_a_study_without_judgments_is_refused(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    with pytest.raises(BacoError, match="has no judgments yet"):
        study_findings(study)
    study.close()


def test_every_output_says_that_raters_are_simulated(study: Study, tmp_path: Path) -> None:
    written = write_study_report(study, tmp_path, metrics=False)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"index.html", "report.md", "results.json", "contrasts.csv"} <= names
    assert {"contrasts-preference.svg", "contrasts-rating.png"} <= names
    for path in tmp_path.rglob("*"):
        if path.suffix in {".html", ".md", ".json", ".csv", ".svg"}:
            assert "simulated" in path.read_text(encoding="utf-8").lower(), path
    page = written.page.read_text(encoding="utf-8")
    assert SIMULATED in page
    assert "Content-Security-Policy" in page
    assert "<script" not in page
    assert study.plan.hash in page
    for path in (tmp_path / "tables").glob("*.csv"):
        header, *rows = csv.reader(path.open(encoding="utf-8"))
        assert header[-1] == "made from"
        assert rows and {row[-1] for row in rows} == {"simulated raters"}
    shown = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert shown["raters"] == "simulated"
    assert [c["id"] for c in shown["contrasts"]] == [c.id for c in study.plan.contrasts]
    assert shown["contrasts"][0]["outcome"] == "supported"


def test_people_and_simulated_raters_together_are_told_apart(
    study: Study, results: StudyResults
) -> None:
    assert found(results, study, "human", "human").warning == ""
    mixed = found(results, study, "human", "simulated")
    assert mixed.warning == MIXED
    assert as_json(results, mixed)["raters"] == "human and simulated"


def test_texts_of_the_plan_are_escaped(study: Study, tmp_path: Path) -> None:
    plan = dataclasses.replace(study.plan, notes="<img src=x onerror=alert(1)>")
    study.store.adopt(plan, "notes with <markup>")
    written = write_study_report(dataclasses.replace(study, plan=plan), tmp_path, metrics=False)
    page = written.page.read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "notes with &lt;markup&gt;" in page
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "change after the first answer: yes" in markdown


def test_metrics_are_computed_on_the_answers_that_raters_saw(study: Study) -> None:
    measured = validity(study, list(study.judgments()), resamples=50)
    lexical = [c for c in measured.correlations if c.metric == "self_bleu"]
    assert [c.question.id for c in lexical] == ["diversity_rating", "diversity"]
    assert all(c.items == 18 * 3 for c in lexical)
    # The demo texts of Aligned have two ideas, the others as many as answers.
    means = measured.means["self_bleu"]
    assert means["Aligned T=1"] < means["Base T=1"]
    assert "distinct_k" in measured.unavailable
    assert measured.unavailable["distinct_k"].startswith("distinct_k needs a model for")


def test_a_metric_that_raters_follow_correlates_with_them(study: Study) -> None:
    """Raters who prefer the set with the higher metric agree with it perfectly."""
    plan = study.plan
    scores = validity(study, [], resamples=1).means["self_bleu"]
    order = sorted(plan.methods, key=lambda method: scores[method])
    followed = [
        dataclasses.replace(
            j, side="left" if order.index(j.left_method) > order.index(j.right_method) else "right"
        )
        for j in study.judgments()
        if j.kind == "comparison" and j.question == "diversity"
    ]
    (correlation,) = [
        c for c in validity(study, followed, resamples=50).correlations if c.metric == "self_bleu"
    ]
    assert correlation.same == 1
    assert correlation.rank is not None and correlation.rank.value > 0.8


def test_a_report_says_why_metrics_are_missing(study: Study, results: StudyResults) -> None:
    why = "reward needs a model for 'reward': give --model"
    shown = findings(results, Validity((), {}, {"reward": why}), study.store.versions(), ["human"])
    (part,) = [part for part in shown.parts if part.name == "metrics-part"]
    assert part.text == [f"{why}."]


def test_another_run_is_refused(study: Study, tmp_path: Path) -> None:
    run = write_run(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "run.json").read_text(encoding="utf-8"))
    config["tasks"][0]["name"] = "books"
    (tmp_path / "other" / "run.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BacoError, match="has no task 'trips'"):
        validity(study, [], Run.open(run.path))


def test_the_section_for_a_runs_report_has_the_planned_contrasts(
    study: Study, tmp_path: Path
) -> None:
    section = study_section(study, write_run(tmp_path / "run"))
    assert section.title == "What raters say (simulated)"
    assert section.paragraphs[0] == SIMULATED
    (table,) = section.tables
    assert table.name == "study-contrasts"
    assert len(table.rows) == 3
    with pytest.raises(BacoError, match="has no method 'P-Punc"):
        study_section(study, write_run(tmp_path / "other", methods=METHODS[1:]))


def test_imported_raters_without_checks_or_times_are_kept(
    study: Study, judgments: Sequence[Judgment]
) -> None:
    imported = [
        dataclasses.replace(j, origin="imported", seconds=0.0)
        for j in judgments
        if j.kind == "comparison" and j.rater == judgments[0].rater
    ][:5]
    results = analyse(study.plan, imported)
    assert results.exclusions == []


def test_comparisons_without_judgments_are_empty(study: Study) -> None:
    plan: Plan = study.plan
    table = comparisons(plan, plan.questions[0], [])
    assert len(table) == 0
    rows, values = table.between(METHODS[0], METHODS[1])
    assert len(rows) == len(values) == 0
    assert all(c.estimate is None for c in analyse(plan, []).contrasts)


def test_answers_to_checks_and_training_are_in_no_figure(tmp_path: Path) -> None:
    study = made_study(tmp_path)
    fill(study, 3)
    before = analyse(study.plan, list(study.judgments()))
    for rater in study.store.raters():
        study.store.save([answer(study, rater, screen) for screen in training(study.plan)])
    after = analyse(study.plan, list(study.judgments()))
    assert after.judgments == before.judgments
    assert after.contrasts == before.contrasts
    compared = [i for i in study.plan.items if i.kind == "comparison"]
    assert len(compared) < len(study.plan.items)
    study.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violations_in_the_report(
    browser: Browser, study: Study, tmp_path: Path, theme: Literal["light", "dark"]
) -> None:
    written = write_study_report(study, tmp_path, metrics=False)
    page = new_page(browser, color_scheme=theme, viewport={"width": 900, "height": 900})
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto(written.page.as_uri())
    violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in violations] == []
    assert messages == []
    assert page.evaluate("document.documentElement.scrollWidth") == 900
    page.context.close()
