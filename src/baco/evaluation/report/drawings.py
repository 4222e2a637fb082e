"""Which plots a report has, and their files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baco.evaluation.report import page, plots, results
from baco.evaluation.report.families import Look
from baco.evaluation.report.load_scores import Findings
from baco.evaluation.report.ranking import PARTS, Space, Standing, spaces
from baco.files import write_atomic


def draw(folder: Path, standings: Sequence[Standing], every: Mapping[str, Look]) -> list[str]:
    """Draw all plots twice, SVG and PNG; their stems."""
    charts: dict[str, Any] = {}
    for one in standings:
        where = results.slug(one.pair)
        title = f"Coverage on {one.pair}"
        charts[f"coverage-{where}"] = (
            plots.coverages(coverage_rows(one), every),
            title,
        )
        for found in one.every:
            planes = {(s.diversity, s.quality): _plane_rows(found, s, one.main)
                      for s in spaces(found, one.alone.spaces)}  # fmt: skip
            if not planes:
                continue
            stem = f"{where}-{results.slug(found.task)}"
            title = f"{found.task} on {one.pair}"
            charts[f"planes-{stem}"] = (plots.planes(planes, every, one.main), title)
            chosen = {space: planes[space] for space in _main_spaces(list(planes))}
            charts[f"plane-{stem}"] = (plots.pair_of_planes(chosen, every, one.main), title)
    for stem, (chart, title) in charts.items():
        spec = plots.finished(chart, title)
        write_atomic(folder / f"{stem}.svg", plots.svg(spec))
        (folder / f"{stem}.png").write_bytes(plots.png(spec))
    return sorted(charts)


def coverage_rows(one: Standing) -> list[dict[str, Any]]:
    """Coverage of every method and kind of diversity, as rows of a plot."""
    rows = []
    for part in PARTS[::-1]:
        for method in one.ranked():
            estimate = one.estimate("coverage", method, part)
            if estimate is not None:
                figures = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
                rows.append({"method": method, "kind": part, **figures})
    return rows


def _main_spaces(known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A semantic and a lexical sub-space to draw large."""
    quality = page.first(page.QUALITY, [space[1] for space in known])
    names = [space[0] for space in known if space[1] == quality]
    kinds = (("distinct_k", "embedding_distance", "vendi"), ("self_rouge_l", "self_bleu"))
    found = dict.fromkeys(page.first([w for w in kind if w in names], names) for kind in kinds)
    return [(name, quality) for name in found]


def _plane_rows(found: Findings, space: Space, lit: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "x": float(point[0]),
            "y": float(point[1]),
            "method": method,
            "said": f"{method}, {setting}",
            "front": bool(front),
            "lit": method in lit,
        }
        for point, front, (method, setting) in zip(
            space.points, space.front, found.keys, strict=True
        )
    ]
