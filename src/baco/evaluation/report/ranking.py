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
    Estimate,
    Indicator,
    Indicators,
    Measured,
    Part,
    fewest_settings,
    indicators,
    normalised,
    pareto_front,
)
from baco.evaluation.methods.method import Family
from baco.evaluation.pareto import coverage
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
    """

    pair: str
    scores: Sequence[TaskScores]
    verified: Sequence[TaskScores]
    families: Mapping[str, Family]
    alone: Indicators
    pooled: Indicators
    part: str

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

    def on_unseen_prompts(self, rival: str) -> list[float]:
        """The leads of the router that is best on one half of the prompts, on the other half.

        The best of many routers looks better than it is on the prompts it was chosen by. Every
        other prompt is in the same half.

        Returns:
            One lead for each half that the router is measured on; empty where halves are too small.
        """
        if any(len(task.prompts) < 4 for task in self.scores):
            return []
        halves = [
            indicators(
                [
                    _pooled(task.at(range(start, len(task.prompts), 2)), self.families)
                    for task in self.scores
                ],
                resamples=1,
            )
            for start in (0, 1)
        ]
        routers = [method for method, group in self.families.items() if group == "BACo"]
        leads = []
        for chosen_on, measured_on in (halves, halves[::-1]):
            estimates = {router: chosen_on.coverage(router, self.part) for router in routers}
            known = {router: e.value for router, e in estimates.items() if e is not None}
            if not known:
                return []
            best = max(known, key=lambda router: known[router])
            lead = measured_on.compare(best, rival, part=self.part)
            if lead is not None:
                leads.append(lead.difference)
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
    return Ranking(pair, open_ended, verified, own, alone, pooled, parts[0] if parts else PARTS[-1])


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
