"""``baco demo``: train the embedded pair again and measure it."""

from pathlib import Path
from typing import Annotated

import typer

from baco.cli.console import note
from baco.cli.report import check_libraries, report
from baco.cli.sweep import sweep

demo = typer.Typer(help="The embedded demo pair.", no_args_is_help=True)
TASKS = ("demo", "demo-facts")


@demo.callback()
def _group() -> None:
    pass


@demo.command(epilog="Example: baco demo train --out my-pair --seed 0")
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the pair to.")],
    seed: Annotated[
        int, typer.Option("--seed", "-s", min=0, help="Seed of the data, weights and answers.")
    ] = 0,
    table: Annotated[
        bool, typer.Option(help="Sweep all methods over the new pair and write the report.")
    ] = True,
) -> None:
    """Train the demo pair: toy world, tokenizer and both models, from a seed; then measure it.

    Training takes about 20 minutes on two cores. The sweep over the tasks demo and demo-facts goes
    to OUT/run, its report to OUT/run/report. If the command is stopped, the same command continues.
    """
    from baco.demo.train import train as make

    if table:
        check_libraries()
    make(out, seed=seed)
    if table:
        sweep(context=context, out=out / "run", pair=[str(out)], task=list(TASKS), seed=seed)
        report(out / "run")
    note(f'try it: baco generate "Recommend a summer destination" -n 8 --pair {out}')
