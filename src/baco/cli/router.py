"""``baco router``: routers that are learned."""

import json
from pathlib import Path
from typing import Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note
from baco.cli.progress import steps
from baco.cli.score import models_by_role
from baco.errors import BacoError

router = typer.Typer(help="Routers that are learned.", no_args_is_help=True)


@router.callback()
def _group() -> None:
    pass


@router.command(epilog="Example: baco router train runs/demo --out router.json")
@opt.grouped()
def train(
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, JSON.")],
    pair: Annotated[
        str | None, typer.Option("--pair", help="Pair of the run, where it has several.")
    ] = None,
    quality: Annotated[
        str, typer.Option("--quality", help="Metric of an answer's quality: reward or perplexity.")
    ] = "reward",
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="Model of that metric, ROLE=ID_OR_FOLDER. Repeatable."),
    ] = None,
    diversity_weight: Annotated[
        float,
        typer.Option(
            "--diversity-weight",
            min=0,
            help="How much the distance of an answer to its siblings counts next to its quality.",
        ),
    ] = 1.0,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0.05, help="A smaller one learns from the best answers alone."
        ),
    ] = 1.0,
    hidden: Annotated[
        int,
        typer.Option(
            "--hidden", min=0, max=1024, help="Units of a hidden layer; 0: logistic regression."
        ),
    ] = 0,
    hidden_states: Annotated[
        int,
        typer.Option(
            "--hidden-states",
            min=0,
            max=64,
            help="Also read each model's last hidden states, on this many principal axes, such as "
            "16. The router then runs with the local backend alone.",
        ),
    ] = 0,
) -> None:
    """Train the router Learned on the answers of a run, and write it to one file.

    Draw the run with routers that try both models in many places, such as --router Rand. Then use
    the file as --router Learned:FILE. A higher threshold means fewer base words.
    """
    from baco.api import Baco
    from baco.evaluation.plan import PairSpec
    from baco.evaluation.store import Run
    from baco.evaluation.train_router import Objective
    from baco.evaluation.train_router import train as learn
    from baco.files import write_output

    opt.quiet_libraries()
    if out.is_dir():
        raise BacoError(f"--out {out} is a folder: give a file, as in {out / 'router.json'}")
    if not out.resolve().parent.is_dir():
        raise BacoError(f"--out {out}: there is no folder {out.parent}")
    begun = Run.open(run)
    known = {row["name"]: PairSpec(row["name"], row["options"]) for row in begun.config["pairs"]}
    name = pair if pair is not None else next(iter(known))
    if name not in known or (pair is None and len(known) > 1):
        raise BacoError(f"the run has the pairs {', '.join(known)}: give one of them with --pair")
    models = models_by_role("--model", model)
    baco = Baco.load(**known[name].where, **known[name].options)
    groups = [group for group in begun.groups() if group.pair == name]
    with steps("answers", len(groups)) as advance:
        objective = Objective(quality, diversity_weight, temperature, hidden, hidden_states)
        learned = learn(groups, begun, baco, objective, models, advance)
    write_output(out, json.dumps(learned.to_json(), indent=1) + "\n")
    trained = learned.trained
    note(f"trained on {trained['words']} words of {trained['answers']} answers; saved in {out}")
    note(f'try it: baco generate "…" --router Learned:{out}')
