"""How far a study is: per rater, and per pair of methods."""

from collections import Counter
from dataclasses import dataclass

from baco.study.plan import Unit
from baco.study.schedule import UNITS, method_pairs, schedule
from baco.study.store import Rater
from baco.study.study import Study


@dataclass(frozen=True, slots=True)
class RaterRow:
    """A rater's progress.

    Attributes:
        rater: the rater.
        done, total: items, checks included, training not.
        minutes: spent on items.
    """

    rater: Rater
    done: int
    total: int
    minutes: float


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """Progress on one pair of methods.

    Attributes:
        unit: ``set`` or ``answer``.
        methods: the pair.
        done, planned: items that raters judged, and that the plan wants.
    """

    unit: Unit
    methods: tuple[str, str]
    done: int
    planned: int


def rater_rows(study: Study) -> list[RaterRow]:
    """All raters, withdrawn ones included."""
    plan = study.plan
    done: Counter[str] = Counter()
    seconds: dict[str, float] = {}
    for answer in study.store.answers():
        item = plan.item.get(answer.item)
        seconds[answer.rater] = seconds.get(answer.rater, 0.0) + answer.seconds
        if item is not None and item.kind != "training":
            done[answer.rater] += all(q.id in answer.responses for q in plan.asked(item.unit))
    total = len(schedule(plan, 0))
    return [
        RaterRow(rater, done[rater.id], total, seconds.get(rater.id, 0.0) / 60)
        for rater in study.store.raters()
    ]


def comparisons(study: Study) -> list[ComparisonRow]:
    """All pairs of methods, for sets and for single answers."""
    plan = study.plan

    def key(item_id: str) -> tuple[Unit, tuple[str, str]] | None:
        item = plan.item.get(item_id)
        if item is None or item.kind != "comparison":
            return None
        return item.unit, (plan.stimulus[item.first].method, plan.stimulus[item.second].method)

    planned = Counter(
        key(screen.item.id) for number in range(plan.raters) for screen in schedule(plan, number)
    )
    done = Counter(key(answer.item) for answer in study.store.answers())
    return [
        ComparisonRow(unit, pair, done[unit, pair], planned[unit, pair])
        for unit in UNITS
        for pair in method_pairs(plan)
    ]
