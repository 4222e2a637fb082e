"""``baco diagnose``: measure whether a pair suits BACo."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from baco.cli import options as opt
from baco.cli.calibrate import PromptFile, default_prompts, read_prompts
from baco.cli.console import out, print_json
from baco.cli.frontier import SAMPLES, FrontierOptions, frontier
from baco.cli.progress import steps
from baco.errors import BacoError, DifferentTokenizersError, UnfitPairError

if TYPE_CHECKING:
    from baco.calibration.diagnose import Diagnosis

PROMPTS = 12
_COLOURS = {"good": "bold green", "doubtful": "bold yellow", "useless": "bold red"}


@opt.grouped(without=["compile", "enable_prefix_caching"])
def diagnose(
    *,
    models: opt.PairOptions,
    prompts: PromptFile = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            "-n",
            min=1,
            help="Answers to a prompt.",
            show_default="2, with --frontier 4",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the answers.")] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Longest answer, in tokens.")
    ] = 64,
    search: FrontierOptions,
    as_json: opt.AsJson = False,
    weights: opt.WeightOptions,
    templates: opt.TemplateOptions,
) -> None:
    """Measure where two models agree, what routers would do, and whether the pair suits BACo.

    With --frontier: a small sweep that says whether a router gets beyond the aligned model's own
    temperature and min-p on your prompts, and which, or which temperature to use without BACo. It
    can be stopped at any moment; the same command continues.
    """
    if search.frontier:
        loading = opt.load_arguments(weights, templates)
        frontier(models, prompts, samples or SAMPLES, seed, max_tokens, search, loading, as_json)
        return
    search.check()
    from baco.calibration.diagnose import ANSWERERS, check_prompts
    from baco.calibration.diagnose import diagnose as examine

    questions = None if prompts is None else read_prompts(prompts)
    if questions is not None:
        check_prompts(questions)
    try:
        baco = opt.load(models, weights, templates, separate_tokenizers=False)
        opt.take_today(baco)
        questions = questions or default_prompts(baco)[:PROMPTS]
        baco.pair.renderer.render(questions[0])
    except DifferentTokenizersError as error:
        raise BacoError(f"{error}, or measure this pair with --frontier") from error
    except UnfitPairError as error:
        name, base, aligned = models.arguments().values()
        _show_unfit(name or f"{base} + {aligned}", str(error), as_json)
        return
    with steps("reading", len(ANSWERERS) + len(questions)) as advance:
        diagnosis = examine(
            baco,
            questions,
            samples=samples or 2,
            seed=seed,
            max_tokens=max_tokens,
            advance=advance,
        )
    if as_json:
        print_json(asdict(diagnosis))
    else:
        _show(diagnosis)


def _show(result: "Diagnosis") -> None:
    console = out()
    nats = max(result.entropy_base, result.entropy_aligned, 1e-9)  # the longer of the two bars
    figures = Table("figure", "", "", box=box.SIMPLE, show_header=False)
    rows = (
        ("same next token", result.agreement, _bar(result.agreement)),
        *((f"  {role}", share, _bar(share)) for role, share in result.agreement_by_role.items()),
        ("overlap of distributions", result.overlap, _bar(result.overlap)),
        ("entropy of base, nats", result.entropy_base, _bar(result.entropy_base / nats)),
        ("entropy of aligned, nats", result.entropy_aligned, _bar(result.entropy_aligned / nats)),
        ("gain from the prompt, nats per token", result.prompt_gain, ""),
        ("base ends its answers", result.base_ends, _bar(result.base_ends)),
        ("aligned ends its answers", result.aligned_ends, _bar(result.aligned_ends)),
        ("same spelling of the first token", result.first_token, _bar(result.first_token)),
        ("time per token over aligned alone", result.cost, ""),
    )
    for name, value, picture in rows:
        figures.add_row(name, f"{value:.2f}", picture)
    console.print(figures, soft_wrap=False)
    if result.partings:
        partings = Table(box=box.SIMPLE)
        for heading in ("where they part", "base would say", "aligned would say"):
            partings.add_column(heading)
        partings.add_column("times", justify="right")
        for p in result.partings:
            row = (p["role"], repr(p["base"]), repr(p["aligned"]), str(p["times"]))
            partings.add_row(*(Text(cell) for cell in row))
        console.print(partings, soft_wrap=False)
    shares = Table("router", "base share at γ", box=box.SIMPLE)
    by_router: dict[str, list[str]] = {}
    for spelling, share in result.base_share.items():
        name, _, gamma = spelling.partition(":")
        by_router.setdefault(name, []).append(f"{gamma}: {share:.0%}" if gamma else f"{share:.0%}")
    for name, shares_at_gamma in by_router.items():
        shares.add_row(name, "   ".join(shares_at_gamma))
    console.print(shares, soft_wrap=False)
    console.print(
        Text.assemble(
            (result.verdict, _COLOURS[result.verdict]),
            f" for BACo ({result.prompts} prompts, {result.positions} tokens read by both)",
        )
    )
    for reason in result.reasons:
        console.print(f"- {reason}")
    for source, weights in result.weights.items():
        times = " and ".join(
            f"{ms:.3g} ms for {rows} row{'s' if rows != '1' else ''}"
            for rows, ms in result.forward_ms[source].items()
        )
        forward = f"read by {result.forwards[source]}: {times}"
        console.print(f"{source}: {weights}; {forward}", style="dim")
    console.print(f"both: {result.sharing}", style="dim")


def _show_unfit(pair: str, reason: str, as_json: bool) -> None:
    """Show the verdict on two models that cannot be a pair."""
    if as_json:
        print_json({"pair": pair, "verdict": "useless", "reasons": [reason]})
        return
    out().print(Text.assemble(("useless", _COLOURS["useless"]), " for BACo as it is"))
    out().print(f"- {reason}")


def _bar(share: float) -> str:
    return "█" * round(20 * share)
