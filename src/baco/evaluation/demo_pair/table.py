"""The table of the demo pair: what was measured on one or more training seeds, as Markdown.

`python -m baco.evaluation.demo_pair.table REPORT.md PAIR…` writes the report of the pairs'
`measured.json` and the same figures as JSON next to it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baco.evaluation.indicators import Floats, Resamples, coverage, interval

SINGLES = ("base, temperature", "base, min-p", "aligned, temperature", "aligned, min-p")
RIVALS = (*SINGLES, "Nudging", "mixing", "Rand")
DIVERSITIES = {"keys": "distinct keys", "overlap": "word overlap"}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Coverage of a method, its 95% interval over prompts, and each training seed's own."""

    coverage: float
    low: float
    high: float
    by_training_seed: list[float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method against a rival: ratio of Coverage, interval of the difference, resamples won."""

    ratio: float
    low: float
    high: float
    won: float


def summarise(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures of the report from the measurements of one or more training seeds."""
    methods = list(dict.fromkeys(point["method"] for point in measured[0]["points"]))
    resamples = Resamples.of(measured[0]["questions"])
    result: dict[str, Any] = {"methods": {}, "points": _operating_points(measured)}
    draws: dict[tuple[str, str], Floats] = {}
    for name in methods:
        result["methods"][name] = {}
        for diversity in DIVERSITIES:
            each = [_values(run, name, diversity) for run in measured]
            pooled: Floats = np.mean(each, axis=0)
            draws[name, diversity] = resamples.coverage(pooled)
            low, high = interval(draws[name, diversity])
            whole = float(coverage(pooled.mean(1)))
            own = [float(coverage(values.mean(1))) for values in each]
            result["methods"][name][diversity] = asdict(Estimate(whole, low, high, own))
    for diversity in DIVERSITIES:
        figures = {name: result["methods"][name][diversity]["coverage"] for name in methods}
        single = max((name for name in SINGLES if name in figures), key=lambda name: figures[name])
        result[f"best single, {diversity}"] = single
        for name in methods:
            result["methods"][name][diversity]["against"] = {
                rival: asdict(_compare(name, rival, diversity, figures, draws))
                for rival in dict.fromkeys((single, "Nudging", "mixing"))
                if rival in figures
            }
    return result


def _compare(
    name: str,
    rival: str,
    diversity: str,
    figures: dict[str, float],
    draws: dict[tuple[str, str], Floats],
) -> Comparison:
    difference = draws[name, diversity] - draws[rival, diversity]
    low, high = interval(difference)
    ratio = figures[name] / max(figures[rival], 1e-9)  # a rival may be worth nothing at all
    return Comparison(ratio, low, high, float(np.mean(difference > 0)))


def _values(run: dict[str, Any], method: str, diversity: str) -> Floats:
    """(quality, diversity) of a method, [points, questions, 2], means over decoding seeds."""
    points = [point for point in run["points"] if point["method"] == method]
    return np.stack(
        [
            np.stack([np.mean(p["quality"], axis=0), np.mean(p[diversity], axis=0)], axis=-1)
            for p in points
        ]
    )


def _operating_points(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every point's figures, means over training seeds, decoding seeds and questions."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in measured:
        for point in run["points"]:
            rows.setdefault((point["method"], point["label"]), []).append(point)
    return [
        {
            "method": method,
            "setting": label,
            "quality": float(np.mean([p["quality"] for p in points])),
            "keys": float(np.mean([p["keys"] for p in points])),
            "overlap": float(np.mean([p["overlap"] for p in points])),
            "base_share": float(np.mean([p["base_share"] for p in points]))
            if points[0]["base_share"]
            else None,
        }
        for (method, label), points in rows.items()
    ]


def coverage_table(summary: dict[str, Any]) -> str:
    """Coverage of every method, the best first."""
    single = summary["best single, keys"]
    head = (
        "| method | Coverage, distinct keys | by training seed | × best single | × Nudging "
        "| wins against best single / Nudging / mixing | Coverage, word overlap |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    order = sorted(summary["methods"].items(), key=lambda item: -item[1]["keys"]["coverage"])
    rows = []
    for name, figures in order:
        keys, overlap = figures["keys"], figures["overlap"]
        against = keys["against"]
        wins = " / ".join(
            "–" if rival == name or rival not in against else f"{against[rival]['won']:.0%}"
            for rival in (single, "Nudging", "mixing")
        )
        seeds = " ".join(f"{value:.3f}" for value in keys["by_training_seed"])
        nudging = against.get("Nudging", {"ratio": float("nan")})["ratio"]
        title = f"*{name}*" if name in RIVALS else f"**{name}**"
        rows.append(
            f"| {title} | {keys['coverage']:.3f} [{keys['low']:.3f}, {keys['high']:.3f}] | {seeds} "
            f"| {against[single]['ratio']:.2f} | {nudging:.2f} | {wins} "
            f"| {overlap['coverage']:.3f} [{overlap['low']:.3f}, {overlap['high']:.3f}] |"
        )
    return head + "\n".join(rows) + "\n"


def points_table(summary: dict[str, Any]) -> str:
    """Every operating point."""
    head = (
        "| method | setting | quality | keys of 10 | word-overlap diversity | base share |\n"
        "|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {p['method']} | {p['setting']} | {p['quality']:.3f} | {10 * p['keys']:.2f} "
        f"| {p['overlap']:.3f} | {_percent(p['base_share'])} |\n"
        for p in summary["points"]
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def report(measured: Sequence[dict[str, Any]]) -> str:
    """The whole report."""
    summary, run = summarise(measured), measured[0]
    seeds = ", ".join(str(m["training_seed"]) for m in measured)
    decoding = ", ".join(str(seed) for seed in run["decoding_seeds"])
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        "# The demo pair, measured\n\n"
        f"{run['questions']} test questions × {run['answers']} answers; training seeds {seeds}, "
        f"decoding seeds {decoding} for each. Sampling is min-p 0.1 at temperature 1 unless the "
        "setting says otherwise. Quality is the world's judge (0 to 1), diversity the distinct "
        "semantic keys (unreadable answers share one) or one minus the mean word overlap "
        "(Jaccard). Coverage is the area dominated with (0, 0) as reference, not normalised; "
        "brackets are 95% bootstrap intervals over questions, wins the share of resamples in "
        "which a method's Coverage is the higher. Rivals are in italics.\n\n"
        f"Made by `baco demo train --out PAIR --seed N` for each training seed, then "
        f"`python -m baco.evaluation.demo_pair.table REPORT.md PAIR…`; {versions}; "
        f"{run['machine']}; "
        f"{', '.join(format(m['seconds'] / 60, '.1f') for m in measured)} minutes of decoding.\n\n"
        f"## Coverage\n\nBest single model on distinct keys: {summary['best single, keys']}; on "
        f"word overlap: {summary['best single, overlap']}.\n\n"
        f"{coverage_table(summary)}\n## Operating points\n\n{points_table(summary)}"
    )


def write_report(path: Path, pairs: Sequence[Path]) -> None:
    """Write the report of the pairs' measurements to `path`, and its figures as JSON beside it."""
    measured = [json.loads((pair / "measured.json").read_text("utf-8")) for pair in pairs]
    path.write_text(report(measured), encoding="utf-8")
    figures = json.dumps(summarise(measured), indent=1)
    path.with_suffix(".json").write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]), [Path(pair) for pair in sys.argv[2:]])
