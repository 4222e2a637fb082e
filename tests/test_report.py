"""The report of a run has the figures of the indicators, in every format."""

import csv
import html
import html.parser
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from baco.cli import run as baco
from baco.evaluation.indicators import Estimate, Measured, indicators
from baco.evaluation.records import Prompt
from baco.evaluation.report import Section, write_report
from baco.evaluation.report.content import order_of_routers, summarise
from baco.evaluation.report.load_scores import Cost, TaskScores, load_scores
from baco.evaluation.report.page import LONGEST, choose
from baco.evaluation.report.plots import coverage_rows, family, front_line
from baco.evaluation.report.ranking import rank
from baco.evaluation.report.results import points, reference, sections
from baco.evaluation.report.tables import Column, Table
from baco.evaluation.score import requested_metrics, score
from baco.evaluation.store import Run
from baco.evaluation.tasks import task_files
from baco.text.invalid_characters import well_formed
from tests.report_runs import EVIL, evil_run, made_run

METRICS = ("distinct_1", "self_rouge_l", "distinct_k", "reward")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_coverage_and_dominance_in_the_tables_are_the_frontiers(reported: Path) -> None:
    scores = next(f for f in load_scores(Run.open(reported)) if f.task == "demo")
    assert set(scores.measured.metrics) == set(METRICS)
    expected = indicators([scores.measured])
    rows = rows_of(reported / "report/tables/methods-demo.csv")
    assert {row["method"] for row in rows} == set(expected.methods)
    for row in rows:
        for part in ("lexical", "semantic", "overall"):
            for name, indicator in (("Coverage", "coverage"), ("Dominance", "dominance")):
                estimate = expected.estimate(indicator, row["method"], part)  # type: ignore[arg-type]
                assert estimate is not None
                head = f"{name}, {part}"
                shown = [float(row[h]) for h in (head, f"{head} low", f"{head} high")]
                assert shown == pytest.approx(
                    [estimate.value, estimate.low, estimate.high], abs=1e-5
                )
    order = [float(row["Coverage, overall"]) for row in rows]
    assert order == sorted(order, reverse=True)
    share = sum(float(row["Dominance, overall"]) for row in rows)
    assert share == pytest.approx(1, abs=1e-4)


def test_an_added_section_is_in_page_markdown_and_tables(reported: Path, tmp_path: Path) -> None:
    table = Table(
        "added", "A <table>", "Read it.", [Column("x"), Column("y", "percent")], [["a", 0.5]]
    )
    section = Section("extra", "Extra & more", "Extra", ["One <b>paragraph</b>."], [table])
    written = write_report(reported, tmp_path, resamples=20, added=[section])
    page = written.page.read_text(encoding="utf-8")
    assert '<a href="#extra">Extra</a>' in page
    assert "Extra &amp; more" in page
    assert "One &lt;b&gt;paragraph&lt;/b&gt;." in page
    assert "50.0%" in page
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## Extra & more" in markdown
    assert rows_of(tmp_path / "tables/added.csv") == [{"x": "a", "y": "0.5"}]


def test_every_sub_space_has_its_column_and_their_mean_is_summary_of_each_kind(
    reported: Path,
) -> None:
    methods = {r["method"]: r for r in rows_of(reported / "report/tables/methods-demo.csv")}
    for name in ("coverage", "dominance"):
        rows = rows_of(reported / f"report/tables/{name}-by-sub-space-demo.csv")
        assert [row["method"] for row in rows] == list(methods)
        for row in rows:
            figures = {head: float(row[f"{head} × reward"]) for head in METRICS[:3]}
            kinds = {"lexical": METRICS[:2], "semantic": METRICS[2:3]}
            for kind, own in kinds.items():
                mean = float(methods[row["method"]][f"{name.capitalize()}, {kind}"])
                assert np.mean([figures[metric] for metric in own]) == pytest.approx(mean, abs=1e-5)


def test_the_aligned_rival_is_all_its_settings_together(reported: Path) -> None:
    scores = next(f for f in load_scores(Run.open(reported)) if f.task == "demo").measured
    pooled = Measured(
        ["aligned" if m.startswith("aligned") else m for m in scores.methods],
        scores.settings, scores.values, scores.prompts, scores.metrics, scores.task,
    )  # fmt: skip
    row = next(
        row
        for row in rows_of(reported / "report/tables/headline-demo.csv")
        if row["method"] == "aligned, any sampling"
    )
    estimate = indicators([pooled]).coverage("aligned")
    assert estimate is not None
    assert float(row["Coverage, overall"]) == pytest.approx(estimate.value, abs=1e-5)
    assert (row["paper: Coverage"], row["paper: Dominance"]) == ("0.186", "0.39")


def test_each_of_the_papers_figures_stands_beside_the_same_figure_of_the_run(
    reported: Path,
) -> None:
    rows = {row["figure"]: row for row in rows_of(reported / "report/tables/paper-demo.csv")}
    router = rows["routers: Dominance, semantic"]
    own = {row["router"]: row for row in rows_of(reported / "report/tables/routers-demo.csv")}
    assert router["paper"] == str(
        reference("routers").of(router["method here"]).dominance["semantic"]
    )
    assert router["here"] == own[router["method here"]]["Dominance, semantic"]
    aligned = rows["headline, aligned: Coverage, lexical"]
    headline = rows_of(reported / "report/tables/headline-demo.csv")
    pooled = next(row for row in headline if row["method"] == "aligned, any sampling")
    assert (aligned["paper"], aligned["here"]) == ("0.269", pooled["Coverage, lexical"])
    assert not any(name.startswith("wildchat") for name in rows)  # the run has no such task


def test_the_papers_figures_agree_with_each_other() -> None:
    """Overall is the mean of both parts; the headline is the mean over the three tasks."""
    for table in ("headline", "routers"):
        for name, reported in reference(table).figures.items():
            for parts in (reported.coverage, reported.dominance):
                if parts:
                    mean = (parts["lexical"] + parts["semantic"]) / 2
                    assert parts["overall"] == pytest.approx(mean, abs=0.0011), name
    by_task = [reported.coverage["lexical"] for reported in reference("tasks").figures.values()]
    headline = reference("headline").of("BACo").coverage["lexical"]
    assert headline == pytest.approx(np.mean(by_task), abs=0.0005)
    assert set(reference("tasks").figures) <= set(task_files())


def test_points_are_means_over_prompts_of_the_runs_own_scores(reported: Path) -> None:
    scores: dict[tuple[str, str], list[float]] = {}
    for row in Run.open(reported).scores("self_rouge_l"):
        if row["task"] == "demo":
            scores.setdefault((row["method"], row["setting"]), []).append(row["value"])
    rows = rows_of(reported / "report/tables/points-demo-demo.csv")
    assert len(rows) == len(scores)
    for row in rows:
        mean = np.mean(scores[row["method"], row["setting"]])
        assert float(row["self_rouge_l"]) == pytest.approx(mean, abs=1e-5)
    alone = {row["setting"]: row["base share"] for row in rows}
    assert float(alone["Base T=0.4"]) == 1
    assert float(alone["Aligned T=0.7"]) == 0


def test_a_setting_whose_answers_are_all_empty_has_no_figure() -> None:
    """Perplexity has nothing to measure there."""
    figures = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    scores = TaskScores(
        "pair",
        "task",
        Measured(["base"] * 2, ["a", "b"], [None] * 2, list("123"), {"perplexity": figures}),
        {("base", label): Cost(answers=3) for label in "ab"},
        [Prompt(number, ({"role": "user", "content": "?"},)) for number in "123"],
    )
    ranking: Any = SimpleNamespace(pair="pair", families={"base": "base"})
    table = points(ranking, scores)
    assert [row[2] for row in table.rows] == [2.0, None]


def test_accuracy_is_summary_of_verified_tasks_and_kept_out_of_coverage(reported: Path) -> None:
    rows = rows_of(reported / "report/tables/accuracy-demo-demo-facts.csv")
    scores: dict[str, list[float]] = {}
    for row in Run.open(reported).scores("accuracy"):
        scores.setdefault(row["setting"], []).append(row["value"])
    for row in rows:
        setting = row["most accurate setting"]
        assert float(row["most, accuracy"]) == pytest.approx(np.mean(scores[setting]), abs=1e-5)
        assert float(row["least, accuracy"]) <= float(row["most, accuracy"])
    assert not (reported / "report/tables/tasks-demo.csv").exists()


class _Tables(html.parser.HTMLParser):
    """Cells of every table of a page, by the table's id."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._table = self.tables[dict(attrs)["id"] or ""] = []
        elif self._table is not None and tag == "tr":
            self._table.append([])
        elif self._table is not None and tag in ("td", "th"):
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        elif tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._table is not None and self._in_cell:
            self._table[-1][-1] += data


def _of_markdown(text: str) -> Iterator[list[list[str]]]:
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        lines = [line.strip("|").split(" | ") for line in block.splitlines()]
        cells = [[cell.strip().strip("*") for cell in line] for line in lines]
        yield [cells[0], *cells[2:]]


def test_page_markdown_and_csv_say_the_same(reported: Path) -> None:
    folder = reported / "report"
    parser = _Tables()
    parser.feed((folder / "index.html").read_text("utf-8"))
    tables = parser.tables
    assert {path.stem for path in (folder / "tables").iterdir()} == set(tables)
    assert list(_of_markdown((folder / "report.md").read_text("utf-8"))) == list(tables.values())
    for name, (heads, *rows) in tables.items():
        for shown, full in zip(rows, rows_of(folder / "tables" / f"{name}.csv"), strict=True):
            for head, cell in zip(heads, shown, strict=True):
                figures = [full[h] for h in (head, f"{head} low", f"{head} high") if full.get(h)]
                assert _agree(cell, figures), (name, head, cell, figures)


def _agree(cell: str, figures: list[str]) -> bool:
    shown = re.findall(r"[+−]?\d+(?:\.\d+)?", cell)
    if cell == "–":
        return not figures
    if [cell] == figures or cell == "< 0.001":
        return True
    scale = 100 if "%" in cell else 1
    places = len(shown[0].partition(".")[2])
    return [float(s.replace("−", "-")) for s in shown] == pytest.approx(
        [scale * float(figure) for figure in figures], abs=0.501 * 10**-places
    )


def test_the_page_loads_nothing_and_its_policy_forbids_it(reported: Path) -> None:
    text = (reported / "report/index.html").read_text("utf-8")
    sources: list[tuple[str, str, str]] = []

    class References(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                if name in ("src", "href", "srcset", "action", "data", "poster"):
                    sources.append((tag, name, value or ""))

    References().feed(text)
    assert [f for f in sources if not f[2].startswith(("#", "data:"))] == []
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text


def test_plots_are_there_as_svg_and_png(reported: Path) -> None:
    plots = reported / "report/plots"
    stems = {path.stem for path in plots.iterdir()}
    assert stems == {
        "coverage-demo", "plane-demo-demo", "planes-demo-demo", "plane-demo-demo-facts",
        "planes-demo-demo-facts",
    }  # fmt: skip
    for stem in stems:
        assert (plots / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        drawing = (plots / f"{stem}.svg").read_text("utf-8")
        assert drawing.startswith("<svg")
        assert "NaN" not in drawing
    for name in ("reward", "distinct_k", "self_rouge_l", "P-Punc", "base, min-p"):
        assert name in (plots / "plane-demo-demo.svg").read_text("utf-8")


def test_the_fronts_edge_is_a_stair_from_axis_to_axis() -> None:
    rows = [
        {"x": 0.5, "y": 0.5, "front": True},
        {"x": 0.2, "y": 1.0, "front": True},
        {"x": 0.1, "y": 0.1, "front": False},
    ]
    assert [(r["x"], r["y"]) for r in front_line(rows)] == [(0, 1), (0.2, 1), (0.5, 0.5), (0.5, 0)]
    assert front_line([]) == []


def invented(**coverage: tuple[float, float]) -> TaskScores:
    """Methods with one setting each, at (quality, diversity); two corners span the plane."""
    named = {name.replace("_", ", "): point for name, point in coverage.items()}
    rng = np.random.default_rng(0)
    rows = {**named, "corner 1": (0.0, 1.0), "corner 2": (1.0, 0.0)}
    noise = rng.normal(0, 0.02, (len(rows), 12))
    quality = np.array([[q] * 12 for q, _ in rows.values()]) + noise
    diversity = np.array([[d] * 12 for _, d in rows.values()]) + noise[::-1]
    measured = Measured(
        list(rows), list(rows), [None] * len(rows), [str(i) for i in range(12)],
        {"reward": quality, "distinct_1": diversity, "distinct_k": diversity}, "made up",
    )  # fmt: skip
    prompts = [Prompt(str(i), ({"role": "user", "content": str(i)},)) for i in range(12)]
    costs = {(name, name): Cost(answers=1) for name in rows}
    return TaskScores("pair", "made up", measured, costs, prompts)


def summary_of(**coverage: tuple[float, float]) -> tuple[str, str]:
    scores = invented(**coverage)
    kinds = {"base, temperature": "base", "aligned, temperature": "aligned"}
    families = {
        method: family(method, kinds.get(method, "mixing" if "corner" in method else "routers"))
        for method in scores.measured.methods
    }
    ranking = rank("pair", [scores], families, resamples=400)
    summary = summarise(ranking)
    return summary.first, " ".join([*summary.lines, *summary.notes, *order_of_routers(ranking)])


LOW, MIDDLE, HIGH = (0.3, 0.3), (0.6, 0.6), (0.8, 0.8)


def test_the_summary_is_yes_only_if_every_rival_is_beaten() -> None:
    won = summary_of(
        base_temperature=LOW, aligned_temperature=LOW, Nudging=LOW, P=MIDDLE, Rand=HIGH
    )
    assert won[0].startswith("Yes. Rand, the best router")
    assert "better" in won[1]
    part = summary_of(base_temperature=LOW, aligned_temperature=HIGH, Nudging=LOW, P=MIDDLE)
    assert part[0].startswith("In part. P")
    assert re.search(r"but not “aligned, temperature”", part[0])
    lost = summary_of(base_temperature=HIGH, aligned_temperature=HIGH, Nudging=HIGH, P=MIDDLE)
    assert lost[0].startswith("No. P")
    for rival in ("base, any sampling", "aligned, temperature", "aligned, any sampling", "Nudging"):
        assert re.search(rf"against {rival} \([^;]*?, worse", lost[1]), rival
    same = summary_of(base_temperature=MIDDLE, aligned_temperature=LOW, Nudging=LOW, P=MIDDLE)
    assert "no difference is shown" in same[1]


def test_single_models_that_are_run_as_routers_are_rivals() -> None:
    won, _ = summary_of(Base=LOW, Aligned=LOW, P=HIGH)
    assert won.startswith("Yes. P, the best router, ")
    assert "beats “base, any sampling” and “aligned, any sampling”" in won
    lost, rest = summary_of(Base=LOW, Aligned=HIGH, P=MIDDLE)
    assert lost.startswith("In part. P, the best router, ")
    assert "Ahead of every router: Aligned." in rest


def of_curves(**settings: int) -> TaskScores:
    """Methods with many settings anywhere on one curve; two corners span the plane."""
    rng = np.random.default_rng(0)
    owners = [name for name, count in settings.items() for _ in range(count)]
    places = rng.random(len(owners))
    owners += ["corner 1", "corner 2"]
    points = np.array([*zip(np.sqrt(1 - places), np.sqrt(places), strict=True), (0, 1), (1, 0)])
    noise = rng.normal(0, 0.01, (2, len(owners), 24))
    quality, diversity = points.T[:, :, None] + noise
    labels = [f"{name} {place}" for place, name in enumerate(owners)]
    measured = Measured(
        owners, labels, [None] * len(owners), [str(i) for i in range(24)],
        {"reward": quality, "distinct_1": diversity, "distinct_k": diversity,
         "effective_distinct_k": quality * diversity}, "made up",
    )  # fmt: skip
    prompts = [Prompt(str(i), ({"role": "user", "content": str(i)},)) for i in range(24)]
    costs = {(name, label): Cost(answers=1) for name, label in zip(owners, labels, strict=True)}
    return TaskScores("pair", "made up", measured, costs, prompts)


def test_a_lead_that_more_settings_alone_give_is_not_a_yes() -> None:
    scores = of_curves(P=30, base=5, Nudging=5)
    families = {m: family(m, {"P": "routers", "base": "base"}.get(m, "mixing")) for m in
                scores.measured.methods}  # fmt: skip
    ranking = rank("pair", [scores], families, resamples=200)
    summary = summarise(ranking)
    assert summary.first.startswith("In part. P, the best router")
    assert "beats “base, any sampling” and Nudging." in summary.first
    assert re.search(r"At 5 settings of each method its Coverage is 0\.\d+ \[", summary.first)
    full, at_k = (ranking.compare("Nudging", "overall", indicator=name) for name in
                  ("coverage", "coverage_at_k"))  # fmt: skip
    assert full is not None
    assert at_k is not None
    assert full.difference > 3 * abs(at_k.difference)
    tables = {table.name: table for table in sections([ranking]).all}
    for row in tables["claims-pair"].shown()[:2]:
        assert row[1].startswith("better, +")  # Coverage, overall
    heads = [column.name for column in tables["methods-pair"].columns]
    at = heads.index("Coverage at 5 settings, overall")
    shown = {row[0]: row[at] for row in tables["methods-pair"].shown()}
    assert shown["corner 1"] == "–"
    assert re.match(r"0\.\d+ \[", shown["P"])
    assert tables["acceptable-pair"].columns[1].name == "effective_distinct_k, best of 5"
    kinds = [row["kind"] for row in coverage_rows(ranking)]
    assert list(dict.fromkeys(kinds)) == [
        "overall", "overall, at 5 settings", "semantic", "lexical",
    ]  # fmt: skip


def test_the_summary_names_the_leading_method_and_the_papers_order() -> None:
    _, rest = summary_of(base_temperature=LOW, Nudging=HIGH, P=MIDDLE, Rand=LOW, Gap=LOW)
    assert "Ahead of every router: Nudging." in rest
    assert "in order of Coverage (overall): P " in rest
    assert "The paper's order of these on NoveltyBench is Rand, P: 0 of the 1 pairs" in rest


def test_if_rand_is_the_best_router_the_best_other_one_is_named_too() -> None:
    _, rest = summary_of(base_temperature=LOW, Nudging=HIGH, P=MIDDLE, Rand=HIGH, Gap=LOW)
    assert "Rand tosses a coin: it looks at neither model. The best that looks is P, 0." in rest
    beside = rest.partition("The best that looks is P")[2]
    assert re.match(r", 0\.\d+: against base, any sampling \+0\.[^;]*, better;", beside)
    assert re.search(r"against Nudging −0\.[^;.]*\.[^;]*, worse", beside)
    assert "coin" not in summary_of(base_temperature=LOW, P=HIGH, Rand=LOW)[1]


def test_the_report_shows_the_command_that_was_typed(reported: Path) -> None:
    typed = Run.open(reported).config["made"]["command"]
    assert typed.startswith("baco sweep -o ") and "-r P-Punc -r Rand -r Rand:0.5" in typed
    folder = reported / "report"
    assert f"```sh\n{typed}\nbaco report {reported}\n```" in (folder / "report.md").read_text(
        "utf-8"
    )
    assert typed in html.unescape((folder / "index.html").read_text("utf-8"))


def test_a_lead_is_also_given_on_prompts_the_router_was_not_chosen_on() -> None:
    scores = invented(base_temperature=LOW, P=HIGH)
    families = {m: family(m, "base" if "base" in m else "routers") for m in scores.measured.methods}
    ranking = rank("pair", [scores], families, resamples=200)
    leads = ranking.on_unseen_prompts("base, any sampling")
    assert len(leads) == 2
    assert all(0.3 < lead < 0.8 for lead in leads)


def test_few_prompts_give_a_warning_and_no_small_p_value(
    reported: Path, capsys: pytest.CaptureFixture
) -> None:
    warning = "Only 4 prompts: intervals are rough, and no p-value can be below 0.125. Use 20"
    assert warning in (reported / "report/report.md").read_text("utf-8")
    assert warning in html.unescape((reported / "report/index.html").read_text("utf-8"))
    for row in rows_of(reported / "report/tables/against-demo.csv"):
        figures = [float(p) for head, p in row.items() if head.endswith(", p") and p]
        assert figures
        assert min(figures) >= 0.125
    assert baco(["report", str(reported), "-o", str(reported / "again")]) == 0
    assert warning in " ".join(capsys.readouterr().err.split())
    enough = of_curves(P=5, base=5)  # 24 prompts
    families = {m: family(m, {"P": "routers"}.get(m, "mixing")) for m in enough.measured.methods}
    assert summarise(rank("pair", [enough], families, resamples=20)).warning is None


def test_a_claim_needs_the_test_on_other_prompts_too() -> None:
    """P leads on even prompts alone and Rand on odd ones; chosen on the others, each loses."""
    scores = invented(base_temperature=LOW, P=HIGH, Rand=HIGH)
    for method, start in (("P", 1), ("Rand", 0)):
        place = scores.keys.index((method, method))
        for rows in scores.measured.metrics.values():
            rows[place, start::2] = 0.25
    families = {m: family(m, "base" if "base" in m else "routers") for m in scores.measured.methods}
    families |= {"corner 1": "mixing", "corner 2": "mixing"}
    ranking = rank("pair", [scores], families, resamples=200)
    lead = ranking.compare("base, any sampling", "overall")
    assert lead is not None
    assert lead.low > 0
    tested = ranking.tested_on_unseen_prompts("base, any sampling")
    assert tested is not None
    assert tested.difference == pytest.approx(
        np.mean(ranking.on_unseen_prompts("base, any sampling"))
    )
    assert tested.low < 0
    assert summarise(ranking).first.startswith("No.")


def test_a_router_chosen_on_one_half_of_the_prompts_is_measured_on_the_other() -> None:
    """P is good on even prompts only and Rand fair on odd ones; each is measured on the others."""
    scores = invented(base_temperature=MIDDLE, P=HIGH, Rand=HIGH)
    for method, start, worth in (("P", 1, 0.1), ("Rand", 0, 0.2)):
        place = scores.keys.index((method, method))
        for rows in scores.measured.metrics.values():
            rows[place, start::2] = worth
    families = {m: family(m, "base" if "base" in m else "routers") for m in scores.measured.methods}
    families |= {"corner 1": "mixing", "corner 2": "mixing"}
    ranking = rank("pair", [scores], families, resamples=200)
    by_parity = [indicators([scores.at(range(start, 12, 2))], resamples=1) for start in (0, 1)]
    expected = [
        by_parity[measured_on].compare(router, "base, temperature")
        for router, measured_on in (("P", 1), ("Rand", 0))
    ]
    assert all(lead is not None and lead.difference < -0.2 for lead in expected)
    leads = ranking.on_unseen_prompts("base, any sampling")
    assert leads == [pytest.approx(lead.difference) for lead in expected if lead is not None]
    assert leads[0] < leads[1]


def test_a_setting_with_missing_scores_is_left_out_and_named(
    reported: Path, tmp_path: Path
) -> None:
    import shutil

    part = tmp_path / "run"
    shutil.copytree(reported, part, ignore=shutil.ignore_patterns("report"))
    scores = part / "scores/distinct_1.jsonl"
    kept = [
        line
        for line in scores.read_text("utf-8").splitlines(keepends=True)
        if not (json.loads(line)["setting"] == "Rand:0.5" and json.loads(line)["task"] == "demo")
    ]
    scores.write_text("".join(kept), encoding="utf-8")
    write_report(part, resamples=20)
    text = (part / "report/report.md").read_text("utf-8")
    assert "- demo, demo: not complete yet, left out whole: Rand:0.5" in text
    points = rows_of(part / "report/tables/points-demo-demo.csv")
    assert "Rand:0.5" not in {row["setting"] for row in points}


@pytest.mark.parametrize(
    ("wreck", "message"),
    [
        (lambda run: (run / "run.json").unlink(), "holds no run: give the directory"),
        (lambda run: (run / "samples.jsonl").unlink(), "holds no samples yet: run 'baco sweep'"),
        (
            lambda run: [path.unlink() for path in (run / "scores").iterdir()],
            "holds no scores yet: run 'baco score",
        ),
    ],
)
def test_a_run_with_nothing_to_report_is_refused_in_one_line(
    reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture, wreck: Any, message: str
) -> None:
    import shutil

    part = tmp_path / "run"
    shutil.copytree(reported, part, ignore=shutil.ignore_patterns("report"))
    wreck(part)
    assert baco(["report", str(part)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (part / "report").exists()


def test_a_report_of_one_method_and_one_prompt_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(EVIL + "\n", encoding="utf-8")
    run = tmp_path / "run"
    options = ["-t", str(prompts), "-n", "2", "-m", "mixing", "--metric", "distinct_1"]
    assert baco(["sweep", "-o", str(run), "--workers", "1", *options]) == 0
    assert baco(["report", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["verdicts"][0]["answer"].startswith("No router was run")
    page = (run / "report/index.html").read_text("utf-8")
    assert EVIL not in page
    assert "no diversity metric together with a quality metric has scores" in page


def test_without_any_coverage_no_router_is_called_the_best(tmp_path: Path) -> None:
    prompts, run = tmp_path / "own.txt", tmp_path / "run"
    prompts.write_text("Name a colour.\n", encoding="utf-8")
    options = ["-t", "demo", "-t", str(prompts), "--limit", "1", "-n", "2"]
    options += ["-r", "P:0.4", "-r", "Rand:0.5", "-m", "mixing", "--preset", "quick"]
    assert baco(["sweep", "-o", str(run), "--workers", "1", "--no-score", *options]) == 0
    # The demo world judges its own questions, and nothing judges the others.
    missing = {"own": {"reward": str(tmp_path / "no-model")}}
    (lexical, quality) = requested_metrics(Run.open(run), ["distinct_1", "reward"], {})
    asked = [lexical, replace(quality, models={**quality.models, **missing})]
    refused = score(Run.open(run), asked, workers=1)
    assert refused["reward"].startswith("reward is not scored on own: ")
    report = write_report(run, resamples=20)
    assert report.summaries[0].first.startswith("There is no Coverage")
    page, text = report.page.read_text("utf-8"), (run / "report/report.md").read_text("utf-8")
    for shown in (page, text):
        assert "\N{MINUS SIGN}1.000" not in shown
        assert "Which router?" not in shown
        assert "best first" not in shown
        assert "against its rivals" not in shown
    assert "reward: not scored on own: reward is unavailable" in text


def test_two_pairs_have_a_table_each_and_one_across(tmp_path: Path) -> None:
    import shutil
    from importlib import resources

    other = tmp_path / "other"
    shutil.copytree(str(resources.files("baco.demo") / "weights"), other)
    run = tmp_path / "run"
    options = [
        "-p",
        "demo",
        "-p",
        str(other),
        "--limit",
        "2",
        "-n",
        "2",
        "-r",
        "P:0.5",
        "-r",
        "Rand:0.5",
    ]
    options += ["-r", "Nudging:0.5", "--metric", "distinct_1", "--metric", "distinct_k"]
    options += ["--metric", "reward", "--workers", "1"]
    assert baco(["sweep", "-o", str(run), *options]) == 0
    report = write_report(run, resamples=20)
    assert len(report.summaries) == 2
    tables = {path.stem for path in (run / "report/tables").iterdir()}
    headlines = [name for name in tables if name.startswith("headline-")]
    assert len(headlines) == 2
    rows = rows_of(run / "report/tables/across-pairs.csv")
    assert {row["method"] for row in rows} == {"P", "Rand", "Nudging"}
    for row in rows:
        assert float(row["demo"]) == pytest.approx(float(row[str(other)]))
        assert float(row["mean over pairs"]) == pytest.approx(float(row["demo"]), abs=1e-5)


def test_a_table_escapes_characters_that_would_break_its_rows() -> None:
    columns = [Column("a|b"), Column("figure", "figure")]
    table = Table("t", "T", "C", columns, [["x|y\nz", Estimate(-0.5, -1.0, 0.25)], ["", None]])
    assert "| x\\|y z | −0.500 [−1.000, 0.250] |" in table.markdown()
    assert table.csv().splitlines()[0] == "a|b,figure,figure low,figure high"
    assert table.csv().endswith(",,,\n") or table.csv().endswith('"",,,\n')


def test_shown_prompts_take_turns_by_category_and_fit_the_page() -> None:
    prompts = [
        Prompt(str(i), ({"role": "user", "content": "?"},), "rare" if i == 29 else "common")
        for i in range(30)
    ]
    assert len(choose(prompts, 10, 50.0)) == 24
    assert "29" in {prompt.id for prompt in choose(prompts, 10, 50.0)}
    shown = choose(prompts, 150, 10.0 * LONGEST)
    assert 1 <= len(shown) < 5
    assert "29" in {prompt.id for prompt in shown}


def test_a_page_and_its_plots_are_well_formed_for_any_prompt(tmp_path: Path) -> None:
    report = evil_run(tmp_path) / "report"
    page = (report / "index.html").read_text(encoding="utf-8")
    assert well_formed(page) == page
    assert "window.evil=1> | `a` *b* \ufffd[2J\ufffd\ufffd" in page
    drawings = list((report / "plots").glob("*.svg"))
    assert drawings
    for drawing in drawings:
        ElementTree.parse(drawing)
