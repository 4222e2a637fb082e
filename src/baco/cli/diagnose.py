"""``baco diagnose``: is this pair any good for BACo, before an hour is spent?"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from baco import BacoError
from baco.cli import options as opt
from baco.cli.calibrate import PromptFile, default_prompts, read_prompts
from baco.cli.console import err, out, print_json

if TYPE_CHECKING:
    from baco.diagnose import Diagnosis

PROMPTS = 12
_COLOURS = {"good": "bold green", "doubtful": "bold yellow", "useless": "bold red"}


def diagnose(
    pair: opt.PairName = None,
    base: opt.BaseName = None,
    aligned: opt.AlignedName = None,
    prompts: PromptFile = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Answers of each model to a prompt.")
    ] = 2,
    seed: Annotated[int, typer.Option("--seed", "-s")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens")] = 64,
    as_json: opt.AsJson = False,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    base_template: opt.BaseTemplate = None,
    chat_template: opt.ChatTemplate = None,
) -> None:
    """Tell where two models agree and part, what routers would do, and whether the pair is good."""
    from baco.diagnose import diagnose as examine

    asked = None if prompts is None else read_prompts(prompts)
    if asked is not None and len(asked) < 2:
        raise BacoError("diagnosing takes at least 2 prompts: each is the other's control")
    baco = opt.load(
        pair,
        base,
        aligned,
        dtype=dtype,
        device=device,
        base_template=base_template,
        chat_template=chat_template,
    )
    asked = asked or default_prompts(baco)[:PROMPTS]
    console = err()
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=len(asked))
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
    figures = Table("figure", "", "", box=box.SIMPLE, show_header=False)
    rows = (
        ("same next token", found.agreement, _bar(found.agreement)),
        *((f"  {role}", share, _bar(share)) for role, share in found.agreement_by_role.items()),
        ("overlap of distributions", found.overlap, _bar(found.overlap)),
        ("entropy of base, nats", found.entropy_base, ""),
        ("entropy of aligned, nats", found.entropy_aligned, ""),
        ("likelier after its prompt, nats", found.prompt_gain, ""),
        ("base ends its answers", found.base_ends, _bar(found.base_ends)),
        ("same spelling of the first token", found.first_token, _bar(found.first_token)),
        ("time per token over aligned alone", found.cost, ""),
    )
    for name, value, picture in rows:
        figures.add_row(name, f"{value:.2f}", picture)
    console.print(figures, soft_wrap=False)
    if found.partings:
        told = ", ".join(f"{p['base']!r} / {p['aligned']!r} ×{p['times']}" for p in found.partings)
        console.print(f"  Where they part most (base / aligned): {told}\n")
    shares = Table("router", "base share at γ", box=box.SIMPLE)
    by_router: dict[str, list[str]] = {}
    for spelling, share in found.base_share.items():
        name, _, gamma = spelling.partition(":")
        by_router.setdefault(name, []).append(f"{gamma}: {share:.0%}")
    for name, told_shares in by_router.items():
        shares.add_row(name, "   ".join(told_shares))
    console.print(shares, soft_wrap=False)
    console.print(
        Text.assemble(
            (found.verdict, _COLOURS[found.verdict]),
            f" for BACo ({found.prompts} prompts, {found.positions} tokens read by both)",
        )
    )
    for reason in found.reasons:
        console.print(f"- {reason}")


def _bar(share: float) -> str:
    return "█" * round(20 * share)
