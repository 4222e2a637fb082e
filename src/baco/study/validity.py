"""How far automatic metrics say what raters say, on the very answers that raters saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from baco.errors import BacoError
from baco.evaluation.indicators import Estimate, Floats
from baco.evaluation.inference import interval
from baco.evaluation.metrics import Metric, MetricUnavailable, entry, metric
from baco.evaluation.records import Prompt
from baco.evaluation.score import OFFLINE_ROLES, needs_hub, requested_metrics
from baco.evaluation.store import Run
from baco.study.comparisons import Comparisons, comparisons
from baco.study.plan import Plan, Question, Stimulus, Unit
from baco.study.store import Judgment
from baco.study.study import Study

# Metrics that are compared with the questions of a dimension, and the unit they are computed on.
METRICS: Mapping[str, tuple[Unit, Sequence[str]]] = {
    "diversity": ("set", ("distinct_k", "embedding_distance", "self_bleu")),
    "quality": ("answer", ("reward", "perplexity")),
}
# Fewer comparisons have no correlation worth reporting.
FEWEST_ITEMS = 5

Scores = Mapping[str, Mapping[str, float]]  # by metric, by stimulus


@dataclass(frozen=True, slots=True)
class Correlation:
    """A metric beside a question, comparison by comparison.

    Attributes:
        question: with several raters per comparison, whose judgments are averaged.
        metric: its name.
        items: comparisons that have both.
        rank: Spearman's correlation of the raters' difference of the two sides with the metric's
            difference, with a bootstrap interval over prompts; None where one of them is constant.
        same: share of the comparisons with a difference in both in which both prefer the same side;
            None where there are none.
    """

    question: Question
    metric: str
    items: int
    rank: Estimate | None
    same: float | None


@dataclass(frozen=True, slots=True)
class Validity:
    """Metrics beside judgments.

    Attributes:
        correlations: by comparison.
        means: of a metric on the answers that were shown, by metric and method.
        unavailable: metrics that could not be computed, and why, in a sentence.
    """

    correlations: Sequence[Correlation]
    means: Mapping[str, Mapping[str, float]]
    unavailable: Mapping[str, str]


def validity(
    study: Study,
    judgments: Sequence[Judgment],
    run: Run | None = None,
    models: Mapping[str, str] | None = None,
    resamples: int = 1000,
) -> Validity:
    """Compute the metrics on the answers shown, and compare them with the judgments.

    Args:
        study: with its texts.
        judgments: without excluded ones.
        run: the run that the answers come from; without it metrics see the prompts' texts only.
        models: for the metrics, by role.
        resamples: of prompts, for the intervals.

    Raises:
        BacoError: a run that is not the one of the plan.
    """
    if run is not None:
        check_run(study.plan, run)
    plan = study.plan
    scores, unavailable = _scores(study, run, models or {})
    correlations = [
        _correlation(plan, table, name, scores[name], resamples)
        for question in plan.questions
        if question.dimension in METRICS
        and METRICS[question.dimension][0] == question.unit
        and len(table := comparisons(plan, question, judgments))
        for name in METRICS[question.dimension][1]
        if name in scores
    ]
    means = {
        name: {
            method: float(np.mean(own))
            for method in plan.methods
            if (own := [v for id, v in of.items() if plan.stimulus[id].method == method])
        }
        for name, of in scores.items()
    }
    return Validity(correlations, means, unavailable)


def check_run(plan: Plan, run: Run) -> None:
    """Check that a plan's answers can come from a run.

    Raises:
        BacoError: the run lacks the plan's task or one of its methods.
    """
    tasks = [task["name"] for task in run.config["tasks"]]
    labels = [setting.label for setting in run.settings]
    missing = next((m for m in plan.methods if m not in labels), None)
    if plan.origin.task not in tasks:
        lacking = f"task {plan.origin.task!r}"
    elif missing is not None:
        lacking = f"method {missing!r}"
    else:
        return
    raise BacoError(
        f"{run.path} has no {lacking}, which the study's answers come from: give the run "
        f"{plan.origin.run!r}"
    )


def _scores(
    study: Study, run: Run | None, models: Mapping[str, str]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Every metric of every stimulus of a comparison, and the metrics that are unavailable."""
    plan = study.plan
    shown = {
        id for item in plan.items if item.kind == "comparison" for id in (item.first, item.second)
    }
    scores: dict[str, dict[str, float]] = {}
    unavailable: dict[str, str] = {}
    for unit, names in METRICS.values():
        stimuli = [s for s in plan.stimuli if s.id in shown and s.unit == unit]
        prompts = [_prompt(study, run, stimulus) for stimulus in stimuli]
        answers = [study.answers(stimulus) for stimulus in stimuli]
        for name in names:
            built = _built(plan, run, name, models)
            if isinstance(built, str):
                unavailable[name] = built
                continue
            values = built.score(prompts, answers)
            scores[name] = {
                stimulus.id: float(value)
                for stimulus, value in zip(stimuli, values, strict=True)
                if value is not None
            }
    return scores, unavailable


def _built(plan: Plan, run: Run | None, name: str, models: Mapping[str, str]) -> Metric | str:
    """A metric, ready to score, or why there is none."""
    missing = set(entry(name).models) - set(models) - OFFLINE_ROLES
    try:
        if run is not None:
            (request,) = requested_metrics(run, [name], models)
            why = None if not missing else needs_hub(request)
            return why or request.build(plan.origin.task)
        if missing:
            role = min(missing)
            return (
                f"{name} needs a model for {role!r}: give --run with the run of the answers, or "
                f"--model {role}=ID_OR_FOLDER"
            )
        return metric(name, **{r: m for r, m in models.items() if r in entry(name).models})
    except MetricUnavailable as error:
        return str(error)


def _prompt(study: Study, run: Run | None, stimulus: Stimulus) -> Prompt:
    known: Any = (
        None if run is None else run.prompts().get((study.plan.origin.task, stimulus.prompt))
    )
    if known is not None:
        prompt: Prompt = known
        return prompt
    text = study.prompt_text(stimulus.prompt)
    return Prompt(stimulus.prompt, ({"role": "user", "content": text},))


def _correlation(
    plan: Plan, table: Comparisons, name: str, scores: Mapping[str, float], resamples: int
) -> Correlation:
    judged, measured, prompts = [], [], []
    for number, id in enumerate(table.items):
        rows = table.item == number
        item = plan.item[id]
        if item.first not in scores or item.second not in scores or not rows.any():
            continue
        first = plan.methods.index(plan.stimulus[item.first].method)
        sign = np.where(table.left[rows] == first, 1.0, -1.0)
        judged.append(float((sign * table.difference[rows]).mean()))
        measured.append(scores[item.first] - scores[item.second])
        prompts.append(int(table.prompt[rows][0]))
    ours, theirs = np.array(judged), np.array(measured)
    rank = None
    if len(ours) >= FEWEST_ITEMS:
        rank = _rank_correlation(ours, theirs, np.array(prompts), resamples)
    decided = (ours * theirs) != 0
    same = float((ours * theirs > 0)[decided].mean()) if decided.any() else None
    return Correlation(table.question, name, len(ours), rank, same)


def _rank_correlation(
    ours: Floats, theirs: Floats, prompts: Any, resamples: int
) -> Estimate | None:
    """Spearman's correlation with a percentile interval of the bootstrap over prompts."""
    whole = _spearman(ours, theirs)
    if whole is None:
        return None
    generator = np.random.default_rng(0)
    names = np.unique(prompts)
    rows_of = [np.flatnonzero(prompts == name) for name in names]
    draws = []
    for _ in range(resamples):
        rows = np.concatenate([rows_of[i] for i in generator.integers(0, len(names), len(names))])
        drawn = _spearman(ours[rows], theirs[rows])
        if drawn is not None:
            draws.append(drawn)
    return Estimate(whole, *interval(np.array(draws)))


def _spearman(a: Floats, b: Floats) -> float | None:
    from scipy import stats

    a, b = stats.rankdata(a), stats.rankdata(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
