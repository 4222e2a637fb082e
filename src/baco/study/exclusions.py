"""Which judgments the plan's rules exclude, and why. Everything excluded is listed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from baco.study.plan import Plan
from baco.study.schedule import schedule
from baco.study.store import Judgment

# Fewer preferences without a tie say nothing about a rater's preferred side.
FEWEST_SIDES = 10


@dataclass(frozen=True, slots=True)
class Conduct:
    """What the rules read of one rater.

    Attributes:
        rater: the id.
        origin: ``human``, ``simulated`` or ``imported``.
        items: comparisons that were answered.
        planned: items of the schedule, checks included; 0 for imported raters.
        answered: items of the schedule that were answered.
        checks, failed: attention checks that were answered, and failed.
        fast: comparisons answered in less than the minimum reading time.
        timed: comparisons with a time.
        left, right, ties: preferences.
        seconds: median over comparisons; None without times.
    """

    rater: str
    origin: str
    items: int
    planned: int
    answered: int
    checks: int
    failed: int
    fast: int
    timed: int
    left: int
    right: int
    ties: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Judgments that are left out of the main analysis.

    Attributes:
        rater: the id.
        item: the id; None where all judgments of the rater are excluded.
        reason: the rule, with the figures.
        judgments: their number, those about checks not counted.
    """

    rater: str
    item: str | None
    reason: str
    judgments: int


def conducts(plan: Plan, judgments: Sequence[Judgment]) -> list[Conduct]:
    """What the rules read of every rater, in the order of the ids."""
    by_rater: dict[str, list[Judgment]] = {}
    for judgment in judgments:
        if judgment.kind != "training":
            by_rater.setdefault(judgment.rater, []).append(judgment)
    planned = len(schedule(plan, 0))
    return [_conduct(plan, rater, own, planned) for rater, own in sorted(by_rater.items())]


def _conduct(plan: Plan, rater: str, own: Sequence[Judgment], planned: int) -> Conduct:
    compared = {j.item: j for j in own if j.kind == "comparison"}
    checks: dict[str, bool] = {}
    for judgment in own:
        if judgment.kind == "check" and judgment.passed is not None:
            checks[judgment.item] = checks.get(judgment.item, True) and judgment.passed
    timed = {item: j for item, j in compared.items() if j.seconds > 0}
    sides = [j.side for j in own if j.kind == "comparison" and j.side is not None]
    imported = own[0].origin == "imported"
    return Conduct(
        rater=rater,
        origin=own[0].origin,
        items=len(compared),
        planned=0 if imported else planned,
        answered=len({j.item for j in own}),
        checks=len(checks),
        failed=sum(not passed for passed in checks.values()),
        fast=sum(is_fast(plan, j) for j in timed.values()),
        timed=len(timed),
        left=sides.count("left"),
        right=sides.count("right"),
        ties=sides.count("tie"),
        seconds=median(j.seconds for j in timed.values()) if timed else None,
    )


def is_fast(plan: Plan, judgment: Judgment) -> bool:
    """Whether an item was answered in less than the minimum reading time of its words."""
    return 0 < judgment.seconds < judgment.words / plan.checks.words_per_second


def exclude(plan: Plan, judgments: Sequence[Judgment]) -> tuple[list[Judgment], list[Exclusion]]:
    """Apply the plan's rules.

    Returns:
        The judgments that are kept, and the exclusions.
    """
    reasons = {
        conduct.rater: reason
        for conduct in conducts(plan, judgments)
        if (reason := _reason(plan, conduct)) is not None
    }
    excluded: dict[tuple[str, str | None], list[Judgment]] = {}
    kept = []
    for judgment in judgments:
        if judgment.rater in reasons:
            excluded.setdefault((judgment.rater, None), []).append(judgment)
        elif (
            plan.exclusions.fast_judgments
            and judgment.kind == "comparison"
            and is_fast(plan, judgment)
        ):
            excluded.setdefault((judgment.rater, judgment.item), []).append(judgment)
        else:
            kept.append(judgment)
    return kept, list(_listed(plan, excluded, reasons))


def _listed(
    plan: Plan,
    excluded: Mapping[tuple[str, str | None], Sequence[Judgment]],
    reasons: Mapping[str, str],
) -> Iterable[Exclusion]:
    for (rater, item), rows in sorted(excluded.items(), key=lambda e: (e[0][0], e[0][1] or "")):
        number = sum(row.kind == "comparison" for row in rows)
        if item is None:
            yield Exclusion(rater, None, reasons[rater], number)
        else:
            least = rows[0].words / plan.checks.words_per_second
            yield Exclusion(
                rater,
                item,
                f"{rows[0].words} words in {rows[0].seconds:.1f} s: less than the {least:.1f} s "
                "that the plan demands",
                number,
            )


def _reason(plan: Plan, conduct: Conduct) -> str | None:
    """Why all judgments of a rater are excluded; the first rule that applies."""
    rules = plan.exclusions
    sides = conduct.left + conduct.right
    if conduct.failed > rules.failed_checks:
        return (
            f"failed {conduct.failed} of {conduct.checks} attention checks: the plan allows "
            f"{rules.failed_checks}"
        )
    if conduct.timed and conduct.fast > rules.fast_share * conduct.timed:
        return (
            f"{conduct.fast} of {conduct.timed} comparisons were answered in less than the minimum "
            f"reading time: the plan allows {rules.fast_share:.0%}"
        )
    if conduct.answered < rules.completed_share * conduct.planned:
        return (
            f"answered {conduct.answered} of {conduct.planned} items: the plan demands "
            f"{rules.completed_share:.0%}"
        )
    if sides >= FEWEST_SIDES and max(conduct.left, conduct.right) > rules.same_side_share * sides:
        side = "left" if conduct.left > conduct.right else "right"
        return (
            f"chose {side} in {max(conduct.left, conduct.right)} of {sides} preferences without "
            f"ties: the plan allows {rules.same_side_share:.0%}"
        )
    return None
