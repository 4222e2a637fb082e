"""How the methods of one pair stand: indicators per method, and base and aligned as one rival each.

A user who has only the aligned model may sample it as he likes. So beside `aligned, temperature`,
`aligned, top-p` and `aligned, min-p` there is *aligned, any sampling*: all points of the three as
one method, the strictest rival; base likewise.
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
    indicators,
    normalised,
    pareto_front,
)
from baco.evaluation.methods.method import Family
from baco.evaluation.pareto import coverage
from baco.evaluation.report.load_scores import Findings, Key

ANY = ", any sampling"
SINGLES: tuple[Family, ...] = ("base", "aligned")
PARTS = ("lexical", "semantic", "overall")


@dataclass(frozen=True, slots=True)
class Standing:
    """The methods of one pair.

    Attributes:
        pair: its name.
        findings: one for each task that Coverage is told of,
        verified: and for each task of right answers beside such ones, where to differ is to err.
        families: of every method, in the run's order.
        alone: indicators of every method by itself.
        pooled: the same with base and aligned as one method each, by any sampling.
        part: what methods are ranked by: overall, or the one kind of diversity that is there.
    """

    pair: str
    findings: Sequence[Findings]
    verified: Sequence[Findings]
    families: Mapping[str, Family]
    alone: Indicators
    pooled: Indicators
    part: str

    @property
    def every(self) -> list[Findings]:
        """All tasks."""
        return [*self.findings, *self.verified]

    def coverage(self, method: str) -> float:
        """The Coverage a method is ranked by; below everything where it has none."""
        found = self.estimate("coverage", method, self.part)
        return -1.0 if found is None else found.value

    def estimate(self, indicator: Indicator, method: str, part: Part) -> Estimate | None:
        """Coverage or Dominance of a method or of one of the pooled rivals."""
        source = self.alone if method in self.alone.methods else self.pooled
        return source.estimate(indicator, method, part)

    def ranked(self, family: Family | None = None) -> list[str]:
        """Methods, of one family or all, the highest Coverage first."""
        found = [m for m, its in self.families.items() if family in (None, its)]
        return sorted(found, key=lambda method: -self.coverage(method))

    def best(self, family: Family) -> str | None:
        """The method of a family with the highest Coverage."""
        ranked = self.ranked(family)
        return ranked[0] if ranked else None

    @property
    def rivals(self) -> list[str]:
        """What BACo is compared with: its halves, Nudging, and the best of every other family."""
        found = [family + ANY for family in SINGLES if family + ANY in self.pooled.methods]
        if "aligned, temperature" in self.families:
            found.insert(1, "aligned, temperature")
        others: tuple[Family, ...] = ("Nudging", "mixing", "ensemble", "prompting", "other")
        return found + [name for name in map(self.best, others) if name is not None]

    @property
    def main(self) -> list[str]:
        """The methods that stand out in plots: the best of every family, BACo first."""
        families: tuple[Family, ...] = (
            "BACo", "base", "aligned", "Nudging", "mixing", "ensemble", "prompting", "other",
        )  # fmt: skip
        return [name for name in map(self.best, families) if name is not None]

    def compare(self, rival: str, part: Part, router: str | None = None) -> Comparison | None:
        """A router, by default the best, against a rival, in Coverage."""
        router = self.best("BACo") if router is None else router
        if router is None:
            return None
        source = self.pooled if rival in self.pooled.methods else self.alone
        return source.compare(router, rival, "coverage", part)

    def on_unseen_prompts(self, rival: str) -> list[float]:
        """The lead of a router chosen on one half of the prompts, measured on the other half.

        Twice, the halves (every other prompt) changing places; empty where a half is too small.
        The best of many routers on the very prompts it is measured on looks better than it is.
        """
        if any(len(found.prompts) < 4 for found in self.findings):
            return []
        halves = [
            indicators(
                [
                    _pooled(found.at(range(start, len(found.prompts), 2)), self.families)
                    for found in self.findings
                ],
                resamples=1,
            )
            for start in (0, 1)
        ]
        routers = [method for method, its in self.families.items() if its == "BACo"]
        leads = []
        for chosen_on, measured_on in (halves, halves[::-1]):
            scored = {r: chosen_on.coverage(r, self.part) for r in routers}
            known = {router: found.value for router, found in scored.items() if found is not None}
            if not known:
                return []
            won = measured_on.compare(max(known, key=lambda r: known[r]), rival, part=self.part)
            if won is not None:
                leads.append(won.difference)
        return leads


def standing(
    pair: str, findings: Sequence[Findings], families: Mapping[str, Family], resamples: int = 2000
) -> Standing:
    """The standing of one pair's methods, from its tasks of open questions where there are any."""
    verified = [found for found in findings if found.accuracy is not None]
    open_ended = [found for found in findings if found.accuracy is None]
    if not open_ended:
        open_ended, verified = verified, []
    measured = [found.measured for found in open_ended]
    present = dict.fromkeys(method for task in measured for method in task.methods)
    own = {method: families[method] for method in present}
    alone = indicators(measured, resamples=resamples)
    pooled = indicators([_pooled(task, own) for task in measured], resamples=resamples)
    parts = [part for part in PARTS[::-1] if any(alone.coverage(m, part) for m in present)]
    return Standing(
        pair, open_ended, verified, own, alone, pooled, parts[0] if parts else PARTS[-1]
    )


def _pooled(task: Measured, families: Mapping[str, Family]) -> Measured:
    """The same points, base's and aligned's methods being one each."""
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


def spaces(found: Findings, known: Sequence[tuple[str, str]]) -> list[Space]:
    """The sub-spaces of one task as planes."""
    made = []
    for diversity, quality in known:
        across, up = found.measured.figures(quality), found.measured.figures(diversity)
        if across is None or up is None:
            continue
        means = np.stack([across.mean(axis=1), up.mean(axis=1)], axis=-1)
        points = normalised(means.T).T
        made.append(Space(diversity, quality, means, points, pareto_front(points)))
    return made


def balanced(found: Findings, known: Sequence[tuple[str, str]]) -> dict[str, Key]:
    """Of every method the setting that covers most by itself, in the mean over sub-spaces."""
    planes = spaces(found, known)
    if not planes:
        return {method: (method, setting) for method, setting in reversed(found.keys)}
    alone = np.mean([coverage(plane.points[:, None]) for plane in planes], axis=0)
    best: dict[str, int] = {}
    for row, (method, _) in enumerate(found.keys):
        if method not in best or alone[row] > alone[best[method]]:
            best[method] = row
    return {method: found.keys[row] for method, row in best.items()}
