"""Writes the report of a study: one page, Markdown, a CSV for every table, the plot."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.evaluation.report import Section, page, plots
from baco.evaluation.store import Run
from baco.files import write_atomic
from baco.study.analysis import StudyResults, analyse
from baco.study.exclusions import exclude
from baco.study.findings import DEFINITIONS, RATERS, Findings, estimate_rows, findings, marked
from baco.study.study import Study
from baco.study.validity import Validity, check_run, validity
from baco.version import __version__

# Of the plots on white paper, and one that is faint on white and on black.
GRID, GRID_BOTH_THEMES = "#e6e9ec", "#8a929a40"
SCALES = {"preference": "win rate", "rating": "difference in points"}


@dataclass(frozen=True, slots=True)
class StudyReport:
    """A report that was written.

    Attributes:
        page: the HTML file.
        findings: the findings that it shows.
        results: the figures.
    """

    page: Path
    findings: Findings
    results: StudyResults


def write_study_report(
    study: Study,
    out: Path | None = None,
    run: Run | None = None,
    models: Mapping[str, str] | None = None,
    *,
    metrics: bool = True,
) -> StudyReport:
    """Write a study's report: `index.html`, `report.md`, `results.json`, `tables/`, `plots/`.

    Args:
        study: with judgments.
        out: the folder to write to, STUDY/report by default; files of an earlier report are
            replaced.
        run: the run that the answers come from, for the automatic metrics.
        models: for the automatic metrics, by role.
        metrics: whether these are computed and compared with the judgments.

    Raises:
        BacoError: no judgments yet, another run, or a folder that cannot be written.
    """
    results, found = study_findings(study, run, models, metrics=metrics)
    charts = contrast_charts(results)
    folder = out or study.path / "report"
    try:
        for name in ("tables", "plots"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for old in (folder / "tables").glob("*.csv"):
            old.unlink()
        for table in found.tables:
            csv = marked(table, found.warning).csv()
            write_atomic(folder / "tables" / f"{table.name}.csv", csv)
        for stem, chart in charts.items():
            spec = plots.finished(chart, found.title)
            write_atomic(folder / "plots" / f"{stem}.svg", plots.svg(spec))
            write_atomic(folder / "plots" / f"{stem}.png", plots.png(spec))
        write_atomic(folder / "report.md", study_markdown(found, list(charts)))
        write_atomic(folder / "results.json", json.dumps(as_json(results, found), indent=2) + "\n")
        write_atomic(folder / "index.html", _page(found, charts))
    except OSError as error:
        raise BacoError(f"cannot write to {folder}: {error.strerror}") from error
    return StudyReport(folder / "index.html", found, results)


def study_section(study: Study, run: Run) -> Section:
    """The study as a section of the report of its run.

    Raises:
        BacoError: no judgments yet, or another run.
    """
    check_run(study.plan, run)
    _, found = study_findings(study, metrics=False)
    return found.section()


def study_findings(
    study: Study,
    run: Run | None = None,
    models: Mapping[str, str] | None = None,
    *,
    metrics: bool = True,
) -> tuple[StudyResults, Findings]:
    """Analyse a study.

    Args:
        study: with judgments.
        run, models, metrics: see `write_study_report`.

    Raises:
        BacoError: no judgments yet, or another run.
    """
    judgments = list(study.judgments())
    if not any(judgment.kind == "comparison" for judgment in judgments):
        raise BacoError(
            f"{study.path} has no judgments yet: collect some with 'baco study serve', or try the "
            "study with 'baco study simulate'"
        )
    results = analyse(study.plan, judgments)
    kept, _ = exclude(study.plan, judgments)
    measured = validity(study, kept, run, models) if metrics else Validity((), {}, {})
    origins = {j.rater: j.origin for j in judgments if j.kind == "comparison"}
    return results, findings(results, measured, study.store.versions(), list(origins.values()))


def contrast_charts(results: StudyResults) -> dict[str, Any]:
    """A plot of the planned contrasts for each scale, by the stem of its file."""
    import altair as alt

    charts = {}
    colors = [plots.LIGHT["BACo"], plots.LIGHT["other"]]
    for form, title in SCALES.items():
        rows = [
            {"label": label, "value": e.value, "low": e.low, "high": e.high,
             "neutral": neutral, "outcome": "supported" if supported else "not supported"}
            for label, question, e, neutral, supported in estimate_rows(results)
            if question.form == form
        ]  # fmt: skip
        if not rows:
            continue
        base = alt.Chart(alt.Data(values=rows))
        y = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=420, ticks=False))
        span = [0, 1] if form == "preference" else _span(rows)
        scale = alt.Scale(domain=span, nice=False)
        color = alt.Color(
            "outcome:N",
            scale=alt.Scale(domain=["supported", "not supported"], range=colors),
            legend=alt.Legend(title=None, orient="bottom"),
        )
        axis = alt.Axis(format=".0%" if form == "preference" else "+.1f")
        neutral = base.mark_rule(strokeDash=[5, 4], color="#8a929a", aria=False).encode(
            x="mean(neutral):Q"
        )
        bars = base.mark_rule(strokeWidth=2.5).encode(
            x=alt.X("low:Q", title=title, scale=scale, axis=axis), x2="high:Q", y=y, color=color
        )
        dots = base.mark_point(filled=True, size=90, opacity=1).encode(
            x=alt.X("value:Q", title=title), y=y, color=color,
            shape=alt.Shape(
                "outcome:N",
                scale=alt.Scale(domain=["supported", "not supported"], range=["circle", "square"]),
                legend=alt.Legend(title=None, orient="bottom"),
            ),
        )  # fmt: skip
        margins = alt.Chart(alt.Data(values=_margins(results, form)))
        edges = margins.mark_rule(strokeDash=[1, 3], color="#8a929a", aria=False).encode(
            x="margin:Q"
        )
        chart = alt.layer(neutral, edges, bars, dots).properties(width=430, height=alt.Step(30))
        charts[f"contrasts-{form}"] = chart
    return charts


def _margins(results: StudyResults, form: str) -> list[dict[str, float]]:
    """Where the margins of equivalence are on a scale."""
    return [
        {"margin": result.neutral + sign * result.contrast.margin}
        for result in results.contrasts
        if result.contrast.margin is not None
        and results.plan.question[result.contrast.question].form == form
        for sign in (-1, 1)
    ]


def _span(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    most = max(0.5, *(abs(row[end]) for row in rows for end in ("low", "high")))
    return [-most * 1.05, most * 1.05]


def _page(found: Findings, charts: Mapping[str, Any]) -> str:
    from markupsafe import Markup

    text = resources.files("baco.study").joinpath("study_page.html.jinja").read_text("utf-8")
    return str(
        page.template(text).render(
            version=__version__,
            css=Markup(page.source("page.css")),
            findings=found,
            definitions=DEFINITIONS,
            plots=[
                {
                    "svg": Markup(_themed(chart)),
                    "label": "Estimates and intervals of the planned contrasts, as in the table "
                    "below",
                }
                for chart in charts.values()
            ],
        )
    )


def _themed(chart: Any) -> str:
    """A plot as SVG whose text has the colour of the text around it; the page describes it."""
    drawn = plots.svg(plots.finished(chart) | {"background": None})
    drawn = drawn[drawn.index("<svg") :].replace(plots.INK, "currentColor")
    drawn = drawn.replace(GRID, GRID_BOTH_THEMES)
    return drawn.replace("<svg ", '<svg aria-hidden="true" ', 1)


def study_markdown(found: Findings, stems: Sequence[str]) -> str:
    """The report as Markdown."""
    return "\n".join(_lines(found, stems)) + "\n"


def _lines(found: Findings, stems: Sequence[str]) -> Iterator[str]:
    yield f"# {found.title}\n"
    if found.warning:
        yield f"> **{found.warning}**\n"
    yield f"{found.lead}\n"
    yield from (f"- {line}" for line in found.outcomes)
    yield ""
    yield from (f"![{stem}](plots/{stem}.svg)\n" for stem in stems)
    for part in found.parts:
        yield f"## {part.title}\n"
        yield from (f"{paragraph}\n" for paragraph in part.text)
        yield from (table.markdown() for table in part.tables)
    yield "## The plan\n"
    yield from (f"- {name}: {value}" for name, value in found.facts)
    yield "\n### Questions, as raters read them\n"
    yield from (f"- {text} ({'; '.join(anchors)})" for text, anchors in found.questions)
    yield "\n### Definitions\n"
    yield from (f"- {line}" for line in DEFINITIONS)


def as_json(results: StudyResults, found: Findings) -> dict[str, Any]:
    """The planned contrasts for programs."""
    return {
        "plan": results.plan.hash,
        "raters": RATERS[found.warning],
        "warning": found.warning,
        "judgments": results.judgments,
        "judgments_kept": results.kept,
        "contrasts": [
            {
                "id": r.contrast.id,
                "question": r.contrast.question,
                "treatment": r.contrast.treatment,
                "control": r.contrast.control,
                "test": r.contrast.test,
                "margin": r.contrast.margin,
                "judgments": r.judgments,
                "raters": r.raters,
                "prompts": r.prompts,
                "estimate": None if r.estimate is None else r.estimate.value,
                "low": None if r.estimate is None else r.estimate.low,
                "high": None if r.estimate is None else r.estimate.high,
                "p": r.p_value,
                "p_holm": r.adjusted,
                "outcome": r.verdict(results.plan.analysis.alpha),
            }
            for r in results.contrasts
        ],
    }
