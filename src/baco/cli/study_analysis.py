"""The commands of ``baco study`` that need no raters' page: power, simulate, report."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.cli.report import check_libraries
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.study.plan import Plan
    from baco.study.power import ContrastPower
    from baco.study.simulation import Population
    from baco.study.store import Judgment

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="The directory of a study.")]


@dataclass(frozen=True, slots=True)
class PopulationOptions:
    """The raters of a simulation; spreads are standard deviations in log odds."""

    effect: Annotated[
        float,
        typer.Option(
            "--effect",
            help="Win rate of the method under test in every contrast of superiority; 0.5 is no "
            "effect.",
        ),
    ] = 0.6
    rater_spread: Annotated[
        float,
        typer.Option("--rater-spread", help="How much raters differ in which method they like."),
    ] = 0.6
    prompt_spread: Annotated[
        float,
        typer.Option("--prompt-spread", help="How much prompts differ in which method is better."),
    ] = 1.5
    ties: Annotated[
        float, typer.Option("--ties", help="Share of ties between equally good answers.")
    ] = 0.25
    noise: Annotated[
        float, typer.Option("--noise", help="Factor on the randomness of single judgments.")
    ] = 1.0

    def population(self) -> "Population":
        """The population with these options."""
        from baco.study.simulation import Population

        return Population(
            effect=self.effect,
            rater_spread=self.rater_spread,
            prompt_spread=self.prompt_spread,
            ties=self.ties,
            noise=self.noise,
        )


@opt.grouped()
def power(
    *,
    study: StudyPath,
    population: PopulationOptions,
    pilot: Annotated[
        Path | None,
        typer.Option(
            "--pilot",
            help="A study with judgments: spreads and ties are estimated from it instead.",
        ),
    ] = None,
    excluded: Annotated[
        float, typer.Option("--excluded", help="Share of raters who will be excluded.")
    ] = 0.1,
    studies: Annotated[int, typer.Option("--studies", help="Number of simulated studies.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed of the simulation.")] = 0,
    as_json: opt.AsJson = False,
) -> None:
    """Simulate the power of the planned contrasts, and how many judgments each of them needs.

    Power is the share of simulated studies that support a contrast, after Holm's correction over
    all planned contrasts. For equivalence the methods are assumed to be equal.
    """
    _check_scipy()
    from rich.table import Table

    from baco.study.power import pilot_population, planned_power
    from baco.study.study import Study

    with closing(Study.open(study)) as opened:
        plan = opened.plan
    drawn_from = population.population()
    if pilot is not None:
        drawn_from = pilot_population(*_judged(pilot), drawn_from)
        note(
            f"from the pilot: rater spread {drawn_from.rater_spread:.2f}, prompt spread "
            f"{drawn_from.prompt_spread:.2f}, ties {drawn_from.ties:.0%}"
        )
    powers = planned_power(plan, drawn_from, excluded=excluded, studies=studies, seed=seed)
    if as_json:
        print_json(
            {
                "effect": drawn_from.effect,
                "target": plan.analysis.power,
                "contrasts": [
                    {
                        "id": p.contrast.id,
                        "judgments": p.judgments,
                        "power": p.power,
                        "power_uncorrected": p.alone,
                        "sufficient": p.sufficient(plan),
                        "raters_needed": p.raters_needed,
                        "judgments_needed": p.judgments_needed,
                        "prompts_needed": p.prompts_needed,
                    }
                    for p in powers
                ],
            }
        )
    else:
        table = Table(box=None)
        table.add_column("contrast")
        for name in ("planned", "power", "alone", "needs", "raters", "or prompts"):
            table.add_column(name, justify="right")
        for p in powers:
            table.add_row(
                p.contrast.id,
                str(p.judgments),
                f"{p.power:.0%}",
                f"{p.alone:.0%}",
                *(_number(n) for n in (p.judgments_needed, p.raters_needed, p.prompts_needed)),
            )
        out().print(table)
        note(
            "planned, needs: judgments; power: with Holm's correction, alone: without. For "
            f"{plan.analysis.power:.0%} a contrast needs these raters with the planned prompts, or "
            "these prompts with the planned raters"
        )
    for p in powers:
        if not p.sufficient(plan):
            note(f"warning: {p.contrast.id} has a power of {p.power:.0%}: {_advice(p)}")


def _number(needed: int | None) -> str:
    return "–" if needed is None else str(needed)


def _advice(p: "ContrastPower") -> str:
    raters = "more raters alone are not sufficient"
    if p.raters_needed is not None:
        raters = f"plan {p.raters_needed} raters"
    if p.prompts_needed is None:
        return f"{raters}; expect a larger effect, or plan more of both raters and prompts"
    return f"{raters}, or {p.prompts_needed} prompts with the raters planned"


@opt.grouped()
def simulate(
    *,
    study: StudyPath,
    raters: Annotated[int, typer.Option("--raters", help="Number of simulated raters.")] = 24,
    population: PopulationOptions,
    side: Annotated[
        float, typer.Option("--side", help="Preference of all for the left side, in log odds.")
    ] = 0.0,
    lazy: Annotated[
        float, typer.Option("--lazy", help="Share of raters who answer without reading.")
    ] = 0.0,
    slips: Annotated[
        float, typer.Option("--slips", help="Share of checks that attentive raters fail.")
    ] = 0.03,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed of all answers.")] = 0,
    as_json: opt.AsJson = False,
) -> None:
    """Let simulated raters answer a study, to try it before people do.

    They answer the items of their schedules in order, into the store where people's answers go. All
    outputs of the study then say that raters are simulated; people cannot join it any more.
    """
    _check_scipy()
    from baco.study.simulation import simulate as simulate_raters
    from baco.study.study import Study

    drawn_from = replace(population.population(), side=side, lazy=lazy, slips=slips)
    with closing(Study.open(study)) as opened:
        added = simulate_raters(opened, raters, drawn_from, seed)
    if as_json:
        print_json({"simulated": True, "raters": added})
        return
    note(f"{len(added)} SIMULATED raters answered {study}; no figure of it is a human result")
    note(f"next: baco study report {study}")


@opt.grouped()
def report(
    *,
    study: StudyPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to.  [default: STUDY/report]"),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="The run that the answers come from, for automatic metrics."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A metric's model, as ROLE=ID_OR_FOLDER, as in baco score."),
    ] = None,
    metrics: Annotated[
        bool, typer.Option(help="Compare automatic metrics of the shown answers with raters.")
    ] = True,
    as_json: opt.AsJson = False,
) -> None:
    """Analyse the judgments as the plan says, and write the report.

    index.html is one page that needs no network; report.md, results.json, tables/*.csv and
    plots/*.svg and *.png hold the same.
    """
    _check_scipy()
    check_libraries()
    from baco.cli.score import MetricOptions
    from baco.evaluation.store import Run
    from baco.study.study import Study
    from baco.study.study_report import as_json as results_as_json
    from baco.study.study_report import write_study_report

    opt.quiet_libraries()
    models = MetricOptions(model=model).models()
    with closing(Study.open(study)) as opened:
        written = write_study_report(
            opened, output, None if run is None else Run.open(run), models, metrics=metrics
        )
    if as_json:
        results = results_as_json(written.results, written.findings)
        print_json({"page": str(written.page), **results})
        return
    if written.findings.warning:
        out().print(written.findings.warning)
    for line in written.findings.outcomes:
        out().print(line)
    note(f"report in {written.page}")


def _check_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise BacoError(
            "this command needs scipy: install it with pip install 'baco[evaluation]'"
        ) from error


def _judged(path: Path) -> "tuple[Plan, list[Judgment]]":
    """The plan and the kept judgments of another study."""
    from baco.study.exclusions import exclude
    from baco.study.study import Study

    with closing(Study.open(path)) as opened:
        kept, _ = exclude(opened.plan, list(opened.judgments()))
    return opened.plan, kept
