"""``baco dataset``: a report about a dataset, and a copy of it without its duplicates."""

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note, out, print_columns, print_json
from baco.cli.progress import counting
from baco.cli.report import check_libraries
from baco.cli.score import models_by_role
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.dataset.near_duplicates import Rule

dataset = typer.Typer(
    name="dataset",
    help="Report about a dataset, and remove its duplicates.",
    no_args_is_help=True,
)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET",
        help="A folder that 'baco batch --dataset' made, or any folder or file of answers: "
        ".jsonl, .csv or .parquet.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option("--column", help="Column of the answers.  [default: answer, response, text, …]"),
]


@dataclass(frozen=True, slots=True)
class DuplicateOptions:
    """What counts as a duplicate."""

    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            help="Similarity of near duplicates, 0.1 to 1: estimated Jaccard similarity of their "
            "runs of 3 words.",
        ),
    ] = 0.7
    same_prompt: Annotated[
        bool, typer.Option("--same-prompt", help="Compare only answers to the same prompt.")
    ] = False

    def rule(self, keep: str = "first") -> "Rule":
        """The rule; BacoError for a threshold out of range or an unknown `keep`."""
        from baco.dataset.near_duplicates import Rule

        return Rule(self.threshold, keep, self.same_prompt)  # type: ignore[arg-type]


@dataset.command(epilog="Example: baco dataset report data/ --baseline aligned/ -o report.html")
@opt.grouped()
def report(
    *,
    source: Source,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            help="A dataset to compare with, such as answers of the aligned model alone to the "
            "same prompts.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write an HTML page with plots to this file."),
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option("--schema", help="A JSON schema that every answer should fit."),
    ] = None,
    duplicates: DuplicateOptions,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Another embedding model, as embedding=ID_OR_FOLDER."),
    ] = None,
    column: Column = None,
    as_json: opt.AsJson = False,
) -> None:
    """Report validity, duplicates, diversity, openings and overused phrases of a dataset.

    Counts, validity and duplicates are of all rows. Other figures are of a sample of at most 10,000
    answers and 100 prompts.
    """
    rule = duplicates.rule()
    models = models_by_role("--model", model)
    if output is not None:
        if output.is_dir():
            raise BacoError(f"{output} is a folder: give a file, as in {output / 'report.html'}")
        if not output.absolute().parent.is_dir():
            raise BacoError(f"cannot write {output}: no such folder as {output.absolute().parent}")
        check_libraries()
    from baco.dataset.dataset_page import cells, lines, render, verdict
    from baco.dataset.figures import make_report, schema_check
    from baco.dataset.files import Dataset
    from baco.files import write_output

    check = None if schema is None else schema_check(schema)
    opened = Dataset.open(source, column)
    other = None if baseline is None else Dataset.open(baseline, column)
    read = [*opened.files, *(other.files if other is not None else ()), schema]
    if output is not None and output.resolve() in (file.resolve() for file in read if file):
        raise BacoError(f"--output {output} is read too: give another file")
    opt.quiet_libraries()
    with counting("rows") as advance:
        made = make_report(opened, other, rule, check, models, advance)
    if as_json:
        print_json(asdict(made))
    else:
        for sentence in verdict(made):
            out().print(sentence)
        rows = [cells(line, other is not None) for line in lines(made)]
        heads = ["", str(source)] + ([str(baseline), "difference"] if other is not None else [])
        print_columns([heads, *rows])
    if made.unavailable is not None:
        note(f"some figures are missing: {made.unavailable}")
    if output is not None:
        write_output(output, render(made))
        note(f"report in {output}")


@dataset.command(epilog="Example: baco dataset dedupe data/ data-unique/ --threshold 0.8")
@opt.grouped()
def dedupe(
    *,
    context: typer.Context,
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    duplicates: DuplicateOptions,
    keep: Annotated[
        str,
        typer.Option("--keep", help="Which one of a group of duplicates stays: first or longest."),
    ] = "first",
    column: Column = None,
    as_json: opt.AsJson = False,
) -> None:
    """Copy a dataset without exact and near duplicates.

    Answers connected by a chain of duplicates are a group, of which one stays. Rows are copied
    unchanged, with the card. The command can be stopped at any moment: the same one continues.
    """
    rule = duplicates.rule(keep)
    from baco.dataset.dedupe import REMOVED
    from baco.dataset.dedupe import dedupe as carry_out
    from baco.dataset.files import Dataset
    from baco.version import __version__

    opened = Dataset.open(source, column, nested=False)
    provenance = {"command": shlex.join(["baco", *context.obj]), "baco": __version__}
    with counting("rows") as advance:
        result = carry_out(opened, target, rule, advance, provenance)
    if as_json:
        print_json(
            {
                "out": str(target),
                "rows": result.rows,
                "kept": result.kept,
                "exact": result.exact,
                "near": result.near,
            }
        )
        return
    out().print(
        f"{result.kept:,} of {result.rows:,} rows kept; removed: {result.exact:,} exact and "
        f"{result.near:,} near duplicates"
    )
    note(f"dataset in {target}; {target / REMOVED} names the removed rows")
