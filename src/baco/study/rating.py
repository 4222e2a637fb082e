"""Where a rater is in a study, and which answers are accepted. No HTTP.

A rater agrees, reads the rubric, answers the comprehension questions, does the training, and then
rates block by block. Items of a block can be changed until the next block has an answer.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from baco.errors import BacoError
from baco.study.plan import POINTS, Plan, Side
from baco.study.schedule import Screen, training
from baco.study.store import Answer, Rater, preferred_side
from baco.study.study import Study

Step = Literal["consent", "questions", "item", "pause", "review", "finished", "withdrawn"]

# Seconds by which a rater's clock and the server's may differ.
SLACK = 2.0


class ClosedError(BacoError):
    """An answer to an item that is not open to this rater, such as one of an earlier block."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rater is.

    Attributes:
        step: what comes next.
        screen: the item, for the step ``item``.
    """

    step: Step
    screen: Screen | None = None


class Progress:
    """The schedule of a rater, and the answers so far.

    Args:
        study: the study.
        rater: whose progress it is.
        screens: of the rater's schedule; none after a withdrawal.
    """

    def __init__(self, study: Study, rater: Rater, screens: Sequence[Screen]) -> None:
        self.study, self.rater, self.screens = study, rater, screens
        self.answers = {answer.item: answer for answer in study.store.answers(rater.id)}
        self.training = training(study.plan)

    def complete(self, screen: Screen) -> bool:
        """Whether every question of an item is answered."""
        answer = self.answers.get(screen.item.id)
        asked = self.study.plan.asked(screen.item.unit)
        return answer is not None and all(q.id in answer.responses for q in asked)

    @property
    def done(self) -> int:
        """Number of complete items, without the training."""
        return sum(map(self.complete, self.screens))

    def place(self) -> Place:
        """What comes next."""
        state = self.rater.state
        if state in ("withdrawn", "finished"):
            return Place(state)
        if state == "invited":
            return Place("consent")
        if state == "consented":
            return Place("questions")
        screen = self._first_incomplete()
        if screen is None:
            return Place("review")
        return Place("pause" if self._begins_block(screen) else "item", screen)

    def at(self, position: int) -> Screen | None:
        """The item at a position, if it is open.

        A block stays open until the next one has an answer, so that a rater can correct its last
        item, and a page can send an answer again that was not acknowledged.
        """
        if self.rater.state != "rating":
            return None
        screens = [*self.training, *self.screens]
        screen = next((screen for screen in screens if screen.position == position), None)
        current = self._first_incomplete()
        if screen is None or current is None:
            return screen if screen and screen.block == self.screens[-1].block else None
        is_open = screen.block == current.block or (
            self._begins_block(current) and screen.block == current.block - 1
        )
        return screen if is_open and position <= current.position else None

    def before(self, screen: Screen) -> Screen | None:
        """The item to go back to; none at the beginning of a block."""
        before = self.at(screen.position - 1) if screen.position > 0 else None
        return before if before and before.block == screen.block else None

    def _begins_block(self, screen: Screen) -> bool:
        """Whether an item is the first of its block and not answered in part yet."""
        position = screen.position
        if position < 0 or screen.item.id in self.answers:
            return False
        return position == 0 or self.screens[position - 1].block != screen.block

    def answer(self, position: int, responses: Any, seconds: Any) -> Answer:
        """An answer to an item, for the store.

        Time is bounded by the time since the rater's previous answer.

        Raises:
            ClosedError: the item is not open.
            BacoError: a response that is none.
        """
        screen = self.at(position)
        if screen is None:
            raise ClosedError("this item is closed: load the page again")
        checked = check_responses(self.study.plan, screen, responses)
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds >= 0:
            raise BacoError("seconds must be a number from 0 up")
        now = time.time()
        earlier = self.answers.get(screen.item.id)
        last = max([self.rater.begun or now, *(answer.saved for answer in self.answers.values())])
        most = (earlier.seconds if earlier else 0.0) + max(0.0, now - last) + SLACK
        return Answer(
            self.rater.id,
            screen.item.id,
            screen.position,
            screen.left,
            screen.right,
            checked,
            round(float(min(seconds, most)), 2),
            version=self.study.version,
            saved=now,
        )

    def _first_incomplete(self) -> Screen | None:
        screens = (*self.training, *self.screens)
        return next((screen for screen in screens if not self.complete(screen)), None)


def check_responses(plan: Plan, screen: Screen, responses: Any) -> dict[str, Any]:
    """The responses to an item; questions may be missing, since each response is saved at once.

    Raises:
        BacoError: an unknown question, or a response that its form does not have.
    """
    asked = {question.id: question for question in plan.asked(screen.item.unit)}
    if not isinstance(responses, Mapping) or not responses.keys() <= asked.keys():
        raise BacoError("an answer has responses to the questions of its item")
    checked: dict[str, Any] = {}
    for id, response in responses.items():
        if asked[id].form == "preference":
            fits = response in get_args(Side)
        else:
            fits = isinstance(response, list | tuple) and len(response) == 2
            fits = fits and all(type(r) is int and 1 <= r <= POINTS for r in response)
        if not fits:
            raise BacoError(f"the response to {id} is not one of its options")
        checked[id] = response if isinstance(response, str) else tuple(response)
    return checked


def passed(screen: Screen, responses: Mapping[str, Any]) -> bool:
    """Whether responses to a check or a training item are right."""
    return all(
        question in responses
        and preferred_side(responses[question])
        == screen.item.expected_side(question, swapped=screen.swapped)
        for question in screen.item.expected
    )
