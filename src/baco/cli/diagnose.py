"""``baco diagnose``: measure whether a pair suits BACo."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from baco.cli import options as opt
from baco.cli.calibrate import PromptFile, default_prompts, read_prompts
from baco.cli.console import err, out, print_json
from baco.errors import UnfitPairError

if TYPE_CHECKING:
    from baco.calibration.diagnose import Diagnosis

PROMPTS = 12
_COLOURS = {"good": "bold green", "doubtful": "bold yellow", "useless": "bold red"}


@opt.grouped(without=["compile"])
def diagnose(
    *,
    models: opt.PairOptions,
    prompts: PromptFile = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Answers of each model to a prompt.")
    ] = 2,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the answers.")] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Longest answer, in tokens.")
    ] = 64,
    as_json: opt.AsJson = False,
    weights: opt.WeightOptions,
    templates: opt.TemplateOptions,
) -> None:
    """Measure where two models agree, what routers would do, and whether the pair suits BACo."""
    from baco.calibration.diagnose import ANSWERERS, check_prompts
    from baco.calibration.diagnose import diagnose as examine

    asked = None if prompts is None else read_prompts(prompts)
    if asked is not None:
        check_prompts(asked)
    try:
        baco = opt.load(models, weights, templates)
        opt.take_today(baco)
        asked = asked or default_prompts(baco)[:PROMPTS]
        baco.pair.renderer.render(asked[0])
    except UnfitPairError as error:
        _show_unfit(models.pair or f"{models.base} + {models.aligned}", str(error), as_json)
        return
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=len(ANSWERERS) + len(asked))
        found = examine(
            baco,
            asked,
            samples=samples,
            seed=seed,
            max_tokens=max_tokens,
            advance=lambda: progress.advance(task),
        )
    if as_json:
        print_json(asdict(found))
    else:
        _show(found)


def _show(found: "Diagnosis") -> None:
    console = out()
    nats = max(found.entropy_base, found.entropy_aligned, 1e-9)  # the longer of the two bars
    figures = Table("figure", "", "", box=box.SIMPLE, show_header=False)
    rows = (
        ("same next token", found.agreement, _bar(found.agreement)),
        *((f"  {role}", share, _bar(share)) for role, share in found.agreement_by_role.items()),
        ("overlap of distributions", found.overlap, _bar(found.overlap)),
        ("entropy of base, nats", found.entropy_base, _bar(found.entropy_base / nats)),
        ("entropy of aligned, nats", found.entropy_aligned, _bar(found.entropy_aligned / nats)),
        ("likelier after its prompt, nats", found.prompt_gain, ""),
        ("base ends its answers", found.base_ends, _bar(found.base_ends)),
        ("aligned ends its answers", found.aligned_ends, _bar(found.aligned_ends)),
        ("same spelling of the first token", found.first_token, _bar(found.first_token)),
        ("time per token over aligned alone", found.cost, ""),
    )
    for name, value, picture in rows:
        figures.add_row(name, f"{value:.2f}", picture)
    console.print(figures, soft_wrap=False)
    if found.partings:
        partings = Table(box=box.SIMPLE)
        for heading in ("where they part", "base would say", "aligned would say"):
            partings.add_column(heading)
        partings.add_column("times", justify="right")
        for p in found.partings:
            row = (p["role"], repr(p["base"]), repr(p["aligned"]), str(p["times"]))
            partings.add_row(*(Text(cell) for cell in row))
        console.print(partings, soft_wrap=False)
    shares = Table("router", "base share at γ", box=box.SIMPLE)
    by_router: dict[str, list[str]] = {}
    for spelling, share in found.base_share.items():
        name, _, gamma = spelling.partition(":")
        by_router.setdefault(name, []).append(f"{gamma}: {share:.0%}" if gamma else f"{share:.0%}")
    for name, shares_at_gamma in by_router.items():
        shares.add_row(name, "   ".join(shares_at_gamma))
    console.print(shares, soft_wrap=False)
    console.print(
        Text.assemble(
            (found.verdict, _COLOURS[found.verdict]),
            f" for BACo ({found.prompts} prompts, {found.positions} tokens read by both)",
        )
    )
    for reason in found.reasons:
        console.print(f"- {reason}")
    for half, held in found.weights.items():
        console.print(f"{half}: {held}; read by {found.forwards[half]}", style="dim")


def _show_unfit(pair: str, reason: str, as_json: bool) -> None:
    """Show the verdict on two models that cannot be a pair."""
    if as_json:
        print_json({"pair": pair, "verdict": "useless", "reasons": [reason]})
        return
    out().print(Text.assemble(("useless", _COLOURS["useless"]), " for BACo as it is"))
    out().print(f"- {reason}")


def _bar(share: float) -> str:
    return "█" * round(20 * share)
