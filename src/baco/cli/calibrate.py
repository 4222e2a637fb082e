"""``baco calibrate``: find the threshold for a diversity, and save the curve."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from baco.cli import options as opt
from baco.cli.console import note, out, print_json
from baco.cli.progress import steps
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.calibration.store import Curve

PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="Prompts to measure on: JSONL, CSV, Parquet, or text with one on each line.",
    ),
]


@opt.grouped(without=["compile", "enable_prefix_caching"])
def calibrate(
    *,
    models: opt.PairOptions,
    router: Annotated[
        str, typer.Option("--router", "-r", help="A router without its threshold.")
    ] = "P-Punc",
    diversity: Annotated[
        float | None,
        typer.Option("--diversity", "-d", help="Print the threshold at this diversity, 0 to 1."),
    ] = None,
    base_share: Annotated[
        float | None,
        typer.Option("--base-share", help="Print the threshold at this share of base tokens."),
    ] = None,
    prompts: PromptFile = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers per prompt.")] = 8,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Seed of the answers.")] = 0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="Longest answer, in tokens.")
    ] = 64,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Save the curve in this file, beside those it has, instead of the user's cache.",
        ),
    ] = None,
    as_json: opt.AsJson = False,
    tokenizers: opt.TokenizerOptions,
    weights: opt.WeightOptions,
    templates: opt.TemplateOptions,
) -> None:
    """Measure a router over its thresholds, so that --diversity from 0 to 1 works for the pair.

    0 is the aligned model's own diversity, 1 the most that this router reaches with this pair.
    Between them the scale is linear in diversity (distinct-2 of a prompt's answers).
    """
    from baco.calibration.measure import calibrate as measure
    from baco.calibration.measure import grid_of
    from baco.calibration.store import MIDDLE, Calibration, check_writable
    from baco.routing.parser import canonical_name

    if diversity is not None and base_share is not None:
        raise BacoError("--diversity and --base-share each set a threshold: give one of them")
    for name, value in (("diversity", diversity), ("base-share", base_share)):
        if value is not None and not 0 <= value <= 1:
            raise BacoError(f"{name} is {value:g}: give a number from 0 to 1")
    grid_of(router)  # refuses a router without thresholds before a pair is loaded
    router = canonical_name(router)
    questions = None if prompts is None else read_prompts(prompts)
    check_writable(output)
    baco = opt.load(models, tokenizers, weights, templates)
    if output is not None:
        # An invalid file ends the command before hours of measuring.
        Calibration.in_file(baco.pair, output)
    opt.take_today(baco)
    with steps(router, len(grid_of(router)) + 1) as advance:
        curve = measure(
            baco,
            router,
            questions or default_prompts(baco),
            samples=samples,
            seed=seed,
            max_tokens=max_tokens,
            advance=advance,
        )
    path = Calibration.keep(baco.pair, router, curve, output)
    # The curve is shown and saved even where it does not reach the given share or diversity.
    if not as_json:
        _show(router, curve)
        note(f"saved in {path}")
    dial = MIDDLE if diversity is None else diversity
    gamma = curve.at_base_share(base_share) if base_share is not None else curve.at_diversity(dial)
    if as_json:
        summary = {"pair": baco.pair.name, "router": f"{router}:{gamma:g}", "threshold": gamma}
        print_json(summary | {"curve": asdict(curve)})
        return
    wanted = f"base share {base_share:g}" if base_share is not None else f"diversity {dial:g}"
    out().print(Text(f"{wanted} on {baco.pair.name}: {router}:{gamma:g}"))


def _show(router: str, curve: "Curve") -> None:
    table = Table("router", "base share", "diversity", "", box=box.SIMPLE)
    table.add_row("Aligned", "0.00", f"{curve.aligned:.3f}", _bar(curve.aligned))
    rows = zip(curve.thresholds, curve.base_share, curve.diversity, strict=True)
    for gamma, share, diversity in rows:
        table.add_row(f"{router}:{gamma:g}", f"{share:.2f}", f"{diversity:.3f}", _bar(diversity))
    out().print(table, soft_wrap=False)


def _bar(value: float) -> str:
    return "█" * round(30 * value)


def read_prompts(path: Path) -> list[Any]:
    """Prompts of a JSONL, CSV or Parquet file as ``baco batch`` reads it, or the lines of a text.

    Raises:
        BacoError: a file that cannot be read, is empty, or has a bad row.
    """
    from baco.batch.rows import SUFFIXES, read_rows

    if (suffix := path.suffix.lower()) != ".txt" and suffix in (*SUFFIXES, ".json"):
        return [row.prompt for row in read_rows([path])]
    try:
        # Not splitlines(), which also splits at characters that a prompt may hold, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BacoError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BacoError(f"{path} holds no prompt: write one on each line")
    return prompts


def default_prompts(baco: Any) -> list[str]:
    """Prompts that a pair can answer: those of the toy world for the demo pair, else open-ended."""
    from baco.calibration.measure import open_prompts
    from baco.models.known_pairs import DEMO

    if baco.pair.name != DEMO:
        return open_prompts()
    from baco.demo.world import questions

    return [question.text for question in questions("dev", 24, 0)]
