"""The analysis that a plan names: planned contrasts first, then everything that is exploratory.

`analyse` takes judgments and returns figures; it reads no files and knows no page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from baco.evaluation.indicators import Estimate, Floats
from baco.study.bradley_terry import LEFT, RIGHT, TIE, Strengths, davidson
from baco.study.clustering import Clusters, Ints, Mean, bootstrap_interval, holm, mean
from baco.study.comparisons import Comparisons, comparisons
from baco.study.exclusions import Conduct, Exclusion, conducts, exclude
from baco.study.inter_rater import Agreement, agreement
from baco.study.plan import POINTS, Contrast, Plan, Question
from baco.study.store import Judgment


@dataclass(frozen=True, slots=True)
class ContrastResult:
    """What the judgments say about a comparison of two methods on one question.

    Attributes:
        contrast: planned, or made for an exploratory comparison.
        judgments, raters, prompts: their numbers.
        wins, ties, losses: of the treatment.
        treatment_left: share of the judgments in which the treatment was on the left side.
        neutral: the estimate of two equal methods: 0.5 for a preference, 0 for a rating.
        estimate: the treatment's win rate, ties counting half; for a rating the difference in
            points. None where there are fewer than two raters or two prompts.
        p_value: of the contrast's test; None likewise.
        adjusted: for all planned contrasts; None for an exploratory comparison.
        bootstrap: percentile interval of the two-way cluster bootstrap, beside the estimate's.
    """

    contrast: Contrast
    judgments: int
    raters: int
    prompts: int
    wins: int
    ties: int
    losses: int
    treatment_left: float
    neutral: float
    estimate: Estimate | None
    p_value: float | None
    adjusted: float | None = None
    bootstrap: tuple[float, float] | None = None

    def supported(self, alpha: float) -> bool:
        """Whether the hypothesis is supported at the level `alpha` of the whole family."""
        if self.estimate is None or self.adjusted is None or self.adjusted >= alpha:
            return False
        return self.contrast.test == "equivalence" or self.estimate.value > self.neutral

    def verdict(self, alpha: float) -> str:
        """The outcome in words."""
        if self.estimate is None:
            return "too few raters or prompts"
        if self.contrast.test == "equivalence":
            return "equivalent" if self.supported(alpha) else "equivalence not shown"
        if self.supported(alpha):
            return "supported"
        if self.adjusted is not None and self.adjusted < alpha:
            return "the opposite is significant"
        return "not shown"


@dataclass(frozen=True, slots=True)
class Opinion:
    """The mean rating of a method on one question."""

    question: Question
    method: str
    ratings: int
    mean: Estimate | None


@dataclass(frozen=True, slots=True)
class SideBias:
    """How often the left side was preferred on one question, ties left out, and its p-value."""

    question: Question
    judgments: int
    left: Estimate | None
    p_value: float | None


@dataclass(frozen=True, slots=True)
class RaterResult:
    """One rater.

    Attributes:
        conduct: what the exclusion rules read.
        excluded: the reason, empty if the rater is kept.
        mean_rating: over all rating questions; None without ratings.
        agreement: how often others who judged the same comparison chose the same, over all
            preference questions; None where nobody else did.
    """

    conduct: Conduct
    excluded: str
    mean_rating: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True)
class StudyResults:
    """All figures of a study. Everything but `contrasts` is exploratory.

    Attributes:
        plan: the plan of the study.
        judgments: about comparisons, before exclusions.
        kept: after exclusions.
        contrasts: the planned ones, with exclusions applied.
        without_exclusions: the same with all judgments.
        comparisons: all pairs of methods on all questions.
        strengths: of the methods, by preference question; None where they are undetermined.
        opinions: mean ratings.
        agreements: between raters, by question.
        sides: biases to the left.
        raters: one by one.
        exclusions: all that was left out.
    """

    plan: Plan
    judgments: int
    kept: int
    contrasts: Sequence[ContrastResult]
    without_exclusions: Sequence[ContrastResult]
    comparisons: Sequence[ContrastResult]
    strengths: Sequence[tuple[Question, Strengths | None]]
    opinions: Sequence[Opinion]
    agreements: Sequence[tuple[Question, Agreement | None]]
    sides: Sequence[SideBias]
    raters: Sequence[RaterResult]
    exclusions: Sequence[Exclusion]


def analyse(plan: Plan, judgments: Sequence[Judgment]) -> StudyResults:
    """Analyse the judgments of a study as its plan says."""
    kept, exclusions = exclude(plan, judgments)
    tables = {q.id: comparisons(plan, q, kept) for q in plan.questions}
    everything = {q.id: comparisons(plan, q, judgments) for q in plan.questions}
    return StudyResults(
        plan=plan,
        judgments=sum(len(table) for table in everything.values()),
        kept=sum(len(table) for table in tables.values()),
        contrasts=planned_contrasts(plan, tables),
        without_exclusions=planned_contrasts(plan, everything),
        comparisons=[
            contrast_result(table, _exploratory(table.question, *pair), plan)
            for table in tables.values()
            for pair in combinations(plan.methods, 2)
        ],
        strengths=[
            (table.question, _strengths(table))
            for table in tables.values()
            if table.question.form == "preference"
        ],
        opinions=[
            _opinion(table, method)
            for table in tables.values()
            if table.question.form == "rating"
            for method in plan.methods
        ],
        agreements=[(table.question, _agreement(table)) for table in tables.values()],
        sides=[
            _side_bias(table) for table in tables.values() if table.question.form == "preference"
        ],
        raters=_raters(plan, judgments, everything, exclusions),
        exclusions=exclusions,
    )


def planned_contrasts(plan: Plan, tables: Mapping[str, Comparisons]) -> list[ContrastResult]:
    """The planned contrasts, with p-values adjusted by Holm's method.

    Args:
        plan: of the study.
        tables: the judgments, by question.
    """
    results = [
        contrast_result(tables[contrast.question], contrast, plan, bootstrap=True)
        for contrast in plan.contrasts
    ]
    if not results:
        return []
    p_values = [1.0 if r.p_value is None else r.p_value for r in results]
    return [
        replace(result, adjusted=None if result.p_value is None else float(adjusted))
        for result, adjusted in zip(results, holm(p_values), strict=True)
    ]


def contrast_result(
    table: Comparisons, contrast: Contrast, plan: Plan, *, bootstrap: bool = False
) -> ContrastResult:
    """A comparison of two methods, its p-value not adjusted."""
    rows, values = table.between(contrast.treatment, contrast.control)
    number = len(rows)
    estimate = p_value = drawn = None
    neutral = 0.5 if table.question.form == "preference" else 0.0
    if number:
        effect = mean(values, rows.clusters)
        estimate = _on_scale(effect, table.question)
        if estimate is not None:
            p = (
                effect.equivalence(contrast.margin or 0.0)
                if contrast.test == "equivalence"
                else effect.two_sided()
            )
            p_value = float(p)
            if bootstrap:
                low, high = bootstrap_interval(
                    values, rows.clusters, plan.analysis.resamples, plan.seed
                )
                drawn = (low + neutral, high + neutral)
    treated_left = rows.left == plan.methods.index(contrast.treatment)
    return ContrastResult(
        contrast=contrast,
        judgments=number,
        raters=len(np.unique(rows.rater)),
        prompts=len(np.unique(rows.prompt)),
        wins=int((values > 0).sum()),
        ties=int((values == 0).sum()),
        losses=int((values < 0).sum()),
        treatment_left=float(treated_left.mean()) if number else 0.0,
        neutral=neutral,
        estimate=estimate,
        p_value=p_value,
        bootstrap=drawn,
    )


def _on_scale(effect: Mean, question: Question) -> Estimate | None:
    """A mean difference as win rate, or in points."""
    if question.form == "rating":
        return effect.estimate(1 - POINTS, POINTS - 1)
    estimate = effect.estimate(-0.5, 0.5)
    if estimate is None:
        return None
    return Estimate(estimate.value + 0.5, estimate.low + 0.5, estimate.high + 0.5)


def _exploratory(question: Question, treatment: str, control: str) -> Contrast:
    return Contrast(
        f"{question.id}: {treatment} against {control}",
        question.id,
        treatment,
        control,
        "superiority",
        "",
    )


def _strengths(table: Comparisons) -> Strengths | None:
    if not len(table):
        return None
    outcome = np.where(table.difference > 0, LEFT, np.where(table.difference < 0, RIGHT, TIE))
    return davidson(table.left, table.right, outcome, len(table.methods), table.clusters)


def _opinion(table: Comparisons, method: str) -> Opinion:
    """The mean rating, over both sides."""
    number = table.methods.index(method)
    on_left, on_right = table.left == number, table.right == number
    ratings = np.concatenate([table.left_rating[on_left], table.right_rating[on_right]])
    rater = np.concatenate([table.rater[on_left], table.rater[on_right]])
    prompt = np.concatenate([table.prompt[on_left], table.prompt[on_right]])
    if not len(ratings):
        return Opinion(table.question, method, 0, None)
    clusters = Clusters(rater, prompt).at(np.arange(len(rater)))
    return Opinion(
        table.question, method, len(ratings), mean(ratings, clusters).estimate(1, POINTS)
    )


def _agreement(table: Comparisons) -> Agreement | None:
    """Agreement on comparisons, or on the ratings of each method's answers to each prompt."""
    if not len(table):
        return None
    if table.question.form == "preference":
        ratings, prompt = _choices(table)
        return agreement(ratings, prompt, 3)
    methods, prompts = len(table.methods), len(table.prompts)
    ratings = np.full((prompts * methods, len(table.raters)), np.nan)
    for method, rating in ((table.left, table.left_rating), (table.right, table.right_rating)):
        ratings[table.prompt * methods + method, table.rater] = rating - 1
    return agreement(ratings, np.arange(prompts * methods) // methods, POINTS)


def _choices(table: Comparisons) -> tuple[Floats, Ints]:
    """Preferences [items, raters] whatever the sides were, and the prompt of every item.

    0 where the method of the higher number is preferred, 1 for a tie, 2 for the other one.
    """
    choices = np.full((len(table.items), len(table.raters)), np.nan)
    as_numbered = np.where(table.left < table.right, table.difference, -table.difference)
    choices[table.item, table.rater] = 2 * as_numbered + 1
    prompt = np.zeros(len(table.items), dtype=np.int64)
    prompt[table.item] = table.prompt
    return choices, prompt


def _side_bias(table: Comparisons) -> SideBias:
    decided = np.flatnonzero(table.difference != 0)
    if not len(decided):
        return SideBias(table.question, 0, None, None)
    rows = table.at(decided)
    effect = mean(rows.difference, rows.clusters)
    left = _on_scale(effect, table.question)
    p_value = None if left is None else float(effect.two_sided())
    return SideBias(table.question, len(decided), left, p_value)


def _raters(
    plan: Plan,
    judgments: Sequence[Judgment],
    tables: Mapping[str, Comparisons],
    exclusions: Sequence[Exclusion],
) -> list[RaterResult]:
    reasons = {e.rater: e.reason for e in exclusions if e.item is None}
    ratings: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for table in tables.values():
        if not len(table):
            continue
        if table.question.form == "rating":
            for rater, left, right in zip(
                table.rater, table.left_rating, table.right_rating, strict=True
            ):
                ratings.setdefault(table.raters[rater], []).extend((left, right))
            continue
        choices, _ = _choices(table)
        given = ~np.isnan(choices)
        others = given.sum(1, keepdims=True) - 1
        same = (choices[:, :, None] == choices[:, None, :]).sum(2) - 1
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(given & (others > 0), same / others, np.nan)
        for number, rater in enumerate(table.raters):
            own = share[:, number]
            shares.setdefault(rater, []).extend(own[~np.isnan(own)].tolist())
    return [
        RaterResult(
            conduct=conduct,
            excluded=reasons.get(conduct.rater, ""),
            mean_rating=_mean(ratings.get(conduct.rater, [])),
            agreement=_mean(shares.get(conduct.rater, [])),
        )
        for conduct in conducts(plan, judgments)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
