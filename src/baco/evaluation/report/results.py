"""The tables of a report, by section, with the paper's own figures beside a run's."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import numpy as np

from baco.evaluation.indicators import (
    Comparison,
    Estimate,
    Floats,
    Indicator,
    Resamples,
    indicators,
)
from baco.evaluation.inference import interval
from baco.evaluation.methods.method import Family
from baco.evaluation.metrics.quality import PATIENCE
from baco.evaluation.report.load_scores import TaskScores
from baco.evaluation.report.ranking import ANY, PARTS, SINGLES, Ranking, balanced
from baco.evaluation.report.tables import Cell, Column, Form, Table, number
from baco.source import MIXED

TITLES: dict[Family, str] = {
    "base": "base alone",
    "aligned": "aligned alone",
    "Nudging": "Nudging",
    "prompting": "prompting",
    "ensemble": "ensemble",
    "mixing": "mixing whole answers",
    "BACo": "BACo",
    "other": "other methods",
}

INDICATORS: tuple[Indicator, ...] = ("coverage", "coverage_at_k", "dominance")
BRACKETS = (
    "Brackets are 95% intervals over prompts: of Dominance bounds that hold with 95% at least, "
    "else bootstrap intervals."
)


@dataclass(frozen=True, slots=True)
class Reported:
    """Coverage and Dominance as the paper reports them, by part: lexical, semantic or overall."""

    coverage: Mapping[str, float] = field(default_factory=dict)
    dominance: Mapping[str, float] = field(default_factory=dict)

    def figures(self) -> Iterator[tuple[Indicator, str, float]]:
        """Every figure with its indicator and part."""
        of_indicators: dict[Indicator, Mapping[str, float]] = {
            "coverage": self.coverage,
            "dominance": self.dominance,
        }
        for indicator, by_part in of_indicators.items():
            yield from ((indicator, part, by_part[part]) for part in PARTS[::-1] if part in by_part)


@dataclass(frozen=True, slots=True)
class Reference:
    """One table of the paper.

    Attributes:
        measured_on: tasks and pairs.
        figures: by method, router or task.
    """

    measured_on: str
    figures: dict[str, Reported]

    def of(self, name: str) -> Reported:
        """The figures of a method; nothing where the paper has none."""
        return self.figures.get(name, Reported())


@cache
def reference(table: str) -> Reference:
    """The paper's `headline` table, `routers` ablation or best BACo by `tasks` (2511.05650)."""
    text = resources.files("baco.evaluation.report").joinpath("paper.toml").read_text("utf-8")
    entries = tomllib.loads(text)[table]
    figures = {name: Reported(**row) for name, row in entries["figures"].items()}
    return Reference(entries["measured_on"], figures)


@dataclass(frozen=True, slots=True)
class Sections:
    """Tables by section; those of methods by pair."""

    headline: list[Table]
    acceptable: list[Table]
    routers: list[Table]
    methods: list[tuple[str, list[Table]]]
    parts: list[Table]
    accuracy: list[Table]
    points: list[Table]

    @property
    def all(self) -> list[Table]:
        """Every table, in the order of the sections."""
        return [
            *self.headline,
            *self.acceptable,
            *self.routers,
            *(table for _, tables in self.methods for table in tables),
            *self.parts,
            *self.accuracy,
            *self.points,
        ]


def sections(rankings: Sequence[Ranking]) -> Sections:
    """The tables of all pairs."""
    every = [(ranking, scores) for ranking in rankings for scores in ranking.every]
    # Tables of Coverage alone have nothing to show of a pair without any sub-space.
    covered = [ranking for ranking in rankings if ranking.alone.spaces]
    return Sections(
        headline=_present(
            [
                across(covered),
                *(table(r) for r in covered for table in (headline, against, claims, beside_paper)),
            ]
        ),
        acceptable=_present([acceptable(ranking) for ranking in rankings]),
        routers=_present([routers(ranking) for ranking in covered]),
        methods=[
            (r.pair, _present([methods(r), *(subspaces(r, indicator) for indicator in INDICATORS)]))
            for r in rankings
        ],
        parts=_present(
            [
                *(tasks(ranking) for ranking in covered),
                *(categories(r, scores) for r in covered for scores in r.scores),
            ]
        ),
        accuracy=_present([accuracy(ranking, scores) for ranking, scores in every]),
        points=[points(ranking, scores) for ranking, scores in every],
    )


def _present(tables: Sequence[Table | None]) -> list[Table]:
    return [table for table in tables if table is not None]


def headline(ranking: Ranking) -> Table:
    """A row a family, in the paper's form, with the paper's own figures beside."""
    columns = [Column("method"), *_indicator_columns(ranking)]
    columns += [Column("paper: Coverage", "figure"), Column("paper: Dominance", "percent")]
    rows: list[list[Cell]] = []
    paper = reference("headline")
    for name, family in _headline_rows(ranking):
        title = name if family in SINGLES else TITLES[family] + f" ({name})"
        title = title if name != TITLES[family] else name
        reported = paper.of(family if ANY in name or family not in SINGLES else "")
        figures = _indicators(ranking, name)
        rows.append([title, *figures, *_overall(reported)])
    return Table(
        f"headline-{slug(ranking.pair)}",
        f"Coverage and Dominance on {ranking.pair}",
        "For prompting, ensembles and BACo: the method with the highest Coverage. For base and "
        f"aligned: all settings together, the strictest rival. {BRACKETS} The paper's "
        f"figures are overall, on {paper.measured_on}; normalisation is by run, so only the order "
        "can be compared.",
        columns,
        rows,
        frozenset({len(rows) - 1}),
    )


def _overall(reported: Reported) -> list[Cell]:
    return [reported.coverage.get("overall"), reported.dominance.get("overall")]


def beside_paper(ranking: Ranking) -> Table | None:
    """Each of the paper's figures that this run has a counterpart of, with it; None without any."""
    rows: list[list[Cell]] = []

    def add(figure: str, reported: Reported, method: str, task: str | None = None) -> None:
        source = ranking.alone if method in ranking.alone.methods else ranking.pooled
        for indicator, part, paper in reported.figures():
            rows.append(
                [
                    f"{figure}: {indicator.capitalize()}, {part}",
                    method,
                    paper,
                    source.estimate(indicator, method, part, task),
                ]
            )

    for name, family in _headline_rows(ranking):
        if ANY in name or family not in SINGLES:
            add(f"headline, {family}", reference("headline").of(family), name)
    for name in ranking.ranked("BACo"):
        add("routers", reference("routers").of(name), name)
    best = ranking.best("BACo")
    for scores in ranking.scores if best is not None else ():
        add(f"{scores.task}, BACo", reference("tasks").of(scores.task), str(best), scores.task)
    if not rows:
        return None
    return Table(
        f"paper-{slug(ranking.pair)}",
        f"The paper's figures and those of {ranking.pair}, line by line",
        f"Shares from 0 to 1. The paper's headline is measured on "
        f"{reference('headline').measured_on}; its routers on {reference('routers').measured_on}; "
        "its figures by task are those of the best router. Normalisation is "
        f"by run, so only the order can be compared. {BRACKETS}",
        [
            Column("figure"),
            Column("method here"),
            Column("paper", "figure"),
            Column("here", "figure"),
        ],
        rows,
    )


def _headline_rows(ranking: Ranking) -> Iterator[tuple[str, Family]]:
    for family in SINGLES:
        if family + ANY in ranking.pooled.methods:
            yield family + ANY, family
            if f"{family}, temperature" in ranking.families:
                yield f"{family}, temperature", family
    others: tuple[Family, ...] = (
        "Nudging", "prompting", "ensemble", "mixing", "other", "BACo",
    )  # fmt: skip
    for family in others:
        name = ranking.best(family)
        if name is not None:
            yield name, family


def against(ranking: Ranking) -> Table | None:
    """The best router against every rival: difference of Coverage, interval, p-value."""
    best = ranking.best("BACo")
    if best is None or not ranking.rivals:
        return None
    columns = [Column(f"{best} minus")]
    for part in PARTS[::-1]:
        columns += [Column(f"{part}, difference", "signed"), Column(f"{part}, p", "p")]
    chosen = f"{ranking.part}, chosen on other prompts"
    columns += [Column(f"{chosen}, difference", "signed"), Column(f"{chosen}, p", "p")]
    rows: list[list[Cell]] = []
    for rival in ranking.rivals:
        row: list[Cell] = [rival]
        for part in PARTS[::-1]:
            row += _lead(ranking.compare(rival, part))
        row += _lead(ranking.tested_on_unseen_prompts(rival))
        rows.append(row)
    return Table(
        f"against-{slug(ranking.pair)}",
        f"{best} against its rivals on {ranking.pair}",
        f"Difference of Coverage; above zero, {best} is better. Paired over prompts, two-sided p, "
        f"not corrected for the number of rivals. {best} was chosen on these prompts; the last two "
        "columns have the best router of one half of the prompts tested on the other half.",
        columns,
        rows,
    )


def _lead(lead: Comparison | None) -> list[Cell]:
    if lead is None:
        return [None, None]
    return [Estimate(lead.difference, lead.low, lead.high), lead.p_value]


def claims(ranking: Ranking) -> Table | None:
    """On which indicators the best router is better than each rival; None without a rival."""
    best = ranking.best("BACo")
    judged: list[tuple[Indicator, str]] = [
        *(("coverage", part) for part in PARTS[::-1]),
        *(("coverage_at_k", part) for part in PARTS[::-1] if ranking.k is not None),
        *(("best_at_k", metric) for metric in single_metrics(ranking)),
    ]
    if best is None or not ranking.rivals:
        return None
    rows: list[list[Cell]] = [
        [rival, *(_claim(ranking.compare(rival, part, best, name)) for name, part in judged)]
        for rival in ranking.rivals
    ]
    return Table(
        f"claims-{slug(ranking.pair)}",
        f"Which claim holds on which indicator: {best} against its rivals on {ranking.pair}",
        "Better or worse: the 95% interval of the difference excludes zero and p is below 0.05; "
        f"else open. {at_k_note(ranking)}"
        + (
            f"Best of {ranking.k} settings: the mean of the best figure of all subsets of "
            f"{ranking.k} settings, for metrics that hold diversity and quality in one figure."
            if single_metrics(ranking)
            else ""
        ),
        [Column(f"{best} and")]
        + [Column(f"{indicator_title(name, ranking.k)}, {part}") for name, part in judged],
        rows,
    )


def outcome(lead: Comparison | None) -> str:
    """``better``, ``worse``, or ``open`` where no difference is shown."""
    if lead is None or lead.low <= 0 <= lead.high or lead.p_value >= 0.05:
        return "open"
    return "better" if lead.low > 0 else "worse"


def _claim(lead: Comparison | None) -> Cell:
    if lead is None:
        return None
    low, high = number(lead.low, "signed"), number(lead.high, "signed")
    return f"{outcome(lead)}, {number(lead.difference, 'signed')} [{low}, {high}]"


def single_metrics(ranking: Ranking) -> list[str]:
    """The metrics with diversity and quality in one figure that every task has."""
    draws = ranking.alone.draws
    counts = Counter(str(part) for indicator, _, part in draws if indicator == "best_at_k")
    return [name for name, count in counts.items() if count == len(ranking.alone.tasks)]


def acceptable(ranking: Ranking) -> Table | None:
    """The metrics with diversity and quality in one figure: the best of k settings."""
    metrics = single_metrics(ranking)
    if not metrics:
        return None
    columns = [Column("method")]
    for metric in metrics:
        columns += [Column(f"{metric}, best of {ranking.k}", "figure")]
        columns += [Column(f"{metric}, best setting"), Column(f"{metric}, there", "figure")]
    rows: list[list[Cell]] = []
    for name in ranking.ranked():
        row: list[Cell] = [name]
        for metric in metrics:
            setting, value = _best_setting(ranking, name, metric)
            row += [ranking.estimate("best_at_k", name, metric), setting, value]
        rows.append(row)
    rows.sort(key=lambda row: -row[1].value if isinstance(row[1], Estimate) else math.inf)
    return Table(
        f"acceptable-{slug(ranking.pair)}",
        f"Diversity among acceptable answers on {ranking.pair}",
        f"Effective metrics count only answers in the upper half of the quality scale, so noise is "
        f"not diverse; utility_k is the gain of a reader with patience {PATIENCE} who goes through "
        f"all samples of a prompt (NoveltyBench reads 10). First the mean of the best of "
        f"{ranking.k} settings, which is fair to methods with few; then the best setting, which is "
        f"chosen on these prompts and so looks a little better than it is. {BRACKETS}",
        columns,
        rows,
    )


def _best_setting(ranking: Ranking, method: str, metric: str) -> tuple[str | None, float | None]:
    """The setting of a method with the highest mean over tasks, and that mean."""
    by_setting: dict[str, list[float]] = {}
    for scores in ranking.scores:
        figures = scores.measured.figures(metric)
        if figures is None:
            return None, None
        for (owner, setting), mean in zip(scores.keys, figures.mean(axis=1), strict=True):
            if owner == method:
                by_setting.setdefault(setting, []).append(float(mean))
    means = {s: np.mean(m) for s, m in by_setting.items() if len(m) == len(ranking.scores)}
    if not means:
        return None, None
    best = max(means, key=lambda setting: means[setting])
    return best, float(means[best])


def routers(ranking: Ranking) -> Table | None:
    """The ablation over routers, with the paper's NoveltyBench figures beside."""
    paper = reference("routers")
    ranked = ranking.ranked("BACo")
    if not ranked:
        return None
    columns = [Column("router"), *_indicator_columns(ranking)]
    columns += [Column("paper: Coverage", "figure"), Column("paper: Dominance", "percent")]
    rows: list[list[Cell]] = [
        [name, *_indicators(ranking, name), *_overall(paper.of(name))] for name in ranked
    ]
    return Table(
        f"routers-{slug(ranking.pair)}",
        f"Routers on {ranking.pair}, the best first",
        f"Every router over its thresholds. {BRACKETS} The paper's figures are overall, on "
        f"{paper.measured_on}.",
        columns,
        rows,
        frozenset({0}),
    )


def methods(ranking: Ranking) -> Table:
    """Every method, the best first."""
    counts = dict.fromkeys(ranking.families, 0)
    for method in ranking.scores[0].measured.methods:
        counts[method] += 1
    columns = [Column("method"), Column("settings", "count"), *_indicator_columns(ranking)]
    ranked = ranking.ranked()
    best = ranking.best("BACo") if ranking.alone.spaces else None
    order = ", the best first" if ranking.alone.spaces else ""
    return Table(
        f"methods-{slug(ranking.pair)}",
        f"Every method on {ranking.pair}{order}",
        f"Coverage: normalised area that a method's settings dominate, 0 to 1. "
        f"{at_k_note(ranking)}Dominance: its share of the joint Pareto front of all methods. "
        f"{BRACKETS}",
        columns,
        [[name, float(counts[name]), *_indicators(ranking, name)] for name in ranked],
        frozenset(place for place, name in enumerate(ranked) if name == best),
    )


def subspaces(ranking: Ranking, indicator: Indicator) -> Table | None:
    """An indicator of every method in each sub-space; None where there is none."""
    form: Form = "percent" if indicator == "dominance" else "figure"
    known = ranking.alone.spaces
    if not known or (indicator == "coverage_at_k" and ranking.k is None):
        return None
    return Table(
        f"{slug(indicator)}-by-sub-space-{slug(ranking.pair)}",
        f"{indicator_title(indicator, ranking.k)} in every sub-space on {ranking.pair}",
        f"A column is a metric of diversity with one of quality. {BRACKETS}",
        [Column("method"), *(Column(f"{d} × {q}", form) for d, q in known)],
        [
            [name, *(ranking.estimate(indicator, name, space) for space in known)]
            for name in ranking.ranked()
        ],
    )


def across(rankings: Sequence[Ranking]) -> Table | None:
    """Overall Coverage of every method on every pair; None of a single pair."""
    if len(rankings) < 2:
        return None
    names = dict.fromkeys(name for ranking in rankings for name in ranking.ranked())
    columns = [Column("method"), Column("mean over pairs", "figure"), Column("best on", "count")]
    columns += [Column(ranking.pair, "figure") for ranking in rankings]
    rows: list[list[Cell]] = []
    for name in names:
        figures = [
            r.estimate("coverage", name, r.part) if name in r.families else None for r in rankings
        ]
        known = [figure.value for figure in figures if figure is not None]
        mean = float(np.mean(known)) if len(known) == len(rankings) else None
        rows.append([name, mean, float(sum(r.ranked()[0] == name for r in rankings)), *figures])
    rows.sort(key=lambda row: -row[1] if isinstance(row[1], float) else 1.0)
    return Table(
        "across-pairs",
        "Every method across the pairs",
        f"Coverage, {rankings[0].part}; `best on` counts the pairs where no method has more. "
        f"{BRACKETS}",
        columns,
        rows,
    )


def tasks(ranking: Ranking) -> Table | None:
    """Coverage of every method on every task; None of a single task."""
    if len(ranking.scores) < 2:
        return None
    columns = [Column("method")]
    columns += [Column(scores.task, "figure") for scores in ranking.scores]
    rows: list[list[Cell]] = [
        [name, *(ranking.alone.coverage(name, ranking.part, f.task) for f in ranking.scores)]
        for name in ranking.ranked()
    ]
    return Table(
        f"tasks-{slug(ranking.pair)}",
        f"Coverage by task on {ranking.pair}",
        f"Coverage, {ranking.part}, each task normalised by itself. {BRACKETS}",
        columns,
        rows,
    )


def categories(ranking: Ranking, scores: TaskScores) -> Table | None:
    """Coverage of the main methods on the prompts of every category; None without categories."""
    if not scores.categories:
        return None
    main = ranking.main
    rows: list[list[Cell]] = []
    for category in scores.categories:
        alone = indicators([scores.only(category)], resamples=1)
        values = [alone.coverage(name, ranking.part) for name in main]
        count = len(scores.only(category).prompts)
        rows.append(
            [category, float(count), *(None if value is None else value.value for value in values)]
        )
    return Table(
        f"categories-{slug(ranking.pair)}-{slug(scores.task)}",
        f"Coverage by category of {scores.task} on {ranking.pair}",
        f"Coverage, {ranking.part}, each category normalised by itself; a few prompts each, so "
        "without intervals.",
        [Column("category"), Column("prompts", "count"), *(Column(m, "figure") for m in main)],
        rows,
    )


def accuracy(ranking: Ranking, scores: TaskScores) -> Table | None:
    """Right answers of every method; None where nothing verifies the task."""
    if scores.accuracy is None:
        return None
    chosen = balanced(scores, ranking.alone.spaces)
    weights = Resamples.of(len(scores.prompts)).counts / len(scores.prompts)
    rows: list[list[Cell]] = []
    for method in ranking.ranked():
        own = [row for row, (name, _) in enumerate(scores.keys) if name == method]
        if not own:
            continue
        means = {row: float(scores.accuracy[row].mean()) for row in own}
        top, low = max(own, key=lambda r: means[r]), min(own, key=lambda r: means[r])
        middle = scores.keys.index(chosen[method])
        row: list[Cell] = [method]
        for place in (top, middle, low):
            draws = weights @ scores.accuracy[place]
            ends = interval(draws, len(scores.prompts))
            row += [scores.keys[place][1], Estimate(means[place], *ends)]
        rows.append(row)
    heads = ("most accurate setting", "balanced setting", "least accurate setting")
    columns = [Column("method")]
    for head in heads:
        columns += [Column(head), Column(f"{head.split()[0]}, accuracy", "percent")]
    return Table(
        f"accuracy-{slug(ranking.pair)}-{slug(scores.task)}",
        f"Accuracy on {scores.task}, {ranking.pair}",
        "Share of samples that are right. The balanced setting is the one that covers most by "
        f"itself. {BRACKETS}",
        columns,
        rows,
    )


def points(ranking: Ranking, scores: TaskScores) -> Table:
    """Every operating point: its metrics, base share, length and speed."""
    names = list(scores.measured.metrics)
    columns = [Column("method"), Column("setting"), *(Column(name, "figure") for name in names)]
    if scores.accuracy is not None:
        columns.append(Column("accuracy", "percent"))
    columns += [Column("base share", "percent"), Column("tokens an answer", "short")]
    columns += [Column("cut at the limit", "percent"), Column("tokens/s", "round")]
    rows: list[list[Cell]] = []
    for place, key in enumerate(scores.keys):
        cost = scores.costs[key]
        row: list[Cell] = [*key, *(_known_mean(scores.measured.metrics[n][place]) for n in names)]
        row += [] if scores.accuracy is None else [float(scores.accuracy[place].mean())]
        share: Cell = MIXED if cost.mixed else cost.base_share
        row += [share, cost.tokens / cost.answers, cost.cut / cost.answers]
        # Mixing takes the answers that base and aligned have given already.
        mixed = ranking.families[key[0]] == "mixing"
        rows.append([*row, None if mixed else cost.tokens_per_second])
    return Table(
        f"points-{slug(ranking.pair)}-{slug(scores.task)}",
        f"Every setting on {scores.task}, {ranking.pair}",
        f"Means over {len(scores.prompts)} prompts, not normalised; higher is better in every "
        "metric. Speed is of all samples of a batch together, on the machine named below.",
        columns,
        rows,
    )


def _known_mean(figures: Floats) -> float | None:
    """The mean of the prompts with a figure; None where there is none, as of empty answers."""
    known = figures[~np.isnan(figures)]
    return float(known.mean()) if len(known) else None


def slug(text: str) -> str:
    """Text as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def indicator_title(indicator: Indicator, k: int | None) -> str:
    """An indicator's name in headings."""
    return {
        "coverage": "Coverage",
        "coverage_at_k": f"Coverage at {k} settings",
        "dominance": "Dominance",
        "best_at_k": f"Best of {k} settings",
    }[indicator]


def at_k_note(ranking: Ranking) -> str:
    """What Coverage at k settings is, for a caption; empty where no method has enough settings."""
    if ranking.k is None:
        return ""
    return (
        f"At {ranking.k} settings: the mean Coverage of all subsets of {ranking.k} settings, "
        "because more settings never cover less. "
    )


def _shown(ranking: Ranking) -> list[Indicator]:
    return [i for i in INDICATORS if i != "coverage_at_k" or ranking.k is not None]


def _indicator_columns(ranking: Ranking) -> list[Column]:
    return [
        Column(
            f"{indicator_title(indicator, ranking.k)}, {part}",
            "percent" if indicator == "dominance" else "figure",
        )
        for indicator in _shown(ranking)
        for part in PARTS[::-1]
    ]


def _indicators(ranking: Ranking, name: str) -> list[Cell]:
    return [
        ranking.estimate(indicator, name, part)
        for indicator in _shown(ranking)
        for part in PARTS[::-1]
    ]
