"""The ranking of one pair's methods: indicators of every method, and of the pooled rivals.

A user who has only the aligned model may sample it in any way. So beside `aligned, temperature`,
`aligned, top-p` and `aligned, min-p` there is *aligned, any sampling*: all points of the three as
one method, which is the strictest rival. The same holds for base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from baco.evaluation.indicators import (
    Comparison,
    Difference,
    Estimate,
    Indicator,
    Indicators,
    Measured,
    Part,
    combined,
    fewest_settings,
    indicators,
)
from baco.evaluation.methods.method import Family
from baco.evaluation.pareto import coverage, normalised, pareto_front
from baco.evaluation.report.load_scores import Key, TaskScores

ANY = ", any sampling"
SINGLES: tuple[Family, ...] = ("base", "aligned")
PARTS = ("lexical", "semantic", "overall")


@dataclass(frozen=True, slots=True)
class Ranking:
    """The methods of one pair and their indicators.

    Attributes:
        pair: its name.
        scores: of each task that counts for Coverage.
        verified: scores of tasks with one right answer, where they are not the only tasks: there a
            different answer is an error.
        families: of every method, in the run's order.
        alone: indicators of every method by itself.
        pooled: the same with base and aligned as one method each, with any sampling.
        part: of the indicator that methods are ranked by: overall, or the only kind of diversity.
        halves: indicators of the pooled methods on the even and on the odd prompts; empty where
            halves are too small.
    """

    pair: str
    scores: Sequence[TaskScores]
    verified: Sequence[TaskScores]
    families: Mapping[str, Family]
    alone: Indicators
    pooled: Indicators
    part: str
    halves: Sequence[Indicators] = ()

    @property
    def every(self) -> list[TaskScores]:
        """Scores of all tasks."""
        return [*self.scores, *self.verified]

    def coverage(self, method: str) -> float:
        """The Coverage that a method is ranked by; -1 where it has none."""
        estimate = self.estimate("coverage", method, self.part)
        return -1.0 if estimate is None else estimate.value

    def estimate(self, indicator: Indicator, method: str, part: Part) -> Estimate | None:
        """An indicator of a method or of one of the pooled rivals."""
        source = self.alone if method in self.alone.methods else self.pooled
        return source.estimate(indicator, method, part)

    def ranked(self, family: Family | None = None) -> list[str]:
        """Methods, of one family or all, the highest Coverage first."""
        members = [m for m, group in self.families.items() if family in (None, group)]
        return sorted(members, key=lambda method: -self.coverage(method))

    def best(self, family: Family) -> str | None:
        """The method of a family with the highest Coverage."""
        ranked = self.ranked(family)
        return ranked[0] if ranked else None

    @property
    def rivals(self) -> list[str]:
        """What BACo is compared with: single models, Nudging, the best of every other family."""
        rivals = [family + ANY for family in SINGLES if family + ANY in self.pooled.methods]
        if "aligned, temperature" in self.families:
            rivals.insert(1, "aligned, temperature")
        others: tuple[Family, ...] = ("Nudging", "mixing", "ensemble", "prompting", "other")
        return rivals + [name for name in map(self.best, others) if name is not None]

    @property
    def main(self) -> list[str]:
        """The methods that stand out in plots: the best of every family, BACo first."""
        families: tuple[Family, ...] = (
            "BACo", "base", "aligned", "Nudging", "mixing", "ensemble", "prompting", "other",
        )  # fmt: skip
        return [name for name in map(self.best, families) if name is not None]

    @property
    def k(self) -> int | None:
        """Settings at which methods are compared in Coverage at k settings."""
        return self.alone.k

    def compare(
        self,
        rival: str,
        part: Part,
        router: str | None = None,
        indicator: Indicator = "coverage",
    ) -> Comparison | None:
        """A router, by default the best, against a rival, by default in Coverage."""
        router = self.best("BACo") if router is None else router
        if router is None:
            return None
        source = self.pooled if rival in self.pooled.methods else self.alone
        return source.compare(router, rival, indicator, part)

    @property
    def prompts(self) -> int:
        """Number of prompts of all tasks that count."""
        return sum(len(task.prompts) for task in self.scores)

    def on_unseen_prompts(self, rival: str) -> list[float]:
        """The leads of the router that is best on one half of the prompts, on the other half.

        Returns:
            One lead for each half that the router is measured on; empty where halves are too small,
            or the rival is not one of the pooled methods.
        """
        return [
            float(np.mean([difference.draws[0] for difference in differences]))
            for differences in self._unseen(rival)
        ]

    def tested_on_unseen_prompts(self, rival: str) -> Comparison | None:
        """The mean of both leads of `on_unseen_prompts`, with its interval and p-value.

        The best of many routers looks better than it is on the prompts it was chosen by. Here no
        router is tested on a prompt that it was chosen by.

        Returns:
            None where `on_unseen_prompts` has no leads.
        """
        differences = [part for of_half in self._unseen(rival) for part in of_half]
        return combined(differences) if differences else None

    def _unseen(self, rival: str) -> list[list[Difference]]:
        """Of each half, by task: the router that is best on the other half minus a rival."""
        routers = [method for method, group in self.families.items() if group == "BACo"]
        if not self.halves or rival not in self.halves[0].methods:
            return []
        leads = []
        for chosen_on, measured_on in (self.halves, self.halves[::-1]):
            estimates = {router: chosen_on.coverage(router, self.part) for router in routers}
            known = {router: e.value for router, e in estimates.items() if e is not None}
            if not known:
                return []
            best = max(known, key=lambda router: known[router])
            lead = measured_on.differences(best, rival, part=self.part)
            if lead is not None:
                leads.append(lead)
        return leads


def rank(
    pair: str, scores: Sequence[TaskScores], families: Mapping[str, Family], resamples: int = 2000
) -> Ranking:
    """Rank one pair's methods, by its tasks without right answers where there are any."""
    verified = [task for task in scores if task.accuracy is not None]
    open_ended = [task for task in scores if task.accuracy is None]
    if not open_ended:
        open_ended, verified = verified, []
    measured = [task.measured for task in open_ended]
    present = dict.fromkeys(method for task in measured for method in task.methods)
    own = {method: families[method] for method in present}
    alone = indicators(measured, resamples=resamples)
    # One k for both, so that their figures can be compared.
    k = fewest_settings(measured)
    pooled = indicators([_pooled(task, own) for task in measured], resamples=resamples, k=k)
    parts = [part for part in PARTS[::-1] if any(alone.coverage(m, part) for m in present)]
    part = parts[0] if parts else PARTS[-1]
    halves = _halves(open_ended, own, resamples)
    return Ranking(pair, open_ended, verified, own, alone, pooled, part, halves)


def _halves(
    scores: Sequence[TaskScores], families: Mapping[str, Family], resamples: int
) -> list[Indicators]:
    """Indicators on the even and on the odd prompts of every task; none with fewer than 4."""
    if any(len(task.prompts) < 4 for task in scores):
        return []
    return [
        indicators(
            [_pooled(task.at(range(start, len(task.prompts), 2)), families) for task in scores],
            resamples=resamples,
            seed=start,
        )
        for start in (0, 1)
    ]


def _pooled(task: Measured, families: Mapping[str, Family]) -> Measured:
    """The same points, with all methods of base as one method and all of aligned as another."""
    return replace(
        task,
        methods=[
            families[method] + ANY if families[method] in SINGLES else method
            for method in task.methods
        ],
    )


@dataclass(frozen=True, slots=True)
class Space:
    """All points of one sub-space on one task, in the order of the settings.

    Attributes:
        means: of (quality, diversity), [settings, 2].
        points: the same, min-max normalised.
        front: which are on the joint front.
    """

    diversity: str
    quality: str
    means: np.ndarray
    points: np.ndarray
    front: np.ndarray


def spaces(scores: TaskScores, known: Sequence[tuple[str, str]]) -> list[Space]:
    """The sub-spaces of one task as planes."""
    planes = []
    for diversity, quality in known:
        across, up = (scores.measured.figures(name) for name in (quality, diversity))
        if across is None or up is None:
            continue
        means = np.stack([across.mean(axis=1), up.mean(axis=1)], axis=-1)
        points = normalised(means.T).T
        planes.append(Space(diversity, quality, means, points, pareto_front(points)))
    return planes


def balanced(scores: TaskScores, known: Sequence[tuple[str, str]]) -> dict[str, Key]:
    """The setting of every method that covers most by itself, in the mean over sub-spaces."""
    planes = spaces(scores, known)
    if not planes:
        return {method: (method, setting) for method, setting in reversed(scores.keys)}
    alone = np.mean([coverage(plane.points[:, None]) for plane in planes], axis=0)
    best: dict[str, int] = {}
    for row, (method, _) in enumerate(scores.keys):
        if method not in best or alone[row] > alone[best[method]]:
            best[method] = row
    return {method: scores.keys[row] for method, row in best.items()}
