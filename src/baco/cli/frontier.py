"""``baco diagnose --frontier``: whether a router gets beyond the aligned model's own sampling."""

from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.cli.progress import answering
from baco.cli.score import measure, models_by_role
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.evaluation.frontier import Frontier, Point
    from baco.evaluation.indicators import Estimate
    from baco.evaluation.plan import Plan
    from baco.evaluation.store import Run

SAMPLES = 4


@dataclass(frozen=True, slots=True)
class FrontierOptions:
    """The sweep of ``--frontier``."""

    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Sweep routers and the aligned model's own temperature and min-p, and say which "
            "to use.",
        ),
    ] = False
    router: Annotated[
        list[str] | None,
        typer.Option(
            "--router",
            "-r",
            help="With --frontier: a router over its thresholds, or at one of them; repeatable.",
            show_default="P-Punc, H-Punc, Rand",
        ),
    ] = None
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler",
            help="With --frontier: also run every router under this sampler, such as "
            "base_min_p:0.1 (see 'baco samplers'); repeatable.",
        ),
    ] = None
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            help="With --frontier: what judges quality, reference=ID_OR_FOLDER (a third language "
            "model) or reward=ID_OR_FOLDER; other roles as --model of 'baco sweep'.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="With --frontier: use only this many of the prompts."),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="With --frontier: directory of the run.",
            show_default="one in the user's cache",
        ),
    ] = None

    def check(self) -> None:
        """Check that nothing was given without ``--frontier``.

        Raises:
            BacoError: something was.
        """
        given = {
            "--router": self.router,
            "--sampler": self.sampler,
            "--judge": self.judge,
            "--limit": self.limit,
            "--out": self.output,
        }
        for name, value in given.items():
            if value is not None:
                raise BacoError(f"{name} belongs to --frontier: give both")


def frontier(
    models: opt.PairOptions,
    prompts: Path | None,
    samples: int,
    seed: int,
    max_tokens: int,
    search: FrontierOptions,
    loading: dict[str, Any],
    as_json: bool,
) -> None:
    """Draw the sweep, measure it, and show what it says."""
    from baco.calibration.store import home
    from baco.evaluation import frontier as finding
    from baco.evaluation.plan import PairSpec, Plan
    from baco.evaluation.report.load_scores import load_scores
    from baco.evaluation.score import check_metrics
    from baco.evaluation.store import begin
    from baco.models.known_pairs import choose_pair

    opt.quiet_libraries()
    named = models.arguments()
    known = choose_pair(**named)
    name = named["name"] or ("demo" if named["base"] is None else f"{known.base}+{known.aligned}")
    pair = PairSpec(name, loading)
    own_min_p = known.sampling.get("min_p", 0.0)
    settings = finding.settings(search.router or (), samples, own_min_p, search.sampler or ())
    judges = models_by_role("--judge", search.judge)
    task = finding.task(None if prompts is None else str(prompts), pair.name, search.limit)
    plan = Plan([pair], [task], settings, samples, seed, {"max_tokens": max_tokens})
    plan.check()
    plan.check_tokenizers()
    metrics = finding.metrics(task, judges, pair)
    check_metrics([*metrics.diversity, *metrics.quality], samples)
    where = search.output or home() / "frontier" / finding.run_name(plan, metrics, judges)
    run = begin(where, plan.config("baco diagnose --frontier"), {task.name: task.prompts})
    _draw(run, plan, max_tokens)
    refused = measure(run, [*metrics.diversity, *metrics.quality], judges, 1)
    for why in refused.values():
        note(why)
    (scores,) = load_scores(run)
    result = finding.read(scores, settings, samples)
    result.caveats.extend(metrics.caveats)
    if as_json:
        print_json({**asdict(result), "run": str(run.path)})
        return
    _show(result)
    note(f"run in {run.path}: 'baco report {run.path}' shows answers and plots")


def _draw(run: "Run", plan: "Plan", max_tokens: int) -> None:
    """Draw what is missing, after an estimate of the time."""
    from baco.evaluation.frontier import seconds
    from baco.evaluation.sweep import Drawer, LoadedExecutor, resume, sweep
    from baco.files import locked

    with locked(run.path):
        jobs = resume(run, plan)
    drawer = Drawer()
    prompts, total = len(plan.tasks[0].prompts), sum(len(job.prompts) for job in plan.jobs())
    if jobs:
        note(
            f"{prompts} prompts × {plan.n} answers × {len(plan.settings)} settings, up to "
            f"{max_tokens} tokens each"
        )
        left = timedelta(seconds=round(seconds(drawer, jobs, max_tokens)))
        note(f"drawing them takes {left} at most; it can be stopped, the same command continues")
    with answering("prompts × settings", total) as bar:
        sweep(run, plan, LoadedExecutor(drawer), bar)


def _show(result: "Frontier") -> None:
    metrics = list(result.points[0].figures)
    # Headings are broken into lines, figures are not.
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("setting", no_wrap=True)
    for name in (*metrics, "base share"):
        table.add_column(name, overflow="fold", justify="right", min_width=5)
    table.add_column("lead", no_wrap=True, min_width=20)
    best: dict[str, Point] = {}
    for point in result.points:
        if point.lead is not None and (
            point.method not in best or point.lead.value > _lead(best[point.method])
        ):
            best[point.method] = point
    for point in result.points:
        if point.lead is None or best[point.method] is point:
            share = "" if point.base_share is None else f"{point.base_share:.2f}"
            shown = "" if point.lead is None else _interval(point.lead, 2)
            figures = [f"{point.figures[name]:.2f}" for name in metrics]
            table.add_row(*map(Text, (point.setting, *figures, share, shown)))
    console = out()
    console.print(table, soft_wrap=False)
    lead = result.lead
    console.print(
        "Lead: how far a router's setting is beyond the front of the aligned model's settings, on "
        "scales from 0 (worst setting) to 1 (best), with a 95% interval over prompts. Of every "
        "router its best setting."
    )
    console.print(
        f"Best router chosen on one half of the {result.prompts} prompts, tested on the other: "
        f"{' and '.join(dict.fromkeys(result.chosen))}, lead "
        f"{lead.difference:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}], p {lead.p_value:.2g}."
    )
    if len(result.by_space) > 1:
        spaces = "; ".join(f"{name} {_interval(own)}" for name, own in result.by_space.items())
        console.print(f"{result.router}, by metric: {spaces}.")
    for caveat in result.caveats:
        console.print(f"- {caveat}")
    console.print(Text(result.advice, style="bold"))
    console.print(Text(f"  {result.command}"))


def _lead(point: "Point") -> float:
    assert point.lead is not None
    return point.lead.value


def _interval(lead: "Estimate", digits: int = 3) -> str:
    value, low, high = (f"{part:+.{digits}f}" for part in (lead.value, lead.low, lead.high))
    return f"{value} [{low}, {high}]"
