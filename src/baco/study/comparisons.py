"""The judgments of a study as arrays, question by question."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.indicators import Floats
from baco.study.clustering import Clusters, Ints
from baco.study.plan import Plan, Question
from baco.study.store import Judgment

# Left minus right, in win rate.
DIFFERENCE = {"left": 0.5, "tie": 0.0, "right": -0.5}


@dataclass(frozen=True, slots=True)
class Comparisons:
    """The judgments of one question about two methods; checks and training are left out.

    Attributes:
        question: the question of the plan.
        methods, raters, prompts, items: names, by their numbers in the columns.
        rater, prompt, item: of every judgment, [N].
        left, right: the methods, [N].
        difference: left minus right, [N]: 0.5, 0 or -0.5 for a preference, else of the ratings.
        left_rating, right_rating: [N]; NaN for a preference.
        seconds: on the item, [N].
    """

    question: Question
    methods: Sequence[str]
    raters: Sequence[str]
    prompts: Sequence[str]
    items: Sequence[str]
    rater: Ints
    prompt: Ints
    item: Ints
    left: Ints
    right: Ints
    difference: Floats
    left_rating: Floats
    right_rating: Floats
    seconds: Floats

    def __len__(self) -> int:
        return len(self.rater)

    @property
    def clusters(self) -> Clusters:
        """Raters and prompts, numbered without gaps."""
        return Clusters(self.rater, self.prompt).at(np.arange(len(self)))

    def at(self, rows: NDArray[Any]) -> "Comparisons":
        """Some of the judgments; names and numbers stay."""
        columns = {
            field.name: value[rows]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        names = {
            name: getattr(self, name)
            for name in ("question", "methods", "raters", "prompts", "items")
        }
        return Comparisons(**names, **columns)

    def between(self, treatment: str, control: str) -> tuple["Comparisons", Floats]:
        """The judgments about two methods, and treatment minus control of each, [N]."""
        if treatment not in self.methods or control not in self.methods:
            return self.at(np.zeros(0, dtype=np.int64)), np.zeros(0)
        first, second = self.methods.index(treatment), self.methods.index(control)
        as_given = (self.left == first) & (self.right == second)
        swapped = (self.left == second) & (self.right == first)
        rows = np.flatnonzero(as_given | swapped)
        sign = np.where(as_given[rows], 1.0, -1.0)
        return self.at(rows), sign * self.difference[rows]


def comparisons(plan: Plan, question: Question, judgments: Iterable[Judgment]) -> Comparisons:
    """The judgments of one question as arrays."""
    rows = [
        j
        for j in judgments
        if j.question == question.id
        and j.kind == "comparison"
        and j.left_method in plan.methods
        and j.right_method in plan.methods
    ]
    place = {method: index for index, method in enumerate(plan.methods)}
    raters, rater = _numbered([j.rater for j in rows])
    prompts, prompt = _numbered([j.prompt for j in rows])
    items, item = _numbered([j.item for j in rows])
    left_rating, right_rating = (
        np.array([np.nan if r is None else float(r) for r in ratings], dtype=np.float64)
        for ratings in ([j.left_rating for j in rows], [j.right_rating for j in rows])
    )
    difference = (
        np.array([DIFFERENCE[j.direction] for j in rows], dtype=np.float64)
        if question.form == "preference"
        else left_rating - right_rating
    )
    return Comparisons(
        question=question,
        methods=plan.methods,
        raters=raters,
        prompts=prompts,
        items=items,
        rater=rater,
        prompt=prompt,
        item=item,
        left=np.array([place[j.left_method] for j in rows], dtype=np.int64),
        right=np.array([place[j.right_method] for j in rows], dtype=np.int64),
        difference=difference,
        left_rating=left_rating,
        right_rating=right_rating,
        seconds=np.array([j.seconds for j in rows], dtype=np.float64),
    )


def _numbered(names: Sequence[str]) -> tuple[list[str], Ints]:
    """The names that occur, in order, and the number of each entry."""
    known = sorted(set(names))
    number = {name: index for index, name in enumerate(known)}
    return known, np.array([number[name] for name in names], dtype=np.int64)
