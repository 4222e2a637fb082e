"""``baco sweep``: run methods on tasks into a directory."""

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from baco.backends import RAY
from baco.cli import options as opt
from baco.cli.console import out as console_out
from baco.cli.console import print_json
from baco.cli.progress import answering
from baco.cli.score import MetricOptions, Workers, conclude, count_processes, measure
from baco.errors import BacoError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from baco.batch.ray_cluster import Cluster
    from baco.evaluation.methods.judge import Judge
    from baco.evaluation.plan import PairSpec, Plan
    from baco.evaluation.store import Run
    from baco.evaluation.tasks import Task


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What is run on what."""

    pair: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            "-p",
            help="Short name, folder, or BASE+ALIGNED; repeatable.",
            show_default="demo",
        ),
    ] = None
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="A task's name, NAME=PATH for a local copy of its data, or a file of prompts "
            "(.jsonl, .csv, .parquet, .txt); repeatable.",
            show_default="demo",
        ),
    ] = None
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="routers, base, aligned, mixing, ensemble, prompting, …, or a file of answers.",
        ),
    ] = None
    router: Annotated[
        list[str] | None,
        typer.Option(
            "--router", "-r", help="P-Punc sweeps its threshold, P-Punc:0.4 takes this one."
        ),
    ] = None
    n: Annotated[int, typer.Option("--n", "-n", help="Samples per prompt.")] = 10
    limit: Annotated[
        int | None, typer.Option("--limit", help="Use only this many prompts of every task.")
    ] = None
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of all draws.")] = 0
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help="full; quick: fewer operating points; or paper: the paper's two pairs, three "
            "tasks and methods, unless others are named.",
        ),
    ] = "full"

    def plan(
        self, judge: "Judge | None", loading: dict[str, Any], sampling: dict[str, Any]
    ) -> "Plan":
        """The plan without its tasks, which need data.

        Raises:
            BacoError: anything in it that is wrong.
        """
        from baco.evaluation.methods import Grid, select_settings
        from baco.evaluation.plan import PairSpec, Plan
        from baco.evaluation.presets import preset

        chosen = preset(self.preset)
        named = (self.method or (), self.router or ())
        methods, routers = named if any(named) else (chosen.methods, chosen.routers)
        settings = select_settings(methods, routers, Grid(chosen.size, self.n), judge)
        pairs = [PairSpec(name, loading) for name in self.pair or chosen.pairs]
        plan = Plan(pairs, [], settings, self.n, self.seed, sampling)
        plan.check()
        return plan

    def task_names(self) -> list[str]:
        """The spellings of the tasks, the preset's where none is named."""
        from baco.evaluation.presets import preset

        return preset(self.preset).tasks_with(self.task)

    def tasks(self) -> "list[Task]":
        """The tasks with their prompts; errors as for `load_task`."""
        from baco.evaluation.tasks import load_task

        return [load_task(name, self.limit) for name in self.task_names()]


@dataclass(frozen=True, slots=True)
class SweepSampling:
    """Sampling parameters in place of each pair's own."""

    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 takes the most likely token.")
    ] = None
    top_p: opt.TopP = None
    min_p: opt.MinP = None
    sampler: opt.Samplers = None
    max_tokens: opt.MaxTokens = None

    def settings(self) -> dict[str, Any]:
        """Keywords of :class:`baco.SamplingParams` that were given."""
        values = asdict(self)
        values["samplers"] = values.pop("sampler")
        return opt.given(values)


@dataclass(frozen=True, slots=True)
class JudgeOptions:
    """The external model of Judge routing."""

    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url",
            help="OpenAI-compatible endpoint of the judge; adds Judge routing to the run.",
        ),
    ] = None
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", help="Name of the judge's model at that endpoint."),
    ] = None

    def judge(self) -> "Judge | None":
        """The judge; None where none is named.

        Raises:
            BacoError: only one of the two options was given.
        """
        if self.judge_url is None and self.judge_model is None:
            return None
        if self.judge_url is None or self.judge_model is None:
            raise BacoError("a judge needs both: give --judge-url and --judge-model")
        from baco.evaluation.methods.judge import Judge

        return Judge(self.judge_url, self.judge_model)


@opt.grouped(without=["draft", "memory"])
def sweep(
    *,
    context: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's directory.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print all that would be run, and how many answers and tokens; load and fetch "
            "nothing.",
        ),
    ] = False,
    options: PlanOptions,
    metrics: MetricOptions,
    scoring: Annotated[
        bool, typer.Option("--score/--no-score", help="Measure after the samples are drawn.")
    ] = True,
    sampling: SweepSampling,
    judging: JudgeOptions,
    workers: Workers = None,
    backend: Annotated[
        str, typer.Option("--backend", help="Where samples are drawn: local, or ray (a cluster).")
    ] = "local",
    address: opt.Address = None,
    tokenizers: opt.TokenizerOptions,
    weights: opt.WeightOptions,
    templates: opt.TemplateOptions,
    as_json: opt.AsJson = False,
) -> None:
    """Draw every method's samples on every task, and measure their diversity and quality.

    It can be stopped at any moment: the same command continues, and the samples are the same as
    without a stop. All results are in the run's directory; 'baco report' shows them.
    """
    from baco.evaluation.metrics import names
    from baco.evaluation.score import check_metrics, check_verifiable
    from baco.evaluation.store import begin

    scorers = metrics.models()
    cluster = _cluster(backend, address, workers, weights.device)
    # What needs no data and no model is checked first.
    plan = options.plan(
        judging.judge(),
        opt.load_arguments(tokenizers, weights, templates),
        sampling.settings(),
    )
    if scoring:
        check_metrics(metrics.names or names(), plan.n)
    if dry_run:
        _outline(plan, options, metrics, scoring, as_json)
        return
    if out is None:
        raise BacoError("give --out, the run's directory, or --dry-run to see what would be run")
    count = count_processes(workers if cluster is None else None, plan.pairs)
    plan = replace(plan, pairs=_with_backends(plan.pairs, out), tasks=options.tasks())
    if scoring:
        check_verifiable(metrics.names, [t.verifier for t in plan.tasks if t.verifier])
    plan.check()
    opt.quiet_libraries()
    plan.check_tokenizers()
    command = shlex.join(["baco", *context.obj])
    run = begin(out, plan.config(command), {task.name: task.prompts for task in plan.tasks})
    _draw(run, plan, count, cluster)
    refused = measure(run, metrics.names, scorers, count) if scoring else {}
    conclude(run, refused, as_json)


def _outline(
    plan: "Plan", options: PlanOptions, metrics: MetricOptions, scoring: bool, as_json: bool
) -> None:
    """Print what the sweep would run."""
    from baco.evaluation.metrics import names
    from baco.evaluation.outline import outline

    chosen = (metrics.names or names()) if scoring else ()
    planned = outline(plan, options.task_names(), options.limit, chosen, metrics.models())
    if as_json:
        print_json(planned)
        return
    console = console_out()
    for pair in planned["pairs"]:
        console.print(Text(f"pair    {pair['name']}: {pair['base']} + {pair['aligned']}"))
    for task in planned["tasks"]:
        prompts = "all" if task["prompts"] is None else f"{task['prompts']:,}"
        longest = f"up to {task['max_tokens']:,} tokens" if task["max_tokens"] else "pair's length"
        console.print(
            Text(f"task    {task['name']}: {prompts} prompts, {longest}, {task['source']}")
        )
    for method, labels in planned["methods"].items():
        console.print(Text(f"method  {method}: {', '.join(labels)}"))
    for metric in planned["metrics"]:
        models = ", ".join(f"{role}={name}" for role, name in metric["models"].items())
        console.print(Text(f"metric  {metric['name']}{f' ({models})' if models else ''}"))
    sampling = "".join(f", {name} {value}" for name, value in planned["sampling"].items())
    console.print(Text(f"draws   {plan.n} samples a prompt, seed {plan.seed}{sampling}"))
    size = (
        f"{len(plan.pairs)} pairs × {len(planned['tasks'])} tasks × {planned['settings']} settings"
    )
    answers = "as many answers as the tasks have prompts"
    if planned["answers"] is not None:
        answers = f"{planned['answers']:,} answers in {planned['jobs']:,} jobs"
    if planned["most_tokens"] is not None:
        answers += f", {planned['most_tokens']:,} tokens at most"
    console.print(Text(f"total   {size}: {answers}"))


def _with_backends(pairs: "Sequence[PairSpec]", out: Path) -> "list[PairSpec]":
    """The pairs with the backend of GGUF files, which a run that was begun keeps."""
    from baco.evaluation.store import Run

    begun = {}
    if (out / "run.json").exists():
        begun = {pair["name"]: pair["options"] for pair in Run.open(out).config["pairs"]}
    return [pair.with_backend(begun.get(pair.name, {}).get("backend")) for pair in pairs]


def _cluster(
    backend: str, address: str | None, workers: int | None, device: str | None
) -> "Cluster | None":
    if backend == RAY:
        return opt.cluster(address, workers, device)
    if backend != "local":
        raise BacoError(f"backend is {backend!r}: a sweep draws on local or ray")
    if address is not None:
        raise BacoError("--address is of a cluster: give --backend ray with it")
    return None


def _draw(run: "Run", plan: "Plan", workers: int, cluster: "Cluster | None") -> None:
    from baco.batch.job import processes
    from baco.evaluation import sweep as drawing

    with answering("prompts × settings", sum(len(job.prompts) for job in plan.jobs())) as bar:
        if cluster is None:
            drawing.sweep(run, plan, processes(workers), bar)
            return
        from baco.batch.ray_executor import RayExecutor

        with cluster.reached() as share:
            drawing.sweep(run, plan, RayExecutor(share), bar)
