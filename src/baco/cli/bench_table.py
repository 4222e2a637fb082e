"""A measurement of speed as tables on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

from baco.cli.console import out

_NAMES = {
    "paired": "paired decoding",
    "undrafted": "paired, no drafts",
    "generate": "generate, one model",
    "naive": "naive loop",
}


def show(report: Mapping[str, Any]) -> None:
    """Print a report of :func:`baco.bench.measure.measure`."""
    console = out()
    machine = report["machine"]
    millions = sum(report["parameters"].values()) / 1e6
    console.print(
        f"{report['pair']}, {millions:.4g} M parameters in both models, {report['dtype']} on "
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads",
        f"{report['router']}, answers of {report['tokens']} tokens, {report['repeats']} repeats, "
        f"torch {machine['torch']}, transformers {machine['transformers']}",
        report["command"],
        sep="\n",
    )
    console.print(_race(report), soft_wrap=False)
    console.print(_lines(report))


def _race(report: Mapping[str, Any]) -> RenderableType:
    unit, ratios = report["unit"], report["ratios"]
    table = _table("contestant", "n", f"{unit}s/s", f"ms/{unit}", "first, ms", "paired ÷ this")
    for entry in report["contestants"]:
        name, n = entry["name"], entry["n"]
        ratio = ratios.get(f"{name}_n{n}") or ratios.get(name)
        table.add_row(
            _NAMES[name],
            str(n),
            f"{entry[f'{unit}s_per_second']:.0f}",
            f"{entry[f'milliseconds_per_{unit}']:.2f}",
            f"{1000 * entry['first_token_seconds']:.1f}",
            "" if name == "paired" else _ratio(ratio),
            style="bold" if name == "paired" else None,
        )
    return table


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['middle']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _lines(report: Mapping[str, Any]) -> str:
    """Figures that are one sentence each."""
    places = "positions" if report["unit"] == "token" else "word starts"
    lines = [f"the models' most likely tokens agree at {report['agreement']:.0%} of {places}"]
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    same = report["same_answers"]
    if same:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in same.items())
        lines.append(f"answers that equal the loop's, token for token: {shares}")
    if "bound" in report:
        bound = report["bound"]
        lines.append(
            f"reading both models' weights at {bound['bandwidth'] / 1e9:.0f} GB/s allows "
            f"{bound['few']:.0f} tokens/s at n = 1; multiplying at {bound['flops'] / 1e9:.0f} "
            f"GFLOP/s allows {bound['many']:.0f} at large n"
        )
    return "\n".join(lines)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    return table
