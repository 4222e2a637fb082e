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
    "http": "two servers, in turn",
    "http_concurrent": "two servers, at once",
    "http_rereads": "two servers, reread",
}


def show(report: Mapping[str, Any]) -> None:
    """Print a report of :func:`baco.bench.measure.measure`."""
    console = out()
    machine = report["machine"]
    millions = sum(report["parameters"].values()) / 1e6
    console.print(
        f"{report['pair']}, {millions:.4g} M parameters in both halves, {report['dtype']} on "
        f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads",
        f"{report['router']}, answers of {report['tokens']} tokens, {report['repeats']} repeats, "
        f"torch {machine['torch']}, transformers {machine['transformers']}",
        report["command"],
        sep="\n",
    )
    console.print(_race(report), soft_wrap=False)
    console.print(_lines(report))
    if report.get("gammas"):
        console.print(_gammas(report["gammas"]), soft_wrap=False)


def _race(report: Mapping[str, Any]) -> RenderableType:
    table = _table("contestant", "n", "tokens/s", "ms/token", "first, ms", "paired ÷ this")
    ratios = report["ratios"]
    for entry in report["contestants"]:
        name, n = entry["name"], entry["n"]
        ratio = ratios.get(f"{name}_n{n}") or ratios.get(name)
        table.add_row(
            _NAMES[name],
            str(n),
            f"{entry['tokens_per_second']:.0f}",
            f"{entry['milliseconds_per_token']:.2f}",
            f"{1000 * entry['first_token_seconds']:.1f}",
            "" if name == "paired" else _ratio(ratio),
            style="bold" if name == "paired" else None,
        )
    return table


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['middle']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _gammas(rows: list[Mapping[str, Any]]) -> RenderableType:
    table = _table(
        "router", "n", "tokens/s", "base share", "drafts kept", "base runs", "aligned runs"
    )
    for row in rows:
        kept = "–" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
        table.add_row(
            row["router"],
            str(row["n"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['base_share']:.0%}",
            kept,
            f"{row['forwards']['base']:.2f}",
            f"{row['forwards']['aligned']:.2f}",
        )
    table.caption = "runs: forwards per token of an answer; the naive loop's are 1.00"
    return table


def _lines(report: Mapping[str, Any]) -> str:
    """What is told in a sentence."""
    lines = [f"the halves' most likely tokens agree at {report['agreement']:.0%} of positions"]
    same = report["same_answers"]
    if same:
        told = ", ".join(f"{name} {share:.0%}" for name, share in same.items())
        lines.append(f"answers that are the loop's, token for token: {told}")
    if "bound" in report:
        bound = report["bound"]
        lines.append(
            f"reading both halves' weights at {bound['bandwidth'] / 1e9:.0f} GB/s allows "
            f"{bound['few']:.0f} tokens/s at n = 1; multiplying at {bound['flops'] / 1e9:.0f} "
            f"GFLOP/s allows {bound['many']:.0f} at large n"
        )
    if "memory" in report:
        memory = report["memory"]
        need = (memory["weights"] + memory["cache"]) / 2**20
        lines.append(
            f"peak memory at n = {memory['n']}: {memory['peak'] / 2**20:.0f} MiB, "
            f"{memory['ratio']:.2f} × the {need:.0f} MiB of weights, keys and values"
        )
    if "long_prompt" in report:
        prompt = report["long_prompt"]
        reads = " and ".join(f"{times} × by {half}" for half, times in prompt["reads"].items())
        lines.append(
            f"a prompt of {prompt['tokens']} tokens for n = {prompt['n']} is read {reads}; first "
            f"tokens after {1000 * prompt['first_token_seconds']:.0f} ms"
        )
    return "\n".join(lines)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    return table
