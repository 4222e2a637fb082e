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
from baco.errors import UnfitPairError
from baco.source import Source

if TYPE_CHECKING:
    from baco.calibration.diagnose import Diagnosis, TextFigures

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

    Models with different tokenizers are compared word by word.

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
        baco = opt.load(models, weights, templates)
        opt.take_today(baco)
        questions = questions or default_prompts(baco)[:PROMPTS]
        baco.pair.renderer.render(questions[0])
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
    figures = Table("figure", "", "", box=box.SIMPLE, show_header=False)
    for name, value, picture in _figures(result):
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
    share, read = "base share at γ", "tokens"
    if result.shared_text is not None:
        share, read = "share of base words at γ", "words"
    shares = Table("router", share, box=box.SIMPLE)
    by_router: dict[str, list[str]] = {}
    for spelling, part in result.base_share.items():
        name, _, gamma = spelling.partition(":")
        by_router.setdefault(name, []).append(f"{gamma}: {part:.0%}" if gamma else f"{part:.0%}")
    for name, shares_at_gamma in by_router.items():
        shares.add_row(name, "   ".join(shares_at_gamma))
    console.print(shares, soft_wrap=False)
    console.print(
        Text.assemble(
            (result.verdict, _COLOURS[result.verdict]),
            f" for BACo ({result.prompts} prompts, {result.positions} {read} read by both)",
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
    if result.shared_text is not None:
        _show_shared_text(result.shared_text)
    for name, reason in result.left_out.items():
        console.print(f"left out: {name}: {reason}", style="dim", markup=False)


def _figures(result: "Diagnosis") -> list[tuple[str, float, str]]:
    """Names, values and bars."""
    text = result.shared_text
    next_one, unit = ("token", "") if text is None else ("word", f" per {result.unit}")
    rows = [
        (f"same next {next_one}", result.agreement, _bar(result.agreement)),
        *((f"  {role}", share, _bar(share)) for role, share in result.agreement_by_role.items()),
    ]
    if result.overlap is not None:
        rows.append(("overlap of distributions", result.overlap, _bar(result.overlap)))
    entropies: dict[Source, float] = {
        "base": result.entropy_base,
        "aligned": result.entropy_aligned,
    }
    longest = max(*entropies.values(), 1e-9)  # of the two bars
    for model, nats in entropies.items():
        rows.append((f"entropy of {model}, nats{unit}", nats, _bar(nats / longest)))
        if text is not None:
            rows.append(("  at word starts, nats per token", text.word_entropy[model], ""))
    return [
        *rows,
        ("gain from the prompt, nats per token", result.prompt_gain, ""),
        ("base ends its answers", result.base_ends, _bar(result.base_ends)),
        ("aligned ends its answers", result.aligned_ends, _bar(result.aligned_ends)),
        ("same spelling of the first token", result.first_token, _bar(result.first_token)),
        (f"time per {result.unit} over aligned alone", result.cost, ""),
    ]


def _show_shared_text(figures: "TextFigures") -> None:
    """Show what sharing a text costs the models."""
    seams = " and ".join(f"{share:.0%} for {model}" for model, share in figures.seams.items())
    out().print(
        f"text: {figures.encoding:.2%} of the time went into encoding, {figures.rolled_back} of "
        f"{figures.read} tokens read were rolled back, {figures.whole} texts were encoded from "
        f"their start; words that begin at a safe seam: {seams}",
        style="dim",
    )


def _show_unfit(pair: str, reason: str, as_json: bool) -> None:
    """Show the verdict on two models that cannot be a pair."""
    if as_json:
        print_json({"pair": pair, "verdict": "useless", "reasons": [reason]})
        return
    out().print(Text.assemble(("useless", _COLOURS["useless"]), " for BACo as it is"))
    out().print(f"- {reason}")


def _bar(share: float) -> str:
    return "█" * round(20 * share)
