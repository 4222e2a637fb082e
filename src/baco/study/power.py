"""The power of a planned study, by simulation.

Whole studies are simulated from the plan's schedules and analysed as the plan says: clustered
errors, two one-sided tests for equivalence, Holm's correction over the planned contrasts. Power is
the share of studies that support a contrast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from baco.errors import BacoError
from baco.evaluation.indicators import Floats
from baco.study.clustering import Clusters, holm, mean
from baco.study.comparisons import Comparisons, comparisons
from baco.study.plan import Contrast, Plan
from baco.study.schedule import method_pairs
from baco.study.simulation import (
    Layout,
    Population,
    balanced_layout,
    contrast_layout,
    contrast_strengths,
    draw,
)
from baco.study.store import Judgment

STUDIES = 1000
# Judgments that are simulated at a time.
CHUNK = 2_000_000
# The searches for sufficient numbers end there.
MOST_RATERS, MOST_PROMPTS = 400, 400


@dataclass(frozen=True, slots=True)
class ContrastPower:
    """The power of one planned contrast.

    Attributes:
        contrast: of the plan.
        judgments: their number in the plan, before exclusions.
        power: share of simulated studies that support it, corrected for all planned contrasts.
        alone: the same without the correction.
        raters_needed: with the plan's prompts, for the power that the plan demands; None if
            `MOST_RATERS` are not sufficient.
        judgments_needed: of the contrast, with this number of raters.
        prompts_needed: with the plan's raters; None if `MOST_PROMPTS` are not sufficient.
    """

    contrast: Contrast
    judgments: int
    power: float
    alone: float
    raters_needed: int | None
    judgments_needed: int | None
    prompts_needed: int | None

    def sufficient(self, plan: Plan) -> bool:
        """Whether the plan has the power that it demands."""
        return self.power >= plan.analysis.power


def planned_power(
    plan: Plan,
    population: Population,
    *,
    excluded: float = 0.1,
    studies: int = STUDIES,
    seed: int = 0,
    search: bool = True,
) -> list[ContrastPower]:
    """The power of every planned contrast, and the raters that it needs.

    Args:
        plan: of the study.
        population: of the raters.
        excluded: share of raters who are excluded in the end.
        studies: number of simulated studies.
        seed: of the simulation.
        search: whether the sufficient number of raters is searched for.

    Raises:
        BacoError: a number out of its range, a plan without contrasts.
    """
    population.check()
    if not 0 <= excluded < 1:
        raise BacoError(f"--excluded is {excluded:g}: give a share from 0 to less than 1")
    if studies < 1:
        raise BacoError(f"--studies is {studies}: give 1 or more")
    if not plan.contrasts:
        raise BacoError("the plan has no contrasts: there is nothing to compute the power of")
    simulator = StudySimulator(plan, population, excluded, studies, seed)
    prompts = simulator.prompts
    corrected, alone = simulator.power(plan.raters, prompts)
    result = []
    for index, contrast in enumerate(plan.contrasts):
        raters_needed = prompts_needed = None
        if search:
            raters_needed = simulator.raters_needed(index)
            prompts_needed = simulator.prompts_needed(index)
        result.append(
            ContrastPower(
                contrast,
                simulator.judgments(contrast, plan.raters),
                float(corrected[index]),
                float(alone[index]),
                raters_needed,
                None if raters_needed is None else simulator.judgments(contrast, raters_needed),
                prompts_needed,
            )
        )
    return result


def _sufficient(power: Callable[[int], float], wanted: float, step: int, most: int) -> int | None:
    """The smallest multiple of `step`, up to `most`, that gives the power."""
    most = max(step, most // step * step)
    low, high = 0, step
    while power(high) < wanted:
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        if power(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


class StudySimulator:
    """Simulated studies of one plan with any number of raters and prompts.

    Args:
        plan: of the study.
        population: of the raters.
        excluded: share of raters who are excluded in the end.
        studies: number of simulated studies.
        seed: of the simulation.

    Attributes:
        pairs: of methods.
        prompts: the prompts that the plan compares on.
    """

    def __init__(
        self, plan: Plan, population: Population, excluded: float, studies: int, seed: int
    ) -> None:
        self._plan, self._population, self._excluded = plan, population, excluded
        self._studies, self._seed = studies, seed
        self._difference = population.difference()
        self._known: dict[tuple[int, int], tuple[Floats, Floats]] = {}
        self.pairs = len(method_pairs(plan))
        compared = {item.prompt for item in plan.items if item.kind == "comparison"}
        self.prompts = len(compared)

    def judgments(self, contrast: Contrast, raters: int) -> int:
        """Number of judgments of a contrast."""
        return len(contrast_layout(self._plan, contrast, raters).rater)

    def power(self, raters: int, prompts: int) -> tuple[Floats, Floats]:
        """The power of all contrasts with these numbers: corrected, and alone."""
        if (raters, prompts) not in self._known:
            generator = np.random.default_rng((self._seed, raters, prompts))
            p = np.stack(
                [
                    self._p_values(contrast, raters, prompts, generator)
                    for contrast in self._plan.contrasts
                ],
                axis=-1,
            )
            alpha = self._plan.analysis.alpha
            self._known[raters, prompts] = (holm(p) < alpha).mean(0), (p < alpha).mean(0)
        return self._known[raters, prompts]

    def raters_needed(self, index: int) -> int | None:
        """With the plan's prompts, the raters that a contrast needs."""
        return _sufficient(
            lambda raters: float(self.power(raters, self.prompts)[0][index]),
            self._plan.analysis.power,
            self.pairs,
            MOST_RATERS,
        )

    def prompts_needed(self, index: int) -> int | None:
        """With the plan's raters, the prompts that a contrast needs."""
        return _sufficient(
            lambda prompts: float(self.power(self._plan.raters, prompts)[0][index]),
            self._plan.analysis.power,
            2 * self.pairs,
            MOST_PROMPTS,
        )

    def _p_values(
        self, contrast: Contrast, raters: int, prompts: int, generator: np.random.Generator
    ) -> Floats:
        """One p-value for each study; 1 where the difference has the wrong sign."""
        plan = self._plan
        question = plan.question[contrast.question]
        layout = (
            contrast_layout(plan, contrast, raters)
            if prompts == self.prompts
            else balanced_layout(raters, prompts, self.pairs, plan.prompts_per_rater)
        )
        if not len(layout.rater):
            raise BacoError(f"no rater judges contrast {contrast.id!r}: the plan needs more items")
        strengths = contrast_strengths(plan, question, self._difference)
        places = [plan.methods.index(name) for name in (contrast.treatment, contrast.control)]
        chunk = max(1, min(self._studies, CHUNK // len(layout.rater)))
        parts = []
        for begin in range(0, self._studies, chunk):
            studies = min(chunk, self._studies - begin)
            drawn = draw(
                layout, strengths[places], question.form, self._population, generator, studies
            )
            kept = generator.random((studies, raters)) >= self._excluded
            values = np.where(layout.left == 0, drawn.difference, -drawn.difference)
            parts.append(
                contrast_p_values(contrast, layout, values, kept[:, layout.rater].astype(float))
            )
        return np.concatenate(parts)


def contrast_p_values(
    contrast: Contrast, layout: Layout, values: Floats, weights: Floats | None = None
) -> Floats:
    """The p-value of a contrast in each simulated study; 1 where the control is better.

    Args:
        contrast: with its test.
        layout: of the judgments.
        values: treatment minus control, [studies, N].
        weights: 0 for judgments that are excluded, [studies, N].
    """
    effect = mean(values, Clusters(layout.rater, layout.prompt), weights)
    if contrast.test == "equivalence":
        p = effect.equivalence(contrast.margin or 0.0)
    else:
        p = np.where(effect.value > 0, effect.two_sided(), 1.0)
    return np.nan_to_num(p, nan=1.0)


def pilot_population(
    plan: Plan, judgments: Sequence[Judgment], population: Population
) -> Population:
    """A population with the ties and spreads of a pilot's preferences.

    The covariance of two judgments that share only the rater is the variance between raters, that
    of two which share only the prompt the variance between prompts. Both are averaged over all
    preference questions and pairs of methods, and the spreads are those that give them.

    Args:
        plan: of the pilot.
        judgments: of the pilot, without excluded ones.
        population: for everything else.

    Raises:
        BacoError: there are too few judgments.
    """
    by_rater, by_prompt, ties, number = 0.0, 0.0, 0.0, 0
    for question in plan.questions:
        if question.form != "preference":
            continue
        table = comparisons(plan, question, judgments)
        for place, treatment in enumerate(plan.methods):
            for control in plan.methods[place + 1 :]:
                rows, values = table.between(treatment, control)
                covariances = _covariances(rows, values)
                if covariances is None:
                    continue
                by_rater += covariances[0] * len(rows)
                by_prompt += covariances[1] * len(rows)
                ties += float((values == 0).sum())
                number += len(rows)
    if not number:
        raise BacoError(
            "the pilot has no pair of methods that two raters judged on two prompts: collect more "
            "judgments, or leave out --pilot"
        )
    return _matching(population, by_rater / number, by_prompt / number, ties / number)


def _covariances(rows: Comparisons, values: Floats) -> tuple[float, float] | None:
    """Covariances of judgments that share the rater, and of those that share the prompt."""
    if len(rows) < 2:
        return None
    centered = values - values.mean()
    sums, pairs = [], []
    for indicator in rows.clusters.indicators:
        sums.append(float(((centered @ indicator) ** 2).sum()))
        pairs.append(float((indicator.sum(0) ** 2).sum()))
    raters, prompts, cells = range(3)
    if min(pairs[raters], pairs[prompts]) <= pairs[cells]:
        return None
    by_rater, by_prompt = (
        (sums[way] - sums[cells]) / (pairs[way] - pairs[cells]) for way in (raters, prompts)
    )
    # The mean is of the same judgments: the covariance of those that share nothing is below zero.
    apart = len(rows) ** 2 - pairs[raters] - pairs[prompts] + pairs[cells]
    base = (sums[cells] - sums[raters] - sums[prompts]) / apart if apart else 0.0
    return by_rater - base, by_prompt - base


def _matching(population: Population, by_rater: float, by_prompt: float, ties: float) -> Population:
    """The population without effects that has these variances of preferences and share of ties."""
    from scipy import optimize

    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()

    def moments(rater: float, prompt: float, tie: float) -> tuple[float, float, float]:
        utility = rater * nodes[:, None] + prompt * nodes
        odds = np.exp(utility / 2)
        tie_odds = 2 * tie / (1 - tie)
        total = odds + 1 / odds + tie_odds
        margin = (odds - 1 / odds) / total / 2
        return (
            float(weights @ (margin @ weights) ** 2),
            float(weights @ (margin.T @ weights) ** 2),
            float(weights @ (tie_odds / total) @ weights),
        )

    rater, prompt, tie = population.rater_spread, population.prompt_spread, population.ties
    for _ in range(20):
        wanted = (max(by_rater, 0.0), max(by_prompt, 0.0), min(max(ties, 0.0), 0.85))
        rater = _root(optimize, lambda x: moments(x, prompt, tie)[0] - wanted[0], 0.0, 6.0)  # noqa: B023
        prompt = _root(optimize, lambda x: moments(rater, x, tie)[1] - wanted[1], 0.0, 6.0)  # noqa: B023
        tie = _root(optimize, lambda x: moments(rater, prompt, x)[2] - wanted[2], 0.0, 0.9)  # noqa: B023
    return replace(population, rater_spread=rater, prompt_spread=prompt, ties=tie)


def _root(optimize: object, function: object, low: float, high: float) -> float:
    """Where an increasing function is zero; the nearer end where it is not."""
    if function(low) >= 0:  # type: ignore[operator]
        return low
    if function(high) <= 0:  # type: ignore[operator]
        return high
    return float(optimize.brentq(function, low, high))  # type: ignore[attr-defined]
