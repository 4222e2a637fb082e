"""The plots, as Vega-Lite through Altair: one specification each for page, PNG and SVG.

A chart that is written once in Altair is interactive offline in the page, because vl-convert
carries Vega's JavaScript, and vl-convert draws it as PNG and SVG without a browser. Plotly would
add 4 MB of script to every page and needs a browser for pictures; matplotlib has no interactive
page.

Base and aligned have the project's two colours (Okabe and Ito 2008, safe for colour-blind readers).
No method is known by its colour alone: members of a family differ in shape, and every curve is in a
table too.

Rows are plain dictionaries. A *plane* row has `x` and `y` (quality and diversity, min-max
normalised over all points of the sub-space), `method`, `front` (whether it is on the joint front)
and `lit` (whether the method stands out); `front_line` makes the joint front's stairs of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baco.evaluation.indicators import Indicator
from baco.evaluation.methods import methods
from baco.evaluation.methods.method import Family
from baco.evaluation.report.load_scores import TaskScores
from baco.evaluation.report.ranking import PARTS, Ranking, Space, spaces
from baco.evaluation.report.results import slug
from baco.files import write_atomic
from baco.text.invalid_characters import well_formed_values

# The metrics that are shown first, where they were measured.
DIVERSITY = ("distinct_k", "embedding_distance", "self_rouge_l")
QUALITY = ("reward", "perplexity")

Row = dict[str, Any]
WIDTH, HEIGHT = 420, 380
SMALL = 190
FAINT = 0.22
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK = "#24292e"

# Colours on a light and on a dark page: the same hues, lighter on the dark one.
LIGHT: dict[Family, str] = {
    "base": "#D55E00",
    "aligned": "#0072B2",
    "Nudging": "#B0508A",
    "prompting": "#7A5CB8",
    "ensemble": "#7F6A3F",
    "mixing": "#B88700",
    "BACo": "#00825E",
    "other": "#5A6470",
}
DARK: dict[Family, str] = {
    "base": "#F28A3C",
    "aligned": "#56A9DE",
    "Nudging": "#E08CC0",
    "prompting": "#B49BE8",
    "ensemble": "#BFA878",
    "mixing": "#E8BF4A",
    "BACo": "#35C79B",
    "other": "#A9B4C0",
}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")


@dataclass(frozen=True, slots=True)
class Look:
    """A method's family, its colour on a light and on a dark page, and its shape."""

    family: Family
    light: str
    dark: str
    shape: str


def family(method: str, kind: str) -> Family:
    """The family of a method of a run.

    Nudging is made by the method of all routers and is a family of its own, because it is a rival.
    So are the routers Base and Aligned, which are single models.

    Args:
        method: its name in the run.
        kind: the name in `baco.evaluation.methods` of the method that made it; where that is no
            longer installed the family is ``other``.
    """
    if method == "Nudging":
        return "Nudging"
    if method == "Base":
        return "base"
    if method == "Aligned":
        return "aligned"
    known = methods().get(kind)
    return known.family if known is not None else "other"


def looks(families: Mapping[str, Family]) -> dict[str, Look]:
    """A look for every method, from the methods' families; members of one differ in shape."""
    seen: dict[Family, int] = {}
    result = {}
    for method, group in families.items():
        place = seen[group] = seen.get(group, -1) + 1
        result[method] = Look(group, LIGHT[group], DARK[group], SHAPES[place % len(SHAPES)])
    return result


def front_line(points: Sequence[Row]) -> list[Row]:
    """The stairs of the joint front, from the diversity axis to the quality axis.

    Args:
        points: plane rows of one sub-space.

    Returns:
        Rows of `x`, `y` and `step` (their order): the edge of the area that all points dominate.
    """
    ends = sorted({(row["x"], row["y"]) for row in points if row["front"]})
    if not ends:
        return []
    corners = [(0.0, ends[0][1]), *ends, (ends[-1][0], 0.0)]
    return [{"x": x, "y": y, "step": step} for step, (x, y) in enumerate(corners)]


def page_plane() -> dict[str, Any]:
    """The interactive plane of the page, without data: its script fills `points` and `front`.

    The script knows the theme and the chosen sub-space. So colour and shape are columns of the
    rows, and the script replaces the titles of the axes.
    """
    import altair as alt

    chart = _plane(
        alt.Data(name="points"),
        alt.Data(name="front"),
        alt.Color("colour:N", scale=None),
        alt.Shape("shape:N", scale=None),
        titles=("@quality", "@diversity"),
    ).properties(width="container", height=460)
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return spec


def plane(
    points: Sequence[Row], looks: Mapping[str, Look], lit: Sequence[str], titles: tuple[str, str]
) -> Any:
    """A static plane: the methods that stand out in their looks, the others faint.

    Args:
        points: plane rows of one sub-space.
        looks: of all methods.
        lit: methods that stand out; the legend lists them.
        titles: of the axes x and y.
    """
    import altair as alt

    drawn = [row | {"named": row["method"]} for row in points]
    color = alt.Color("named:N", scale=_scale(looks, lit, "light"), legend=_legend(lit))
    shape = alt.Shape("named:N", scale=_scale(looks, lit, "shape"), legend=_legend(lit))
    chart = _plane(
        alt.Data(values=drawn), alt.Data(values=front_line(points)), color, shape, titles=titles
    )
    return chart.properties(width=WIDTH, height=HEIGHT)


def _plane(points: Any, front: Any, color: Any, shape: Any, titles: tuple[str, str]) -> Any:
    import altair as alt

    scale, axis = alt.Scale(domain=[0, 1.02], nice=False), alt.Axis(tickCount=5, format=".1f")
    x = alt.X("x:Q", scale=scale, axis=axis, title=titles[0])
    y = alt.Y("y:Q", scale=scale, axis=axis, title=titles[1])
    seen = alt.condition("datum.lit", alt.value(1), alt.value(FAINT))
    stairs = (
        alt.Chart(front)
        .mark_line(
            interpolate="step-before", strokeDash=[5, 4], strokeWidth=1.5, clip=True, aria=False
        )
        .encode(x=x, y=y, order="step:Q", color=alt.value("#8a929a"))
    )
    curves = (
        alt.Chart(points)
        .mark_line(strokeWidth=1.8, clip=True, aria=False)
        .encode(x=x, y=y, color=color, detail="method:N", order="x:Q", opacity=seen)
    )
    marks = (
        alt.Chart(points)
        .mark_point(filled=True, strokeWidth=1.2, clip=False)
        .encode(
            x=x,
            y=y,
            color=color,
            shape=shape,
            opacity=seen,
            size=alt.condition("datum.front", alt.value(110), alt.value(48)),
            description="said:N",
        )
    )
    return alt.layer(stairs, curves, marks)


def planes(
    spaces: Mapping[tuple[str, str], Sequence[Row]], looks: Mapping[str, Look], lit: Sequence[str]
) -> Any:
    """All sub-spaces as small planes, four in a row."""
    import altair as alt

    small = [
        plane(points, looks, lit, (quality, diversity)).properties(width=SMALL, height=SMALL)
        for (diversity, quality), points in spaces.items()
    ]
    return alt.concat(*small, columns=4)


def pair_of_planes(
    spaces: Mapping[tuple[str, str], Sequence[Row]], looks: Mapping[str, Look], lit: Sequence[str]
) -> Any:
    """A few sub-spaces side by side, large."""
    import altair as alt

    large = [
        plane(points, looks, lit, (f"quality: {quality}", f"diversity: {diversity}"))
        for (diversity, quality), points in spaces.items()
    ]
    return alt.hconcat(*large)


def coverages(rows: Sequence[Row], looks: Mapping[str, Look]) -> Any:
    """Coverage of every method with its interval: a panel per kind of diversity, best on top.

    Args:
        rows: `method`, `kind` (of diversity, and whether at k settings), `value`, `low`, `high`.
        looks: of all methods; every row has both colours, `colour` and `dark`, of which the page's
            script uses the one of its theme.
    """
    import altair as alt

    order = [r["method"] for r in sorted(rows, key=lambda r: -r["value"]) if r["kind"] == "overall"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    drawn = [
        row | {"colour": looks[row["method"]].light, "dark": looks[row["method"]].dark}
        for row in rows
    ]
    panels = []
    for place, kind in enumerate(kinds):
        axis = alt.Axis(labels=place == 0, ticks=False, domain=False, labelLimit=240)
        y = alt.Y("method:N", sort=order, title=None, axis=axis)
        base = alt.Chart(alt.Data(values=[row for row in drawn if row["kind"] == kind]))
        color = alt.Color("colour:N", scale=None)
        scale = alt.Scale(zero=True, nice=True)
        bars = base.mark_rule(strokeWidth=2).encode(
            x=alt.X("low:Q", title=f"Coverage, {kind}", scale=scale), x2="high:Q", y=y, color=color
        )
        dots = base.mark_point(filled=True, size=70, opacity=1).encode(
            x="value:Q", y=y, color=color, tooltip=["method:N", "value:Q", "low:Q", "high:Q"]
        )
        panels.append(alt.layer(bars, dots).properties(width=235, height=alt.Step(19)))
    return alt.hconcat(*panels, spacing=14)


def finished(chart: Any, title: str | None = None) -> dict[str, Any]:
    """A chart with the report's fonts and grid, as a Vega-Lite specification for a file."""
    if title:
        chart = chart.properties(title=title)
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return dict(well_formed_values(spec)) | {"config": paper(), "background": "white"}


def paper() -> dict[str, Any]:
    """The configuration of plots on white paper."""
    axis = {"labelColor": INK, "titleColor": INK, "gridColor": "#e6e9ec", "domainColor": "#9aa3ab"}
    return {
        "font": FONT,
        "view": {"stroke": None},
        "axis": axis | {"tickColor": "#9aa3ab", "titleFontWeight": "normal", "titleFontSize": 12},
        "legend": {"labelColor": INK, "titleColor": INK, "symbolSize": 90, "labelLimit": 260},
        "title": {"color": INK, "anchor": "start", "fontSize": 14, "offset": 12},
    }


def png(spec: Mapping[str, Any]) -> bytes:
    """A picture for slides, at twice the size in pixels."""
    import vl_convert

    drawn: bytes = vl_convert.vegalite_to_png(dict(spec), scale=2)
    return drawn


def svg(spec: Mapping[str, Any]) -> str:
    """A picture for papers and pages."""
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(dict(spec))
    return drawn


def vega_script() -> str:
    """Vega, Vega-Lite and vega-embed (BSD 3-Clause) as one script that sets `window.vegaEmbed`."""
    import vl_convert

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets a default
    # A closing tag in a string would end the page's script element.
    return script.replace("</script", "<\\/script")


def _scale(looks: Mapping[str, Look], lit: Sequence[str], attribute: str) -> Any:
    import altair as alt

    # Methods in the domain but not in the legend's values keep their look without an entry.
    every = [*lit, *(method for method in looks if method not in lit)]
    return alt.Scale(domain=every, range=[getattr(looks[method], attribute) for method in every])


def _legend(lit: Sequence[str]) -> Any:
    import altair as alt

    return alt.Legend(title=None, orient="right", values=list(lit))


def draw(folder: Path, rankings: Sequence[Ranking], every: Mapping[str, Look]) -> list[str]:
    """Draw all plots as SVG and PNG.

    Returns:
        The stems of the files.
    """
    charts: dict[str, tuple[Any, str]] = {}
    for ranking in rankings:
        pair = slug(ranking.pair)
        chart = coverages(coverage_rows(ranking), every)
        charts[f"coverage-{pair}"] = (chart, f"Coverage on {ranking.pair}")
        for scores in ranking.every:
            rows = {
                (space.diversity, space.quality): _plane_rows(scores, space, ranking.main)
                for space in spaces(scores, ranking.alone.spaces)
            }
            if not rows:
                continue
            stem, title = f"{pair}-{slug(scores.task)}", f"{scores.task} on {ranking.pair}"
            charts[f"planes-{stem}"] = (planes(rows, every, ranking.main), title)
            chosen = {space: rows[space] for space in _main_spaces(list(rows))}
            charts[f"plane-{stem}"] = (pair_of_planes(chosen, every, ranking.main), title)
    for stem, (chart, title) in charts.items():
        spec = finished(chart, title)
        write_atomic(folder / f"{stem}.svg", svg(spec))
        write_atomic(folder / f"{stem}.png", png(spec))
    return sorted(charts)


def coverage_rows(ranking: Ranking) -> list[Row]:
    """Coverage of every method, full and at k settings, as rows for `coverages`."""
    panels: list[tuple[str, Indicator, str]] = [(part, "coverage", part) for part in PARTS[::-1]]
    if ranking.k is not None:
        kind = f"{ranking.part}, at {ranking.k} settings"
        panels.insert(1, (kind, "coverage_at_k", ranking.part))
    return [
        {"method": method, "kind": kind, **asdict(estimate)}
        for kind, indicator, part in panels
        for method in ranking.ranked()
        if (estimate := ranking.estimate(indicator, method, part)) is not None
    ]


def _main_spaces(known: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A semantic and a lexical sub-space to draw large."""
    quality = first(QUALITY, [space[1] for space in known])
    names = [space[0] for space in known if space[1] == quality]
    kinds = (("distinct_k", "embedding_distance", "vendi"), ("self_rouge_l", "self_bleu"))
    chosen = dict.fromkeys(first(kind, names) for kind in kinds)
    return [(name, quality) for name in chosen]


def _plane_rows(scores: TaskScores, space: Space, lit: Sequence[str]) -> list[Row]:
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
            space.points, space.front, scores.keys, strict=True
        )
    ]


def first(wanted: Sequence[str], known: Sequence[str]) -> str:
    """The first wanted name that is known; else the first known name, or nothing."""
    return next((name for name in wanted if name in known), next(iter(known), ""))
