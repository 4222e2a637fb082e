"""Writes the report of a run into one folder: page, Markdown, tables, plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.evaluation.methods.method import Family
from baco.evaluation.report import page, plots
from baco.evaluation.report.content import Summary, content, markdown, summarise
from baco.evaluation.report.load_scores import TaskScores, by_pair, load_scores
from baco.evaluation.report.ranking import Ranking, rank
from baco.evaluation.report.results import sections
from baco.evaluation.report.tables import Section
from baco.evaluation.store import Run
from baco.files import write_atomic


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written.

    Attributes:
        page: the HTML file.
        summaries: one for each pair.
    """

    page: Path
    summaries: Sequence[Summary]


def write_report(
    path: Path,
    out: Path | None = None,
    resamples: int = 2000,
    added: Sequence[Section] = (),
) -> Report:
    """Write a run's report: `index.html`, `report.md`, `tables/*.csv`, `plots/*.svg` and `.png`.

    Args:
        path: the run's directory.
        out: the folder to write to, RUN/report by default; files of an earlier report are replaced.
        resamples: for the intervals.
        added: sections that other parts of BACo bring, such as a study's.

    Raises:
        BacoError: no run, one without samples or scores, or a folder that cannot be written.
    """
    run = Run.open(path)
    scores = load_scores(run)
    families = _families(run, scores)
    rankings = [rank(pair, of_pair, families, resamples) for pair, of_pair in by_pair(scores)]
    looks = plots.looks(families)
    tables = sections(rankings)
    summaries = [summarise(ranking) for ranking in rankings]
    text = content(run, rankings, tables, summaries) | {"added": added}
    folder = out or path / "report"
    try:
        for name in ("tables", "plots"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for table in (*tables.all, *(table for section in added for table in section.tables)):
            write_atomic(folder / "tables" / f"{table.name}.csv", table.csv())
        stems = plots.draw(folder / "plots", rankings, looks)
        write_atomic(folder / "report.md", markdown(text, tables, stems))
        coverages = [plots.coverages(plots.coverage_rows(r), looks) for r in rankings]
        specs = [chart.to_dict(validate=False) for chart in coverages]
        html = page.render(_views(run, rankings), looks, specs, text)
        write_atomic(folder / "index.html", html)
    except OSError as error:
        raise BacoError(f"cannot write to {folder}: {error.strerror}") from error
    return Report(folder / "index.html", summaries)


def _families(run: Run, scores: Sequence[TaskScores]) -> dict[str, Family]:
    kinds = {setting.method: setting.options.get("kind", "") for setting in run.settings}
    methods = dict.fromkeys(m for task in scores for m in task.measured.methods)
    return {method: plots.family(method, kinds.get(method, "")) for method in methods}


def _views(run: Run, rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """Every pair and task as the page's script reads it; examples are read in a second pass."""
    views = []
    for ranking in rankings:
        for task in ranking.every:
            answers = sum(cost.answers for cost in task.costs.values())
            tokens = sum(cost.tokens for cost in task.costs.values())
            shown = page.choose(task.prompts, len(task.keys), 5 * tokens / answers)
            groups = (g for g in run.groups() if (g.pair, g.task) == (ranking.pair, task.task))
            views.append(page.view(ranking, task, page.collect(groups, shown)))
    return views
