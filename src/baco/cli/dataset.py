"""``baco dataset``: a copy of a dataset without its duplicates."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.cli.progress import counting

if TYPE_CHECKING:
    from baco.dataset.near_duplicates import Rule

dataset = typer.Typer(
    name="dataset",
    help="Remove the duplicates of a dataset.",
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
