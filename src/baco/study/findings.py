"""What a study found, as sentences and tables, for the page, Markdown, CSV and `baco report`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from baco.evaluation.indicators import Estimate
from baco.evaluation.report.tables import Cell, Column, Section, Table, number, written
from baco.study.analysis import ContrastResult, StudyResults
from baco.study.plan import Plan, Question
from baco.study.store import PlanVersion
from baco.study.validity import METRICS, Validity

SIMULATED = (
    "SIMULATED RATERS. No person judged anything here: the judgments were drawn from a model of "
    "raters, to test the study before people see it. No figure is a human result."
)
MIXED = (
    "SIMULATED RATERS are among the raters. Their judgments were drawn from a model of raters, so "
    "no figure that includes them is a human result."
)
# Whose judgments a report is made of, by its warning.
RATERS = {"": "human", SIMULATED: "simulated", MIXED: "human and simulated"}
BRACKETS = (
    "Brackets are 95% t intervals with errors clustered by raters and prompts, so they hold for "
    "other raters and other prompts."
)
EXPLORATORY = "Exploratory: not planned, and no p-value is corrected."
DEFINITIONS = (
    "Win rate: the share of judgments that prefer a method, ties counting half; 50% is no "
    "difference.",
    "Supported: Holm's p-value over all planned contrasts is below the plan's α, and the "
    "difference has the planned direction.",
    "Equivalent: two one-sided tests reject both a loss and a gain of the margin or more (TOST). A "
    "difference that is not significant does not show equivalence.",
    "Interval: mean ± t · error. The variance is V(raters) + V(prompts) − V(rater and prompt), "
    "each with its small-sample factor, and at least the largest of them; the degrees of freedom "
    "are Satterthwaite's. It was chosen by its coverage in simulated studies.",
    "Strength: log odds of Davidson's form of the Bradley–Terry model, which has a parameter for "
    "ties; the strengths sum to zero.",
    "Agreement: Krippendorff's alpha and Gwet's AC2, both ordinal. 1 is perfect agreement, 0 what "
    "chance gives. Intervals are the jackknife's over raters and over prompts.",
)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the report.

    Attributes:
        name: its id.
        title: its heading.
        text: paragraphs.
        tables: of figures.
    """

    name: str
    title: str
    text: Sequence[str]
    tables: Sequence[Table]


@dataclass(frozen=True, slots=True)
class Findings:
    """A study's report, apart from its form.

    Attributes:
        title: of the report.
        lead: what was compared, by whom.
        warning: a sentence that says that raters are simulated; empty for a study with people.
        outcomes: a sentence for each planned contrast.
        parts: with tables; the first has the planned contrasts.
        facts: of the plan, by name.
        questions: as raters read them, with their anchors.
    """

    title: str
    lead: str
    warning: str
    outcomes: Sequence[str]
    parts: Sequence[Part]
    facts: Sequence[tuple[str, str]]
    questions: Sequence[tuple[str, Sequence[str]]]

    @property
    def tables(self) -> list[Table]:
        """Every table, in order."""
        return [table for part in self.parts for table in part.tables]

    def section(self) -> Section:
        """The study as a section of the report of a run: the planned contrasts, and what they say.

        The names of tables begin with ``study-``.
        """
        first = self.parts[0]
        return Section(
            "study",
            "What raters say" if not self.warning else "What raters say (simulated)",
            "Raters",
            [text for text in (self.warning, self.lead, *self.outcomes, *first.text) if text],
            [replace(table, name=f"study-{table.name}") for table in first.tables],
        )


def findings(
    results: StudyResults,
    validity: Validity,
    versions: Sequence[PlanVersion],
    origins: Sequence[str],
) -> Findings:
    """Put a study's figures into sentences and tables.

    Args:
        results: of the analysis.
        validity: of the metrics.
        versions: of the plan.
        origins: of the raters who judged comparisons.
    """
    plan = results.plan
    simulated = sum(origin == "simulated" for origin in origins)
    warning = "" if not simulated else SIMULATED if simulated == len(origins) else MIXED
    kept = len({r.conduct.rater for r in results.raters if not r.excluded})
    lead = (
        f"{len(plan.methods)} methods on {plan.origin.task}: {results.judgments:,} judgments of "
        f"{len(results.raters)} {'simulated ' if simulated == len(origins) and simulated else ''}"
        f"raters, {results.kept:,} of {kept} raters after exclusions."
    )
    parts = [
        _planned(results),
        _robustness(results),
        _every_comparison(results),
        _strengths(results),
        _opinions(results),
        _agreement(results),
        _metrics(results, validity),
        _biases(results),
        _exclusions(results),
    ]
    suffix = {"": "", SIMULATED: " (simulated raters)", MIXED: " (some raters simulated)"}[warning]
    return Findings(
        title=f"Human evaluation: {plan.methods[0]}{suffix}",
        lead=lead,
        warning=warning,
        outcomes=[outcome(plan, result) for result in results.contrasts],
        parts=[part for part in parts if part.tables or part.text],
        facts=_facts(results, versions),
        questions=[(question.text, question.anchors) for question in plan.questions],
    )


def outcome(plan: Plan, result: ContrastResult) -> str:
    """A planned contrast in a sentence."""
    contrast = result.contrast
    verdict = result.verdict(plan.analysis.alpha)
    head = f"{verdict[0].upper()}{verdict[1:]}: {contrast.hypothesis}"
    if result.estimate is None or result.adjusted is None:
        return f"{head} There are {result.judgments} judgments of {_count(result.raters, 'rater')}."
    question = plan.question[contrast.question]
    if question.form == "preference":
        figure = f"{contrast.treatment} wins {written(result.estimate, 'percent')}"
    else:
        figure = f"The difference is {written(result.estimate, 'signed')} points"
    p = number(result.adjusted, "p")
    return f"{head} {figure}, Holm's p {p if p.startswith('<') else '= ' + p}."


def _count(value: int, noun: str) -> str:
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"


def _estimates(result: ContrastResult) -> list[Cell]:
    """The estimate under win rate, or under the difference in points."""
    if result.neutral == 0.5:
        return [result.estimate, None]
    return [None, result.estimate]


def _planned(results: StudyResults) -> Part:
    plan = results.plan
    columns = [
        Column("contrast"),
        Column("question"),
        Column("test"),
        Column("wins", "count"),
        Column("ties", "count"),
        Column("losses", "count"),
        Column("win rate", "percent"),
        Column("points", "signed"),
        Column("p", "p"),
        Column("p (Holm)", "p"),
        Column("outcome"),
    ]
    rows: list[list[Cell]] = []
    for result in results.contrasts:
        c = result.contrast
        margin = "" if c.margin is None else f" ±{c.margin:g}"
        rows.append(
            [
                f"{c.treatment} against {c.control}" + (" (primary)" if c.primary else ""),
                c.question,
                f"{c.test}{margin}",
                result.wins,
                result.ties,
                result.losses,
                *_estimates(result),
                result.p_value,
                result.adjusted,
                result.verdict(plan.analysis.alpha),
            ]
        )
    marked = frozenset(
        i for i, r in enumerate(results.contrasts) if r.supported(plan.analysis.alpha)
    )
    table = Table(
        "contrasts",
        "Planned contrasts",
        f"Wins and losses are the treatment's, which is named first. {BRACKETS} Points are the "
        "difference of ratings on the scale from 1 to 5.",
        columns,
        rows,
        marked,
    )
    return Part("contrasts-part", "Planned contrasts", (), [table] if rows else [])


def _robustness(results: StudyResults) -> Part:
    plan = results.plan
    columns = [
        Column("contrast"),
        Column("judgments", "count"),
        Column("raters", "count"),
        Column("prompts", "count"),
        Column("treatment left", "percent"),
        Column("estimate", "figure"),
        Column("bootstrap", "text"),
        Column("all judgments: n", "count"),
        Column("all judgments: estimate", "figure"),
        Column("all judgments: p (Holm)", "p"),
        Column("all judgments: outcome"),
    ]
    rows: list[list[Cell]] = []
    for main, whole in zip(results.contrasts, results.without_exclusions, strict=True):
        drawn = (
            None
            if main.bootstrap is None
            else f"[{number(main.bootstrap[0], 'figure')}, {number(main.bootstrap[1], 'figure')}]"
        )
        rows.append(
            [
                f"{main.contrast.question}: against {main.contrast.control}",
                main.judgments,
                main.raters,
                main.prompts,
                main.treatment_left,
                main.estimate,
                drawn,
                whole.judgments,
                whole.estimate,
                whole.adjusted,
                whole.verdict(plan.analysis.alpha),
            ]
        )
    table = Table(
        "robustness",
        "The same contrasts, otherwise",
        "Bootstrap: percentile interval of the two-way cluster bootstrap over raters and prompts. "
        "All judgments: nothing excluded. Treatment left: 50% is perfectly counterbalanced. "
        "Estimates are win rates from 0 to 1, or differences in points.",
        columns,
        rows,
    )
    return Part("robustness-part", "With and without exclusions", (), [table] if rows else [])


def _every_comparison(results: StudyResults) -> Part:
    columns = [
        Column("methods"),
        Column("question"),
        Column("judgments", "count"),
        Column("wins", "count"),
        Column("ties", "count"),
        Column("losses", "count"),
        Column("win rate", "percent"),
        Column("points", "signed"),
        Column("p (exploratory)", "p"),
    ]
    rows: list[list[Cell]] = [
        [
            f"{r.contrast.treatment} against {r.contrast.control}",
            r.contrast.question,
            r.judgments,
            r.wins,
            r.ties,
            r.losses,
            *_estimates(r),
            r.p_value,
        ]
        for r in results.comparisons
        if r.judgments
    ]
    table = Table(
        "comparisons",
        "Every pair of methods on every question",
        f"{EXPLORATORY} {BRACKETS}",
        columns,
        rows,
    )
    return Part("comparisons-part", "Every comparison", (), [table] if rows else [])


def _strengths(results: StudyResults) -> Part:
    columns = [
        Column("question"),
        *(Column(method, "signed") for method in results.plan.methods),
        Column("ties", "signed"),
    ]
    rows: list[list[Cell]] = []
    for question, strengths in results.strengths:
        empty: list[Cell] = [None] * len(results.plan.methods)
        cells = empty if strengths is None else [*strengths.methods]
        rows.append([question.id, *cells, None if strengths is None else strengths.tie])
    table = Table(
        "strengths",
        "Strengths of the methods",
        f"{EXPLORATORY} Log odds of the Bradley–Terry model with ties; ties: the log odds of a tie "
        "between equal methods. A dash: the judgments do not determine them, because some method "
        f"was never preferred to another. {BRACKETS}",
        columns,
        rows,
    )
    return Part("strengths-part", "Strengths", (), [table] if rows else [])


def _opinions(results: StudyResults) -> Part:
    columns = [Column("question"), *(Column(m, "figure") for m in results.plan.methods)]
    questions: dict[str, list[Cell]] = {}
    for opinion in results.opinions:
        questions.setdefault(opinion.question.id, []).append(opinion.mean)
    table = Table(
        "opinions",
        "Mean ratings of the methods",
        f"{EXPLORATORY} Mean ratings on the scale from 1 to 5. {BRACKETS}",
        columns,
        [[question, *cells] for question, cells in questions.items()],
    )
    return Part("opinions-part", "Mean opinion scores", (), [table] if questions else [])


def _agreement(results: StudyResults) -> Part:
    columns = [
        Column("question"),
        Column("units", "count"),
        Column("raters", "count"),
        Column("equal pairs", "percent"),
        Column("alpha", "figure"),
        Column("Gwet's AC2", "figure"),
    ]
    rows: list[list[Cell]] = [
        [question.id, a.units, a.raters, a.equal, a.alpha, a.gwet]
        for question, a in results.agreements
        if a is not None
    ]
    table = Table(
        "agreement",
        "Agreement between raters",
        "Units: comparisons, or for ratings the answers of a method to a prompt, that two raters "
        "or more judged. Equal pairs: of all pairs of raters on a unit, the share with the same "
        "answer. Preferences are often close calls, on which raters who read well disagree.",
        columns,
        rows,
    )
    return Part("agreement-part", "Agreement", (), [table] if rows else [])


def _metrics(results: StudyResults, validity: Validity) -> Part:
    tables = []
    if validity.correlations:
        tables.append(
            Table(
                "metrics-by-comparison",
                "Metrics beside raters, by comparison",
                "Spearman's correlation of the raters' mean difference between two methods' "
                "answers to a prompt with the metric's difference, on the very answers shown; "
                "brackets are 95% bootstrap intervals over prompts. Same side: of the comparisons "
                f"where both have a difference, the share in which they agree. {EXPLORATORY}",
                [
                    Column("question"),
                    Column("metric"),
                    Column("comparisons", "count"),
                    Column("correlation", "signed"),
                    Column("same side", "percent"),
                ],
                [[c.question.id, c.metric, c.items, c.rank, c.same] for c in validity.correlations],
            )
        )
    if validity.means:
        tables.append(_by_method(results, validity))
    text = [f"{reason}." for reason in validity.unavailable.values()]
    return Part("metrics-part", "Automatic metrics", text, tables)


def _by_method(results: StudyResults, validity: Validity) -> Table:
    """Metrics and human figures of every method."""
    plan = results.plan
    ratings = {(o.question.id, o.method): o.mean for o in results.opinions if o.mean is not None}
    questions = [q for q in plan.questions if q.form == "rating" and q.dimension in METRICS]
    rows: list[list[Cell]] = []
    for method in plan.methods:
        human: list[Cell] = [
            None if (mean := ratings.get((q.id, method))) is None else mean.value for q in questions
        ]
        rows.append([method, *human, *(means.get(method) for means in validity.means.values())])
    return Table(
        "metrics-by-method",
        "Metrics beside raters, by method",
        "Mean ratings of raters, then means of the metrics over the answers shown; higher is more "
        f"diverse or better. {EXPLORATORY}",
        [
            Column("method"),
            *(Column(q.id, "figure") for q in questions),
            *(Column(name, "figure") for name in validity.means),
        ],
        rows,
    )


def _biases(results: StudyResults) -> Part:
    sides = Table(
        "sides",
        "Preference for the left side",
        "Share of left among preferences without ties; 50% is no bias. Left and right are "
        f"counterbalanced within each rater, so a bias moves no contrast. {BRACKETS}",
        [
            Column("question"),
            Column("judgments", "count"),
            Column("left", "percent"),
            Column("p (exploratory)", "p"),
        ],
        [[s.question.id, s.judgments, s.left, s.p_value] for s in results.sides if s.judgments],
    )
    raters = Table(
        "raters",
        "Raters, one by one",
        "Checks failed, of all answered; fast: comparisons answered in less than the minimum "
        "reading time; agreement: how often others who judged the same comparison chose the same.",
        [
            Column("rater"),
            Column("comparisons", "count"),
            Column("checks failed"),
            Column("fast", "count"),
            Column("median seconds", "short"),
            Column("left", "percent"),
            Column("ties", "percent"),
            Column("mean rating", "figure"),
            Column("agreement", "percent"),
            Column("excluded"),
        ],
        [
            [
                r.conduct.rater,
                r.conduct.items,
                f"{r.conduct.failed} of {r.conduct.checks}",
                r.conduct.fast,
                r.conduct.seconds,
                _share(r.conduct.left, r.conduct.left + r.conduct.right),
                _share(r.conduct.ties, r.conduct.left + r.conduct.right + r.conduct.ties),
                r.mean_rating,
                r.agreement,
                "yes" if r.excluded else "no",
            ]
            for r in results.raters
        ],
        frozenset(i for i, r in enumerate(results.raters) if r.excluded),
    )
    tables = [table for table in (sides, raters) if table.rows]
    return Part("biases-part", "Biases of sides and raters", (), tables)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _exclusions(results: StudyResults) -> Part:
    table = Table(
        "exclusions",
        "Everything that was excluded, and why",
        "The rules are the plan's. The first rule that applies to a rater is named.",
        [Column("rater"), Column("what"), Column("judgments", "count"), Column("reason")],
        [
            [
                e.rater,
                "all judgments" if e.item is None else f"item {e.item}",
                e.judgments,
                e.reason,
            ]
            for e in results.exclusions
        ],
    )
    if not results.exclusions:
        return Part("exclusions-part", "Exclusions", (), [])
    return Part("exclusions-part", "Exclusions", (), [table])


def _facts(results: StudyResults, versions: Sequence[PlanVersion]) -> list[tuple[str, str]]:
    plan = results.plan
    rules = plan.exclusions
    facts = [("plan", plan.hash)]
    if len(versions) > 1:
        facts += [
            (
                f"plan, version {v.version}",
                f"{v.hash}, adopted {datetime.fromtimestamp(v.adopted, UTC):%Y-%m-%d %H:%M} UTC"
                + (f": {v.reason}" if v.reason else ""),
            )
            for v in versions
        ]
        facts.append(
            ("change after the first answer", "yes: the plan has more than one version, see above")
        )
    else:
        facts.append(("change after the first answer", "none"))
    facts += [
        ("run", f"{plan.origin.run}, samples {plan.origin.samples}"),
        ("pair and task", f"{plan.origin.pair}, {plan.origin.task}"),
        ("methods", ", ".join(plan.methods)),
        ("raters planned", str(plan.raters)),
        ("answers of a set", str(plan.set_size)),
        (
            "longest answer",
            f"{plan.word_limit} words; cut: "
            + ", ".join(f"{method} {count}" for method, count in plan.cut.items()),
        ),
        ("α and correction", f"{plan.analysis.alpha:g}, Holm over {len(plan.contrasts)} contrasts"),
        (
            "exclusion rules",
            f"more than {rules.failed_checks} failed checks; more than {rules.fast_share:.0%} of "
            "comparisons too fast; single judgments too fast: "
            f"{'yes' if rules.fast_judgments else 'no'}; less than {rules.completed_share:.0%} "
            f"answered; one side in more than {rules.same_side_share:.0%}",
        ),
        ("minimum reading time", f"words / {plan.checks.words_per_second:g} seconds"),
        ("seed", str(plan.seed)),
    ]
    if plan.notes:
        facts.append(("notes", plan.notes))
    return facts


def marked(table: Table, warning: str) -> Table:
    """A table for a file of its own, with a column that says whose judgments it is made of."""
    return replace(
        table,
        columns=[*table.columns, Column("made from")],
        rows=[[*row, f"{RATERS[warning]} raters"] for row in table.rows],
    )


def estimate_rows(results: StudyResults) -> list[tuple[str, Question, Estimate, float, bool]]:
    """What the plot of the planned contrasts shows: label, question, estimate, neutral, outcome."""
    return [
        (
            f"{r.contrast.question}: {r.contrast.treatment} against {r.contrast.control}",
            results.plan.question[r.contrast.question],
            r.estimate,
            r.neutral,
            r.supported(results.plan.analysis.alpha),
        )
        for r in results.contrasts
        if r.estimate is not None
    ]
