"""``baco sweep`` and ``baco score``: run methods on tasks into a directory, and measure them."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from baco import BacoError
from baco.cli import options as opt
from baco.cli.cluster import RAY, Address, named_cluster
from baco.cli.console import err, note, print_json

if TYPE_CHECKING:
    from baco.cluster.connection import Cluster
    from baco.evaluation.methods.judge import Judge
    from baco.evaluation.plan import PairSpec, Plan
    from baco.evaluation.store import Run

Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pair",
        "-p",
        help="Short name, folder, or BASE+ALIGNED; may be given several times.  [default: demo]",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        help="A task's name, NAME=PATH for a local copy of its data, or a file of prompts (.jsonl, "
        ".txt); may be given several times.  [default: demo]",
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="routers, base, aligned, mixing, ensemble, prompting, …"),
]
Routers = Annotated[
    list[str] | None,
    typer.Option("--router", "-r", help="P-Punc sweeps its threshold, P-Punc:0.4 takes this one."),
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="A metric to score; by default all that can run here."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A metric's model, as ROLE=ID_OR_FOLDER: embedding, nli, equivalence, reward or "
        "reference.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", help="Processes, each with its own copy of the pair; 1 on a GPU."),
]


def sweep(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's directory.")],
    pair: Pairs = None,
    task: Tasks = None,
    method: Methods = None,
    router: Routers = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Samples per prompt.")] = 10,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Take the first so many prompts of every task.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of all draws.")] = 0,
    preset: Annotated[
        str, typer.Option("--preset", help="full, or quick: fewer operating points.")
    ] = "full",
    metric: Metrics = None,
    model: Models = None,
    scoring: Annotated[
        bool, typer.Option("--score/--no-score", help="Measure after the samples are drawn.")
    ] = True,
    temperature: Annotated[float | None, typer.Option("--temperature")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens")] = None,
    judge_url: Annotated[
        str | None,
        typer.Option("--judge-url", help="OpenAI-compatible endpoint: Judge routing takes part."),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="What that endpoint calls its model.")
    ] = None,
    workers: Workers = None,
    backend: Annotated[
        str, typer.Option("--backend", help="Where samples are drawn: local, or ray (a cluster).")
    ] = "local",
    address: Address = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    quantize: opt.Quantize = None,
    compile: opt.Compile = None,
    base_template: opt.BaseTemplate = None,
    chat_template: opt.ChatTemplate = None,
    as_json: opt.AsJson = False,
) -> None:
    """Draw every method's samples on every task, and measure their diversity and quality.

    Stop it at any moment: the same command goes on where it was, and the samples are the same as if
    it had never been stopped. Everything is kept in the run's directory; 'baco report' draws it.
    """
    from baco.evaluation.methods import Grid, select_settings
    from baco.evaluation.metrics import METRICS
    from baco.evaluation.plan import PairSpec, Plan
    from baco.evaluation.score import check_metrics, check_verifiable
    from baco.evaluation.store import begin
    from baco.evaluation.tasks import load_task

    models = _models(model or ())
    cluster = _cluster(backend, address, workers, device)
    if preset not in ("quick", "full"):
        raise BacoError(f"preset is {preset!r}: use quick or full")
    loading = opt.given(
        {
            "dtype": dtype,
            "device": device,
            "quantize": quantize,
            "compile": compile,
            "base_template": base_template,
            "chat_template": chat_template,
        }
    )
    sampling = opt.given(
        {"temperature": temperature, "top_p": top_p, "min_p": min_p, "max_tokens": max_tokens}
    )
    # What needs no data and no model is refused first.
    size: Literal["quick", "full"] = "quick" if preset == "quick" else "full"
    judge = _judge(judge_url, judge_model)
    settings = select_settings(method or (), router or (), Grid(size, n), judge)
    pairs = [PairSpec(name, loading) for name in pair or ["demo"]]
    Plan(pairs, [], settings, n, seed, sampling).check()
    if scoring:
        check_metrics(metric or METRICS, n)
    count = _workers(workers if cluster is None else None, pairs)
    tasks = [load_task(name, limit) for name in task or ["demo"]]
    if scoring:
        check_verifiable(metric or (), [t.verifier for t in tasks if t.verifier])
    plan = Plan(pairs, tasks, settings, n, seed, sampling)
    plan.check()
    command = shlex.join(["baco", *context.obj])
    run = begin(out, plan.config(command), {task.name: task.prompts for task in tasks})
    _draw(run, plan, count, cluster)
    refused = _score(run, metric or (), models, count) if scoring else {}
    _export(run)
    _told(run, refused, as_json)


def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    metric: Metrics = None,
    model: Models = None,
    workers: Workers = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure the samples of a run by more metrics, without drawing them again.

    What has been scored already is left as it is.
    """
    from baco.evaluation.store import Run

    there = Run.open(run)
    refused = _score(there, metric or (), _models(model or ()), _workers(workers, None))
    _export(there)
    _told(there, refused, as_json)


def _judge(url: str | None, model: str | None) -> "Judge | None":
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise BacoError("a judge needs both: give --judge-url and --judge-model")
    from baco.evaluation.methods.judge import Judge

    return Judge(url, model)


def _models(given: Sequence[str]) -> dict[str, str]:
    """Roles and models of ``--model ROLE=ID``."""
    from baco.evaluation.metrics.registry import ROLES

    models: dict[str, str] = {}
    for told in given:
        role, equals, name = told.partition("=")
        if not equals or not name or role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise BacoError(f"model {told!r}: give ROLE=ID_OR_FOLDER, with a role of {known}")
        models[role] = name
    return models


def _cluster(
    backend: str, address: str | None, workers: int | None, device: str | None
) -> "Cluster | None":
    if backend == RAY:
        return named_cluster(address, workers, device)
    if backend != "local":
        raise BacoError(f"backend is {backend!r}: a sweep draws on local or ray")
    if address is not None:
        raise BacoError("--address is of a cluster: give --backend ray with it")
    return None


def _workers(given: int | None, pairs: "Sequence[PairSpec] | None") -> int:
    if given is not None and given < 1:
        raise BacoError(f"workers is {given}: give 1 or more")
    if given is not None:
        return given
    if pairs is None:
        from baco.evaluation.workers import cores

        return cores()
    from baco.evaluation.sweep import default_workers

    return default_workers(pairs)


@contextmanager
def _progress() -> Iterator[Progress]:
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


def _draw(run: "Run", plan: "Plan", workers: int, cluster: "Cluster | None" = None) -> None:
    import time

    from transformers.utils import logging as transformers_logging

    from baco.evaluation.sweep import sweep as draw

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    total = sum(len(job.prompts) for job in plan.jobs())
    with _progress() as progress:
        bar = progress.add_task("prompts × settings", total=total, rate="")
        started, said = time.monotonic(), 0

        def advance(prompts: int, tokens: int) -> None:
            nonlocal said
            said += tokens
            rate = f"{said / (time.monotonic() - started):.0f} tokens/s" if said else ""
            progress.update(bar, advance=prompts, rate=rate)
            if prompts and not tokens:
                progress.console.print(f"{prompts} of {total} were there: going on", style="dim")

        if cluster is None:
            draw(run, plan, workers, advance)
            return
        from baco.cluster.executor import cluster_pool

        with cluster.reached() as share:

            def processes(_: int, start: Any) -> Any:
                return cluster_pool(share, start)

            draw(run, plan, share.workers, advance, processes)


def _score(
    run: "Run", names: Sequence[str], models: Mapping[str, str], workers: int
) -> dict[str, str]:
    from baco.evaluation.score import score as measure
    from baco.evaluation.score import wanted

    metrics = wanted(run, names, models)
    total = sum(1 for _ in run.groups())
    with _progress() as progress:
        bars: dict[str, Any] = {}

        def advance(name: str, groups: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total, rate="")
            progress.update(bars[name], advance=groups)

        return measure(run, metrics, workers, advance, asked_by_name=bool(names))


def _export(run: "Run") -> None:
    from baco.evaluation.parquet import export

    export(run)


def _told(run: "Run", refused: Mapping[str, str], as_json: bool) -> None:
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
