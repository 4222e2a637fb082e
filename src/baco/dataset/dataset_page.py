"""The page of a dataset: one HTML file without scripts, whose plots follow the reader's theme."""

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from baco.dataset.figures import Figures, Report
from baco.evaluation.indicators import Comparison, Estimate
from baco.evaluation.report import page, plots
from baco.evaluation.report.tables import Cell, Column, Table, number, written
from baco.version import __version__

BINS, VALUES, FIELDS, LONGEST_LABEL = 20, 8, 6, 48
# The colours of the plots, and the page's names for them, which differ by theme.
COLOURS = {
    plots.LIGHT["BACo"]: "var(--own)",
    plots.LIGHT["aligned"]: "var(--other)",
    plots.INK: "var(--ink)",
    "#e6e9ec": "var(--line)",
    "#9aa3ab": "var(--soft)",
}
STYLE = f"""
:root {{
  --own: light-dark({plots.LIGHT["BACo"]}, {plots.DARK["BACo"]});
  --other: light-dark({plots.LIGHT["aligned"]}, {plots.DARK["aligned"]});
}}
figure {{ margin: 1rem 0 1.6rem; overflow-x: auto; }}
figcaption {{ font-weight: 600; margin-bottom: 0.4rem; }}
.key i {{ display: inline-block; width: 0.8em; height: 0.8em; margin: 0 0.35em 0 1em; }}
"""

Line = tuple[str, str, float | Estimate | None, float | Estimate | None, Comparison | float | None]


def lines(report: Report) -> Iterator[Line]:
    """Every figure that is one number: label, form, its value, the baseline's, the difference."""
    own, other = report.figures, report.baseline

    def line(label: str, form: str, value: Any, name: str | None = None) -> Line:
        """The figure that a function takes of both datasets."""
        a = value(own)
        b = None if other is None else value(other)
        if name is not None:
            return label, form, a, b, report.differences.get(name)
        known = isinstance(a, int | float) and isinstance(b, int | float) and form != "count"
        return label, form, a, b, a - b if known else None

    yield line("rows", "count", lambda f: f.rows)
    yield line("prompts", "count", lambda f: f.prompts)
    yield line("words per answer", "short", lambda f: f.words)
    every = [own] if other is None else [own, other]
    if any(f.unfinished is not None for f in every):
        yield line("unfinished answers", "percent", lambda f: f.unfinished)
    if any(f.base_share is not None for f in every):
        yield line("base share", "percent", lambda f: f.base_share)
    if any(f.valid is not None or f.json > 0 for f in every):
        yield line("JSON objects or lists", "percent", lambda f: f.json)
    if any(f.valid is not None for f in every):
        yield line("fit the schema", "percent", lambda f: f.valid)
    yield line("exact duplicates", "percent", lambda f: f.exact)
    yield line("near duplicates", "percent", lambda f: f.near)
    for order in own.pooled:
        yield line(f"distinct-{order} of pooled answers", "figure", lambda f, n=order: f.pooled[n])
    for name in own.spread:
        yield line(f"{name} of pooled answers", "figure", lambda f, n=name: f.spread.get(n))
    for name in own.scores:
        yield line(f"{name} per prompt", "figure", lambda f, n=name: f.scores.get(n), name)
    if own.shared_words is not None:
        yield line("first words that two answers share", "short", lambda f: f.shared_words)
    yield line("overused phrases per 1,000 words", "figure", lambda f: f.slop)


def cells(line: Line, compared: bool) -> list[str]:
    """The texts of a line: label, figure and, with a baseline, its figure and the difference."""
    label, form, own, other, difference = line
    row = [label, _written(own, form)]
    if compared:
        row += [_written(other, form), _difference(difference, form)]
    return row


def _written(value: float | Estimate | None, form: str) -> str:
    if form == "count" and isinstance(value, int):
        return f"{value:,}"
    return written(value, form)  # type: ignore[arg-type]


def _difference(value: Comparison | float | None, form: str) -> str:
    if value is None:
        return ""
    if isinstance(value, Comparison):
        numbers = (value.difference, value.low, value.high)
        return "{} [{}, {}]".format(*(number(x, "signed") for x in numbers))
    return number(value, "signed percent" if form == "percent" else "signed")


def verdict(report: Report) -> list[str]:
    """The main findings, as sentences."""
    own, other = report.figures, report.baseline
    count = f"{own.fewest}" if own.fewest == own.most else f"{own.fewest} to {own.most}"
    sentences = [
        f"{own.rows:,} rows: {own.prompts:,} prompts with {count} answers each; "
        f"{own.exact:.1%} exact and {own.near:.1%} near duplicates."
    ]
    if own.valid is not None:
        sentences.append(f"{own.valid:.1%} of the rows fit the schema.")
    if own.openings:
        size, text, share = _longest_common(own)
        sentences.append(f"{share:.1%} of the answers begin with “{text}” ({size} words).")
    if other is not None:
        sentences.append(
            f"Against {other.name}: {own.exact + own.near:.1%} instead of "
            f"{other.exact + other.near:.1%} of the rows are duplicates, distinct-2 of pooled "
            f"answers is {own.pooled[2]:.3f} instead of {other.pooled[2]:.3f}, and overused "
            f"phrases are {own.slop:.2f} instead of {other.slop:.2f} per 1,000 words."
        )
    return sentences


def _longest_common(figures: Figures) -> tuple[int, str, float]:
    """The longest opening that a tenth of the answers share, or the most frequent first word."""
    return next((one for one in reversed(figures.openings) if one[2] >= 0.1), figures.openings[0])


def render(report: Report) -> str:
    """The page."""
    from markupsafe import Markup

    own, other = report.figures, report.baseline
    source = resources.files("baco.dataset").joinpath("dataset_page.html.jinja").read_text("utf-8")
    html: str = page.template(source).render(
        version=__version__,
        css=Markup(page.source("page.css") + STYLE),
        title=f"Dataset {own.name}",
        own=own.name,
        other=None if other is None else other.name,
        verdict=verdict(report),
        tables=_tables(report),
        charts=[(title, Markup(_drawn(chart))) for title, chart in _charts(report)],
        unavailable=report.unavailable,
    )
    return html


def _tables(report: Report) -> list[Table]:
    own, other = report.figures, report.baseline
    compared = other is not None
    heads = ["figure", own.name, *([other.name, "difference"] if other is not None else [])]
    tables = [
        Table(
            "figures",
            "In figures",
            "Means with 95% intervals over prompts; differences on the prompts of both.",
            [Column(heads[0]), *(Column(head, "short") for head in heads[1:])],
            [cells(line, compared) for line in lines(report)],
        )
    ]
    every = [own] if other is None else [own, other]
    for place, figures in enumerate(every):
        name = figures.name
        if figures.faults:
            rows: list[list[Cell]] = [[fault, float(count)] for fault, count in figures.faults]
            heads2 = [Column("place and keyword"), Column("rows", "round")]
            tables.append(
                Table(f"faults-{place}", f"Why rows of {name} do not fit", "", heads2, rows)
            )
        if figures.groups:
            rows = [[text[:300], float(size)] for size, text in figures.groups]
            heads2 = [Column("first answer"), Column("answers", "round")]
            title = f"Largest groups of duplicates in {name}"
            tables.append(Table(f"groups-{place}", title, "", heads2, rows))
        if figures.openings:
            rows = [[text, float(size), share] for size, text, share in figures.openings]
            heads2 = [Column("opening"), Column("words", "round"), Column("answers", "percent")]
            title = f"Most frequent openings in {name}"
            tables.append(Table(f"openings-{place}", title, "", heads2, rows))
        if figures.fields:
            rows = [
                [f.name, f.present, float(f.distinct), f.entropy, f.mean] for f in figures.fields
            ]
            heads2 = [
                Column("field"),
                Column("present", "percent"),
                Column("distinct values", "round"),
                Column("entropy, nats", "figure"),
                Column("mean", "figure"),
            ]
            title = f"Fields in {name}"
            tables.append(Table(f"fields-{place}", title, "", heads2, rows))
    return tables


def _charts(report: Report) -> Iterator[tuple[str, Any]]:
    every = [report.figures] if report.baseline is None else [report.figures, report.baseline]
    yield "Length of answers", _lengths(every)
    if rows := [
        {"label": f"{size}", "value": share, "dataset": place}
        for place, figures in enumerate(every)
        for size, _, share in figures.openings
    ]:
        yield (
            "Share of the answers with the most frequent first words",
            _bars(rows, "number of first words", "share of the answers", ".0%"),
        )
    names = list(dict.fromkeys(name for figures in every for name in figures.phrases))
    if names:
        rows = [
            {"label": name, "value": figures.phrases.get(name, 0.0), "dataset": place}
            for place, figures in enumerate(every)
            for name in names
        ]
        yield "Phrases that aligned models overuse", _bars(rows, None, "per 1,000 words", "~g")
    for values in report.figures.fields[:FIELDS]:
        yield f"Values of {values.name}", _bars(_shares(values.name, every), None, "share", ".0%")


def _shares(name: str, every: Sequence[Figures]) -> list[dict[str, Any]]:
    """Shares of the most frequent values of a field, in all datasets."""
    tops = [
        next((dict(values.top) for values in figures.fields if values.name == name), {})
        for figures in every
    ]
    labels = list(dict.fromkeys(label for top in tops for label in list(top)[:VALUES]))
    return [
        {"label": label[:LONGEST_LABEL], "value": top[label], "dataset": place}
        for place, top in enumerate(tops)
        for label in labels
        if label in top
    ]


def _bars(rows: list[dict[str, Any]], y_title: str | None, x_title: str, form: str) -> Any:
    import altair as alt

    order = list(dict.fromkeys(row["label"] for row in rows))
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("value:Q", title=x_title, axis=alt.Axis(format=form, tickCount=5)),
            y=alt.Y("label:N", sort=order, title=y_title, axis=alt.Axis(labelLimit=280)),
            yOffset=alt.YOffset("dataset:O"),
            color=_colour(),
        )
        .properties(width=plots.WIDTH, height=alt.Step(12))
    )


def _lengths(every: Sequence[Figures]) -> Any:
    """The distribution of lengths, as steps."""
    import altair as alt

    longest = max(max(figures.lengths, default=0) for figures in every)
    width = max(1, -(-(longest + 1) // BINS))
    rows = []
    for place, figures in enumerate(every):
        counts = Counter(length // width for length in figures.lengths)
        for bin_ in range(longest // width + 1):
            share = counts[bin_] / max(1, len(figures.lengths))
            rows.append({"x": bin_ * width, "y": share, "dataset": place})
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("x:Q", title=f"words, in steps of {width}"),
            y=alt.Y("y:Q", title="share of the answers", axis=alt.Axis(format=".0%", tickCount=5)),
            color=_colour(),
        )
        .properties(width=plots.WIDTH, height=plots.SMALL)
    )


def _colour() -> Any:
    import altair as alt

    colours = [plots.LIGHT["BACo"], plots.LIGHT["aligned"]]
    return alt.Color("dataset:O", scale=alt.Scale(domain=[0, 1], range=colours), legend=None)


def _drawn(chart: Any) -> str:
    """A chart as SVG whose colours are the page's."""
    picture = plots.svg({**plots.finished(chart), "background": None})
    for colour, name in COLOURS.items():
        picture = picture.replace(colour, name).replace(colour.lower(), name)
    return picture
