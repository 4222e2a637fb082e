"""``baco demo``: the embedded pair's own making."""

from pathlib import Path
from typing import Annotated

import typer

from baco.cli.console import note

demo = typer.Typer(help="The embedded demo pair.", no_args_is_help=True)


@demo.callback()
def _group() -> None:
    pass


@demo.command(epilog="Example: baco demo train --out my-pair --seed 0")
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the pair to.")],
    seed: Annotated[
        int, typer.Option("--seed", "-s", min=0, help="Of data, weights, answers.")
    ] = 0,
    table: Annotated[
        bool, typer.Option(help="Measure every router and rival on it afterwards.")
    ] = True,
) -> None:
    """Make the demo pair again: toy world, tokenizer, both halves and the table, from a seed.

    Takes at most 40 minutes on two cores. Stopped halfway, the same command goes on.
    """
    from baco.demo.train import bar
    from baco.demo.train import train as make

    make(out, seed=seed)
    if table:
        from baco.evaluation.demo_pair.measure import measure
        from baco.evaluation.demo_pair.table import write_report

        with bar(True) as stage:
            measure(out, seed=seed, advance=stage("table"))
        write_report(out / "table.md", [out])
    note(f'try it: baco generate "Recommend a summer destination" -n 8 --pair {out}')
