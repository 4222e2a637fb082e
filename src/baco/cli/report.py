"""``baco report``: a run as one page, with its tables and plots beside it."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.evaluation.report import Section


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to.  [default: RUN/report]"),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option("--study", help="A study of this run: what its raters say gets a section."),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write the results of a run: one HTML page that needs no network, and its parts as files.

    The page has the headline table, the diversity-quality plane, router ablation, samples and
    settings; report.md, tables/*.csv and plots/*.svg and *.png hold the same for papers.
    """
    check_libraries()
    from baco.evaluation.report import write_report

    written = write_report(run, output, added=[] if study is None else [_section(study, run)])
    if as_json:
        print_json(
            {
                "page": str(written.page),
                "verdicts": [
                    {
                        "pair": v.pair,
                        "answer": v.first,
                        "rivals": list(v.lines),
                        "warning": v.warning,
                    }
                    for v in written.summaries
                ],
            }
        )
        return
    for summary in written.summaries:
        title = f"{summary.pair}: " if len(written.summaries) > 1 else ""
        out().print(title + summary.first)
        for line in summary.lines:
            out().print(f"  {line}")
        if summary.warning is not None:
            note(f"{title}{summary.warning}")
    note(f"report in {written.page}")


def _section(path: Path, run: Path) -> "Section":
    from baco.evaluation.store import Run
    from baco.study.study import Study
    from baco.study.study_report import study_section

    with closing(Study.open(path)) as study:
        return study_section(study, Run.open(run))


def check_libraries() -> None:
    """Check that what the report draws with is installed.

    Raises:
        BacoError: a library is missing.
    """
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise BacoError(
            f"the report needs {error.name}: install it with pip install 'baco[evaluation]'"
        ) from error
