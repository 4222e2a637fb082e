"""Everything a report is made of, in one folder: page, tables, plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.evaluation.methods.method import Family
from baco.evaluation.report import page, plots
from baco.evaluation.report.content import content, markdown
from baco.evaluation.report.drawings import coverage_rows, draw
from baco.evaluation.report.examples import choose, collect
from baco.evaluation.report.families import family, looks
from baco.evaluation.report.load_scores import Findings, by_pair, gather
from baco.evaluation.report.ranking import Standing, standing
from baco.evaluation.report.sections import sections
from baco.evaluation.report.summary import Verdict, verdict
from baco.evaluation.store import Run
from baco.files import write_atomic


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        verdicts: one for each pair.
    """

    page: Path
    verdicts: Sequence[Verdict]


def write_report(path: Path, out: Path | None = None, resamples: int = 2000) -> Report:
    """Write a run's report: `index.html`, `report.md`, `tables/*.csv`, `plots/*.svg` and `.png`.

    Args:
        path: the run's directory.
        out: the folder to write to, RUN/report by default; files of an earlier report are replaced.
        resamples: for the intervals.

    Raises:
        BacoError: no run, one without samples or scores, or a folder that cannot be written.
    """
    run = Run.open(path)
    findings = gather(run)
    families = _families(run, findings)
    standings = [
        standing(pair, of_pair, families, resamples) for pair, of_pair in by_pair(findings)
    ]
    every = looks(families)
    tables = sections(standings)
    verdicts = [verdict(one) for one in standings]
    told = content(run, standings, tables, verdicts)
    folder = out or path / "report"
    try:
        for name in ("tables", "plots"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for table in tables.all:
            write_atomic(folder / "tables" / f"{table.name}.csv", table.csv())
        drawn = draw(folder / "plots", standings, every)
        write_atomic(folder / "report.md", markdown(told, tables, drawn))
        coverages = [plots.coverages(coverage_rows(one), every) for one in standings]
        specs = [chart.to_dict(validate=False) for chart in coverages]
        write_atomic(folder / "index.html", page.render(_views(run, standings), every, specs, told))
    except OSError as error:
        raise BacoError(f"cannot write to {folder}: {error.strerror}") from error
    return Report(folder / "index.html", verdicts)


def _families(run: Run, findings: Sequence[Findings]) -> dict[str, Family]:
    kinds = {setting.method: setting.options.get("kind", "") for setting in run.settings}
    methods = dict.fromkeys(m for found in findings for m in found.measured.methods)
    return {method: family(method, kinds.get(method, "")) for method in methods}


def _views(run: Run, standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """Every pair and task as the page's script reads it, with its examples from a second pass."""
    views = []
    for one in standings:
        for found in one.every:
            answers = sum(cost.answers for cost in found.costs.values())
            tokens = sum(cost.tokens for cost in found.costs.values())
            shown = choose(found.prompts, len(found.keys), 5 * tokens / answers)
            groups = (g for g in run.groups() if (g.pair, g.task) == (one.pair, found.task))
            views.append(page.view(one, found, collect(groups, shown)))
    return views
