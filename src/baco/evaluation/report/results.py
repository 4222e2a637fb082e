"""The tables of a report, made of standings and findings."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from baco.evaluation.indicators import Estimate, Indicator, Resamples, indicators, interval
from baco.evaluation.methods.method import Family
from baco.evaluation.report.families import TITLES
from baco.evaluation.report.load_scores import Findings
from baco.evaluation.report.paper import reference
from baco.evaluation.report.ranking import ANY, PARTS, SINGLES, Standing, balanced
from baco.evaluation.report.tables import Cell, Column, Form, Table

INDICATORS: tuple[Indicator, ...] = ("coverage", "dominance")
BRACKETS = "Brackets are 95% bootstrap intervals over prompts."


def headline(standing: Standing) -> Table:
    """A row a family, in the paper's form, with the paper's own figures beside."""
    columns = [Column("method"), *_indicator_columns()]
    columns += [Column("paper: Coverage", "figure"), Column("paper: Dominance", "percent")]
    rows: list[list[Cell]] = []
    paper = reference("headline")
    for name, family in _headline_rows(standing):
        title = name if family in SINGLES else TITLES[family] + f" ({name})"
        title = title if name != TITLES[family] else name
        told = paper.of(family if ANY in name or family not in SINGLES else "")
        rows.append([title, *_indicators(standing, name), told.coverage, told.dominance])
    return Table(
        f"headline-{slug(standing.pair)}",
        f"Coverage and Dominance on {standing.pair}",
        "Of prompting, ensembles and BACo the method with the highest Coverage. Base and aligned "
        f"stand with all their settings together, the strictest rival. {BRACKETS} The paper's "
        f"figures are overall, on {paper.measured_on}; normalisation is by run, so only the order "
        "can be compared.",
        columns,
        rows,
        frozenset({len(rows) - 1}),
    )


def _headline_rows(standing: Standing) -> Iterator[tuple[str, Family]]:
    for family in SINGLES:
        if family + ANY in standing.pooled.methods:
            yield family + ANY, family
            if f"{family}, temperature" in standing.families:
                yield f"{family}, temperature", family
    others: tuple[Family, ...] = (
        "Nudging", "prompting", "ensemble", "mixing", "other", "BACo",
    )  # fmt: skip
    for family in others:
        name = standing.best(family)
        if name is not None:
            yield name, family


def against(standing: Standing) -> Table | None:
    """The best router against every rival: difference of Coverage, interval, p-value."""
    best = standing.best("BACo")
    if best is None or not standing.rivals:
        return None
    columns = [Column(f"{best} minus")]
    for part in PARTS[::-1]:
        columns += [Column(f"{part}, difference", "signed"), Column(f"{part}, p", "p")]
    rows: list[list[Cell]] = []
    for rival in standing.rivals:
        row: list[Cell] = [rival]
        for part in PARTS[::-1]:
            found = standing.compare(rival, part)
            row += (
                [None, None]
                if found is None
                else [Estimate(found.difference, found.low, found.high), found.p_value]
            )
        rows.append(row)
    return Table(
        f"against-{slug(standing.pair)}",
        f"{best} against its rivals on {standing.pair}",
        f"Difference of Coverage; above zero, {best} is better. Paired bootstrap over prompts, "
        "two-sided p, not corrected for the number of rivals.",
        columns,
        rows,
    )


def routers(standing: Standing) -> Table | None:
    """The ablation over routers, with the paper's NoveltyBench figures beside."""
    paper = reference("routers")
    ranked = standing.ranked("BACo")
    if not ranked:
        return None
    columns = [Column("router"), *_indicator_columns()]
    columns += [Column("paper: Coverage", "figure"), Column("paper: Dominance", "percent")]
    rows: list[list[Cell]] = [
        [name, *_indicators(standing, name), paper.of(name).coverage, paper.of(name).dominance]
        for name in ranked
    ]
    return Table(
        f"routers-{slug(standing.pair)}",
        f"Routers on {standing.pair}, the best first",
        f"Every router over its thresholds. {BRACKETS} The paper's figures are overall, on "
        f"{paper.measured_on}.",
        columns,
        rows,
        frozenset({0}),
    )


def methods(standing: Standing) -> Table:
    """Every method, the best first."""
    counts = dict.fromkeys(standing.families, 0)
    for method in standing.findings[0].measured.methods:
        counts[method] += 1
    columns = [Column("method"), Column("settings", "count"), *_indicator_columns()]
    ranked = standing.ranked()
    return Table(
        f"methods-{slug(standing.pair)}",
        f"Every method on {standing.pair}, the best first",
        f"Coverage: normalised area that a method's settings dominate, 0 to 1. Dominance: its "
        f"share of the joint Pareto front of all methods. {BRACKETS}",
        columns,
        [[name, float(counts[name]), *_indicators(standing, name)] for name in ranked],
        frozenset(place for place, name in enumerate(ranked) if name == standing.best("BACo")),
    )


def subspaces(standing: Standing, indicator: Indicator) -> Table | None:
    """Coverage or Dominance of every method in each sub-space; None where there is none."""
    form: Form = "figure" if indicator == "coverage" else "percent"
    known = standing.alone.spaces
    if not known:
        return None
    return Table(
        f"{indicator}-by-sub-space-{slug(standing.pair)}",
        f"{indicator.capitalize()} in every sub-space on {standing.pair}",
        f"A column is a metric of diversity with one of quality. {BRACKETS}",
        [Column("method"), *(Column(f"{d} × {q}", form) for d, q in known)],
        [
            [name, *(standing.estimate(indicator, name, space) for space in known)]
            for name in standing.ranked()
        ],
    )


def across(standings: Sequence[Standing]) -> Table | None:
    """Overall Coverage of every method on every pair; None of a single pair."""
    if len(standings) < 2:
        return None
    names = dict.fromkeys(name for standing in standings for name in standing.ranked())
    columns = [Column("method"), Column("mean over pairs", "figure"), Column("best on", "count")]
    columns += [Column(standing.pair, "figure") for standing in standings]
    rows: list[list[Cell]] = []
    for name in names:
        found = [
            s.estimate("coverage", name, s.part) if name in s.families else None for s in standings
        ]
        known = [one.value for one in found if one is not None]
        mean = float(np.mean(known)) if len(known) == len(standings) else None
        rows.append([name, mean, float(sum(s.ranked()[0] == name for s in standings)), *found])
    rows.sort(key=lambda row: -row[1] if isinstance(row[1], float) else 1.0)
    return Table(
        "across-pairs",
        "Every method across the pairs",
        f"Coverage, {standings[0].part}; `best on` counts the pairs where no method has more. "
        f"{BRACKETS}",
        columns,
        rows,
    )


def tasks(standing: Standing) -> Table | None:
    """Coverage of every method on every task; None of a single task."""
    if len(standing.findings) < 2:
        return None
    columns = [Column("method")]
    columns += [Column(found.task, "figure") for found in standing.findings]
    rows: list[list[Cell]] = [
        [name, *(standing.alone.coverage(name, standing.part, f.task) for f in standing.findings)]
        for name in standing.ranked()
    ]
    return Table(
        f"tasks-{slug(standing.pair)}",
        f"Coverage by task on {standing.pair}",
        f"Coverage, {standing.part}, each task normalised by itself. {BRACKETS}",
        columns,
        rows,
    )


def categories(standing: Standing, found: Findings) -> Table | None:
    """Coverage of the main methods on the prompts of every category; None without categories."""
    if not found.categories:
        return None
    main = standing.main
    rows: list[list[Cell]] = []
    for category in found.categories:
        alone = indicators([found.only(category)], resamples=1)
        values = [alone.coverage(name, standing.part) for name in main]
        count = len(found.only(category).prompts)
        rows.append(
            [category, float(count), *(None if value is None else value.value for value in values)]
        )
    return Table(
        f"categories-{slug(standing.pair)}-{slug(found.task)}",
        f"Coverage by category of {found.task} on {standing.pair}",
        f"Coverage, {standing.part}, each category normalised by itself; a few prompts each, so "
        "without intervals.",
        [Column("category"), Column("prompts", "count"), *(Column(m, "figure") for m in main)],
        rows,
    )


def accuracy(standing: Standing, found: Findings) -> Table | None:
    """Right answers of every method; None where nothing verifies the task."""
    if found.accuracy is None:
        return None
    chosen = balanced(found, standing.alone.spaces)
    resamples = Resamples.of(len(found.prompts))
    weights = resamples.counts / resamples.counts.sum(axis=1, keepdims=True)
    rows: list[list[Cell]] = []
    for method in standing.ranked():
        own = [row for row, (name, _) in enumerate(found.keys) if name == method]
        if not own:
            continue
        means = {row: float(found.accuracy[row].mean()) for row in own}
        top, low = max(own, key=lambda r: means[r]), min(own, key=lambda r: means[r])
        its = found.keys.index(chosen[method])
        row: list[Cell] = [method]
        for place in (top, its, low):
            draws = weights @ found.accuracy[place]
            row += [found.keys[place][1], Estimate(means[place], *interval(draws))]
        rows.append(row)
    heads = ("most accurate setting", "balanced setting", "least accurate setting")
    columns = [Column("method")]
    for head in heads:
        columns += [Column(head), Column(f"{head.split()[0]}, accuracy", "percent")]
    return Table(
        f"accuracy-{slug(standing.pair)}-{slug(found.task)}",
        f"Accuracy on {found.task}, {standing.pair}",
        "Share of samples that are right. The balanced setting is the one that covers most by "
        f"itself. {BRACKETS}",
        columns,
        rows,
    )


def points(standing: Standing, found: Findings) -> Table:
    """Every operating point: its metrics, base share, length and speed."""
    names = list(found.measured.metrics)
    columns = [Column("method"), Column("setting"), *(Column(name, "figure") for name in names)]
    if found.accuracy is not None:
        columns.append(Column("accuracy", "percent"))
    columns += [Column("base share", "percent"), Column("tokens an answer", "short")]
    columns += [Column("cut at the limit", "percent"), Column("tokens/s", "round")]
    means = {
        name: np.nanmean(rows, axis=1) if rows.size else rows
        for name, rows in found.measured.metrics.items()
    }
    rows: list[list[Cell]] = []
    for place, key in enumerate(found.keys):
        cost = found.costs[key]
        row: list[Cell] = [*key, *(float(means[name][place]) for name in names)]
        row += [] if found.accuracy is None else [float(found.accuracy[place].mean())]
        row += [cost.base_share, cost.tokens / cost.answers, cost.cut / cost.answers]
        # Mixing takes the answers that base and aligned have given already.
        mixed = standing.families[key[0]] == "mixing"
        rows.append([*row, None if mixed else cost.tokens_per_second])
    return Table(
        f"points-{slug(standing.pair)}-{slug(found.task)}",
        f"Every setting on {found.task}, {standing.pair}",
        f"Means over {len(found.prompts)} prompts, not normalised; higher is better in every "
        "metric. Speed is of all samples of a batch together, on the machine named below.",
        columns,
        rows,
    )


def slug(text: str) -> str:
    """Text as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _indicator_columns() -> list[Column]:
    return [
        *(Column(f"Coverage, {part}", "figure") for part in PARTS[::-1]),
        *(Column(f"Dominance, {part}", "percent") for part in PARTS[::-1]),
    ]


def _indicators(standing: Standing, name: str) -> list[Cell]:
    return [
        standing.estimate(indicator, name, part) for indicator in INDICATORS for part in PARTS[::-1]
    ]
