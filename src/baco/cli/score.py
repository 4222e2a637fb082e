"""``baco score``: measure the samples of a run, and what ``baco sweep`` shares with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baco.cli import options as opt
from baco.cli.console import note, print_json
from baco.cli.progress import bars
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.evaluation.plan import PairSpec
    from baco.evaluation.store import Run

Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Processes, each with its own copy of the pair; 1 on a GPU."),
]


@dataclass(frozen=True, slots=True)
class MetricOptions:
    """Which metrics, and by which models."""

    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A metric to score; by default all that can run here."),
    ] = None
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A metric's model, as ROLE=ID_OR_FOLDER: embedding, nli, equivalence, reward or "
            "reference.",
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """The metrics; empty: all that can run."""
        return self.metric or []

    def models(self) -> dict[str, str]:
        """The models, by role; errors as for `models_by_role`."""
        return models_by_role("--model", self.model)


def models_by_role(option: str, assignments: Sequence[str] | None) -> dict[str, str]:
    """The models of an option that takes ROLE=ID_OR_FOLDER, by role.

    Raises:
        BacoError: an unknown role, or a part is missing.
    """
    from baco.evaluation.metrics import ROLES

    models: dict[str, str] = {}
    for assignment in assignments or ():
        role, equals, name = assignment.partition("=")
        if not equals or not name or role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise BacoError(
                f"{option.removeprefix('--')} {assignment!r}: give ROLE=ID_OR_FOLDER, with a role "
                f"of {known}"
            )
        models[role] = name
    return models


@opt.grouped()
def score(
    *,
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="The directory of a run; or a file of prompts and answers (JSONL, JSON, CSV, TSV "
            "or Parquet), - for standard input.",
        ),
    ],
    metrics: MetricOptions,
    rival: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="With a file: another file of answers, or a model of NoveltyBench's leaderboard.",
        ),
    ] = None,
    workers: Workers = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure the samples of a run by more metrics, or any file of prompts and answers.

    A run's samples are not drawn again, and what has been scored already is left as it is. A file
    is scored by the lexical metrics unless --metric names others; a row of it has a prompt with all
    its answers, or with one of them.
    """
    opt.quiet_libraries()
    if str(run) == "-" or run.is_file() or (run.suffix and not run.is_dir()):
        from baco.cli.score_file import score_file

        score_file(run, metrics.names, metrics.models(), rival, as_json)
        return
    if rival is not None:
        raise BacoError("--against compares files of answers: give a file in place of a run")
    from baco.evaluation.store import Run

    there = Run.open(run)
    refused = measure(there, metrics.names, metrics.models(), count_processes(workers, None))
    conclude(there, refused, as_json)


def count_processes(given: int | None, pairs: "Sequence[PairSpec] | None") -> int:
    """How many: as given, or as these pairs, if any are loaded, leave room for.

    Raises:
        BacoError: fewer than one.
    """
    if given is not None and given < 1:
        raise BacoError(f"workers is {given}: give 1 or more")
    if given is not None:
        return given
    if pairs is None:
        from baco.device import cores

        return cores()
    from baco.evaluation.sweep import default_workers

    return default_workers(pairs)


def measure(
    run: "Run", names: Sequence[str], models: Mapping[str, str], workers: int
) -> dict[str, str]:
    """Score a run, with a bar for every metric; why some could not be, by their names."""
    from baco.evaluation import score as scoring

    metrics = scoring.requested_metrics(run, names, models)
    total = sum(1 for _ in run.groups())
    with bars() as progress:
        shown: dict[str, Any] = {}

        def advance(name: str, groups: int) -> None:
            if name not in shown:
                shown[name] = progress.add_task(name, total=total, rate="")
            progress.update(shown[name], advance=groups)

        return scoring.score(run, metrics, workers, advance, by_name=bool(names))


def conclude(run: "Run", refused: Mapping[str, str], as_json: bool) -> None:
    """Write the run's tables and say what it holds."""
    from baco.evaluation.parquet import export

    export(run)
    for why in refused.values():
        note(why)
    config = run.config
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "pairs": [pair["name"] for pair in config["pairs"]],
                "tasks": {task["name"]: task["prompts"] for task in config["tasks"]},
                "settings": len(config["settings"]),
                "samples": run.drawn,
                "complete": run.complete,
                "metrics": run.metrics(),
                "unavailable": run.unavailable(),
            }
        )
        return
    note(f"{run.drawn} samples, {len(run.metrics())} metrics in {run.path}")
