"""``baco noveltybench``: a setting of a run as an entry of NoveltyBench's leaderboard."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.cli.score import MetricOptions
from baco.errors import BacoError


def noveltybench(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    setting: Annotated[
        str, typer.Option("--setting", help="A setting of the run, such as P-Punc:0.4.")
    ],
    name: Annotated[str, typer.Option("--name", help="The name of the entry.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the entry's own folder, DATE_NAME.")
    ] = Path("evaluation"),
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A judge, as ROLE=ID_OR_FOLDER: equivalence or reward, NoveltyBench's by default.",
        ),
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Write a run's answers as an entry of NoveltyBench's leaderboard: four files a task.

    The first ten answers to each prompt are classed and rated by NoveltyBench's own judges.
    """
    from baco.evaluation.store import Run
    from baco.evaluation.submission import export_submission

    opt.quiet_libraries()
    if not name or "/" in name or "\\" in name:
        raise BacoError(f"name {name!r} becomes a folder's: leave out slashes")
    folder = output / f"{datetime.now(UTC).date()}_{name}"
    models = MetricOptions(model=model).models()
    summaries = export_submission(Run.open(run), setting, name, folder, models)
    if as_json:
        print_json({"folder": str(folder), "summaries": summaries})
        return
    for task, summary in summaries.items():
        out().print(
            f"{task}: {summary['mean_distinct']:.2f} distinct answers of 10, utility "
            f"{summary['mean_utility']:.2f}"
        )
    note(f"entry in {folder}: NoveltyBench's README says how to submit it")
