"""``baco sweep``: run methods on tasks into a directory."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from baco.backends import RAY
from baco.cli import options as opt
from baco.cli.cluster import Address, named_cluster
from baco.cli.progress import answering
from baco.cli.score import Metrics, Models, Workers, conclude, measure, models, processes
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.batch.ray_cluster import Cluster
    from baco.evaluation.methods.judge import Judge
    from baco.evaluation.plan import Plan
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
    template_arg: opt.TemplateArguments = None,
    date: opt.Date = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    as_json: opt.AsJson = False,
) -> None:
    """Draw every method's samples on every task, and measure their diversity and quality.

    Stop it at any moment: the same command goes on where it was, and the samples are the same as if
    it had never been stopped. Everything is kept in the run's directory; 'baco report' draws it.
    """
    from baco.evaluation.methods import Grid, select_settings
    from baco.evaluation.metrics import names
    from baco.evaluation.plan import PairSpec, Plan
    from baco.evaluation.score import check_metrics, check_verifiable
    from baco.evaluation.store import begin
    from baco.evaluation.tasks import load_task

    scorers = models(model or ())
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
            "template_args": opt.template_arguments(template_arg),
            "date": opt.day(date),
            "trust_remote_code": trust_remote_code,
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
        check_metrics(metric or names(), n)
    count = processes(workers if cluster is None else None, pairs)
    tasks = [load_task(name, limit) for name in task or ["demo"]]
    if scoring:
        check_verifiable(metric or (), [t.verifier for t in tasks if t.verifier])
    plan = Plan(pairs, tasks, settings, n, seed, sampling)
    plan.check()
    command = shlex.join(["baco", *context.obj])
    run = begin(out, plan.config(command), {task.name: task.prompts for task in tasks})
    _draw(run, plan, count, cluster)
    refused = measure(run, metric or (), scorers, count) if scoring else {}
    conclude(run, refused, as_json)


def _judge(url: str | None, model: str | None) -> "Judge | None":
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise BacoError("a judge needs both: give --judge-url and --judge-model")
    from baco.evaluation.methods.judge import Judge

    return Judge(url, model)


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


def _draw(run: "Run", plan: "Plan", workers: int, cluster: "Cluster | None" = None) -> None:
    from baco.evaluation import sweep as drawing

    opt.hush()
    with answering("prompts × settings", sum(len(job.prompts) for job in plan.jobs())) as bar:

        def advance(prompts: int, tokens: int) -> None:
            if tokens:
                bar.advance(prompts, tokens)
            else:
                bar.skip(prompts)

        if cluster is None:
            drawing.sweep(run, plan, workers, advance)
            return
        from baco.batch.ray_executor import cluster_pool

        with cluster.reached() as share:

            def processes(_: int, start: Any) -> Any:
                return cluster_pool(share, start)

            drawing.sweep(run, plan, share.workers, advance, processes)
