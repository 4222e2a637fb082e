"""Simulated raters: what raters of known preference would answer.

They test a study before people see it: its power, its attention checks, its analysis and its page.
A simulated rater reads nothing. Judgments follow from strengths of methods, on the scale of log
odds, with differences between raters and between prompts. Every output of a study with simulated
raters says so.

A preference follows Davidson's model (`bradley_terry`). A rating is the step of a scale that the
same strength, a rater's severity and a prompt's difficulty reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from baco.errors import BacoError
from baco.evaluation.indicators import Floats
from baco.study.clustering import Ints
from baco.study.plan import POINTS, Contrast, Form, Plan, Question, Side
from baco.study.schedule import Screen, schedule
from baco.study.store import Answer
from baco.study.study import Study

# Where the ratings 2 to 5 begin, in log odds.
STEPS = np.array([-2.4, -1.0, 0.4, 1.8])
# Reading speed of simulated raters, in words per second: the median, and its spread as a factor.
READING = 4.0
READING_SPREAD = 1.4
SECONDS_PER_QUESTION = 3.0
LAZY_SECONDS = 0.8  # median time of a rater who does not read

SIDES = {0.5: "left", 0.0: "tie", -0.5: "right"}


@dataclass(frozen=True, slots=True)
class Population:
    """The raters that a simulation draws from. Spreads are standard deviations in log odds.

    With the defaults two raters agree on 63% of the comparisons on which neither has a tie. That
    is the lower end of what studies of preferences report, 63% to 77% (arXiv 2009.01325,
    2203.02155, 2204.05862).

    Attributes:
        effect: win rate of the treatment over the control where superiority is tested, ties
            counting half, over all raters and prompts. 0.5 is no effect.
        rater_spread: of raters in how much more they like a method than another.
        prompt_spread: of prompts in how much better a method is than another on them.
        ties: share of ties between equally good stimuli.
        severity: spread of raters in how high they rate everything.
        noise: factor on the randomness of single judgments.
        side: preference of all raters for the left side, in log odds.
        lazy: share of raters who read nothing.
        slips: share of attention checks that an attentive rater fails.
    """

    effect: float = 0.6
    rater_spread: float = 0.6
    prompt_spread: float = 1.5
    ties: float = 0.25
    severity: float = 0.7
    noise: float = 1.0
    side: float = 0.0
    lazy: float = 0.0
    slips: float = 0.03

    def check(self) -> None:
        """Check the ranges.

        Raises:
            BacoError: a number out of its range.
        """
        for name, low, high in (
            ("effect", 0.02, 0.98), ("rater_spread", 0, 10), ("prompt_spread", 0, 10),
            ("ties", 0, 0.9), ("severity", 0, 10), ("noise", 0.1, 10), ("side", -10, 10),
            ("lazy", 0, 1), ("slips", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                option = name.replace("_", "-")
                raise BacoError(f"--{option} is {value:g}: give a number from {low:g} to {high:g}")

    @property
    def tie_odds(self) -> float:
        """The odds of a tie beside two equal stimuli, of odds 1 each."""
        return 2 * self.ties / (1 - self.ties)

    def win_rate(self, difference: float) -> float:
        """The win rate that a difference in strength gives over all raters and prompts."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(61)
        utility = difference + np.hypot(self.rater_spread, self.prompt_spread) * nodes
        left, tie = _shares(utility / self.noise, self.tie_odds)
        return float((left + tie / 2) @ weights / weights.sum())

    def difference(self) -> float:
        """The difference in strength that gives the population's effect."""
        from scipy import optimize

        return float(optimize.brentq(lambda d: self.win_rate(d) - self.effect, -40, 40))


@dataclass(frozen=True, slots=True)
class Layout:
    """Who judges what: a row for every judgment of one question.

    Attributes:
        rater, prompt: numbers from 0, [N].
        left, right: numbers of the methods, [N].
    """

    rater: Ints
    prompt: Ints
    left: Ints
    right: Ints


@dataclass(frozen=True, slots=True)
class Drawn:
    """Simulated judgments, [studies, N].

    Attributes:
        difference: of the left side to the right one: 0.5, 0 or -0.5 for a preference, else the
            difference of the ratings.
        left, right: the ratings; None for a preference.
    """

    difference: Floats
    left: Ints | None = None
    right: Ints | None = None


def draw(
    layout: Layout,
    strengths: Floats,
    form: Form,
    population: Population,
    generator: np.random.Generator,
    studies: int = 1,
    lazy: NDArray[np.bool_] | None = None,
) -> Drawn:
    """Draw the judgments of one question.

    Args:
        layout: who judges what.
        strengths: of every method, in log odds, [methods].
        form: of the question.
        population: of the raters.
        generator: of all randomness.
        studies: number of independent studies, each with its own raters and prompts.
        lazy: raters who read nothing, [studies, raters].
    """
    shape = (studies, len(layout.rater))
    raters, prompts = int(layout.rater.max()) + 1, int(layout.prompt.max()) + 1
    methods = len(strengths)
    # Of two methods, so that a difference has the population's spread.
    by_rater = generator.normal(0, population.rater_spread / 2**0.5, (studies, raters, methods))
    by_prompt = generator.normal(0, population.prompt_spread / 2**0.5, (studies, prompts, methods))

    def utility(method: Ints) -> Floats:
        total: Floats = (
            strengths[method]
            + by_rater[:, layout.rater, method]
            + by_prompt[:, layout.prompt, method]
        )
        return total

    ignorant = None if lazy is None else lazy[:, layout.rater]
    left, right = utility(layout.left), utility(layout.right)
    if form == "preference":
        wins, ties = _shares(
            (left - right + population.side) / population.noise, population.tie_odds
        )
        if ignorant is not None:
            wins, ties = np.where(ignorant, 1 / 3, wins), np.where(ignorant, 1 / 3, ties)
        uniform = generator.random(shape)
        return Drawn(np.where(uniform < wins, 0.5, np.where(uniform < wins + ties, 0.0, -0.5)))
    level = generator.normal(0, population.severity, (studies, raters))[:, layout.rater]
    ratings = [
        np.searchsorted(STEPS, level + side + population.noise * generator.logistic(size=shape)) + 1
        for side in (left + population.side / 2, right - population.side / 2)
    ]
    if ignorant is not None:
        ratings = [
            np.where(ignorant, generator.integers(1, POINTS + 1, shape), rating)
            for rating in ratings
        ]
    return Drawn((ratings[0] - ratings[1]).astype(np.float64), *ratings)


def _shares(utility: Floats, tie_odds: float) -> tuple[Floats, Floats]:
    """The probabilities that the left side is preferred, and that there is a tie."""
    odds = np.exp(utility / 2)
    total = odds + 1 / odds + tie_odds
    return odds / total, tie_odds / total


def contrast_strengths(plan: Plan, question: Question, difference: float) -> Floats:
    """Strengths of the plan's methods on a question, [methods], as its contrasts assume them.

    A treatment is stronger by `difference` than each control over which superiority is tested, and
    as strong as those to which it is to be equivalent. A question without a contrast has the
    strengths of the contrasts of its dimension, and else no differences.
    """
    contrasts = [c for c in plan.contrasts if c.question == question.id] or [
        c for c in plan.contrasts if plan.question[c.question].dimension == question.dimension
    ]
    place = {method: index for index, method in enumerate(plan.methods)}
    rows = np.zeros((len(contrasts), len(place)))
    wanted = np.zeros(len(contrasts))
    for index, contrast in enumerate(contrasts):
        rows[index, place[contrast.treatment]] = 1
        rows[index, place[contrast.control]] = -1
        wanted[index] = difference if contrast.test == "superiority" else 0.0
    if not contrasts:
        return np.zeros(len(place))
    return np.asarray(np.linalg.lstsq(rows, wanted, rcond=None)[0], dtype=np.float64)


def contrast_layout(plan: Plan, contrast: Contrast, raters: int) -> Layout:
    """The judgments of the first `raters` raters that a contrast is made of.

    Method 0 of the layout is the treatment, method 1 the control.
    """
    unit = plan.question[contrast.question].unit
    prompts = {prompt.id: index for index, prompt in enumerate(plan.prompts)}
    rows = []
    for number in range(raters):
        for screen in schedule(plan, number):
            if screen.item.kind != "comparison" or screen.item.unit != unit:
                continue
            left = plan.stimulus[screen.left].method
            right = plan.stimulus[screen.right].method
            if {left, right} == {contrast.treatment, contrast.control}:
                treated_left = left == contrast.treatment
                rows.append((number, prompts[screen.item.prompt], int(not treated_left)))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    _, prompt = np.unique(columns[1], return_inverse=True)
    return Layout(columns[0], prompt.astype(np.int64), columns[2], 1 - columns[2])


def balanced_layout(
    raters: int, prompts: int, pairs: int, prompts_per_rater: int | None = None
) -> Layout:
    """The judgments of one contrast in the design of `schedule`, with any number of prompts.

    Method 0 is the treatment, method 1 the control.

    Args:
        raters, prompts: their numbers.
        pairs: of methods in the study, over which the judgments rotate.
        prompts_per_rater: None if every rater judges all prompts.
    """
    here = min(prompts_per_rater or prompts, prompts)
    rater = np.repeat(np.arange(raters), here)
    count = rater // pairs * here + np.tile(np.arange(here), raters)
    turn, prompt = np.divmod(count, prompts)
    judged = (prompt + rater) % pairs == 0
    right = ((prompt // pairs + turn) % 2)[judged]
    _, shown = np.unique(prompt[judged], return_inverse=True)
    return Layout(rater[judged], shown.astype(np.int64), right, 1 - right)


def simulate(study: Study, raters: int, population: Population, seed: int = 0) -> list[str]:
    """Add simulated raters to a study, who answer the items of their schedules in order.

    Args:
        study: with a plan.
        raters: their number.
        population: the population that they are drawn from.
        seed: of all randomness.

    Returns:
        The ids of the raters.

    Raises:
        BacoError: a number out of its range, or a study that people have answered.
    """
    population.check()
    if raters < 1:
        raise BacoError(f"--raters is {raters}: give 1 or more")
    if any(
        rater.origin != "simulated" and rater.state not in ("invited", "withdrawn")
        for rater in study.store.raters()
    ):
        raise BacoError(
            f"{study.path} has answers of people: simulate raters in a copy of its plan.json and "
            "texts.json in another directory"
        )
    known = len(study.store.raters())
    numbers = []
    for place in range(known, known + raters):
        rater = study.store.add_rater(origin="simulated", id=f"simulated-{place}", linked=False)
        assert rater is not None
        assert rater.number is not None
        numbers.append(rater.number)
    schedules = [schedule(study.plan, number) for number in numbers]
    answers = simulated_answers(study.plan, schedules, population, np.random.default_rng(seed))
    ids = [f"simulated-{place}" for place in range(known, known + raters)]
    for id, given in zip(ids, answers, strict=True):
        study.store.update_rater(id, "consented")
        study.store.save(replace(answer, rater=id, version=study.version) for answer in given)
        study.store.update_rater(id, "finished")
    return ids


def simulated_answers(
    plan: Plan,
    schedules: Sequence[Sequence[Screen]],
    population: Population,
    generator: np.random.Generator,
) -> list[list[Answer]]:
    """The answers of simulated raters, rater by rater; the raters' ids are their places.

    Args:
        plan: of the study.
        schedules: of the raters.
        population: the population that they are drawn from.
        generator: of all randomness.
    """
    screens = [(row, screen) for row, own in enumerate(schedules) for screen in own]
    lazy = generator.random((1, len(schedules))) < population.lazy
    compared = [index for index, (_, s) in enumerate(screens) if s.item.kind == "comparison"]
    responses: list[dict[str, object]] = [{} for _ in screens]
    difference = population.difference()
    for question in plan.questions:
        rows = [i for i in compared if screens[i][1].item.unit == question.unit]
        if not rows:
            continue
        drawn = draw(
            _layout(plan, [screens[i] for i in rows]),
            contrast_strengths(plan, question, difference),
            question.form,
            population,
            generator,
            lazy=lazy,
        )
        for place, index in enumerate(rows):
            responses[index][question.id] = _response(drawn, place)
    answers: list[list[Answer]] = [[] for _ in schedules]
    pace = np.exp(generator.normal(0, np.log(READING_SPREAD), (len(schedules), 1)))
    for index, (row, screen) in enumerate(screens):
        reads = not lazy[0, row]
        if screen.item.kind != "comparison":
            responses[index] = _check(plan, screen, reads, population, generator)
        questions = len(responses[index])
        median = (
            plan.words(screen.item) / READING * pace[row, 0] + questions * SECONDS_PER_QUESTION
            if reads
            else LAZY_SECONDS
        )
        answers[row].append(
            Answer(
                rater=str(row),
                item=screen.item.id,
                position=screen.position,
                left=screen.left,
                right=screen.right,
                responses=responses[index],  # type: ignore[arg-type]
                seconds=round(float(median * np.exp(generator.normal(0, 0.25))), 2),
            )
        )
    return answers


def _layout(plan: Plan, screens: Sequence[tuple[int, Screen]]) -> Layout:
    prompts = {prompt.id: index for index, prompt in enumerate(plan.prompts)}
    methods = {method: index for index, method in enumerate(plan.methods)}
    return Layout(
        np.array([row for row, _ in screens]),
        np.array([prompts[s.item.prompt] for _, s in screens]),
        np.array([methods[plan.stimulus[s.left].method] for _, s in screens]),
        np.array([methods[plan.stimulus[s.right].method] for _, s in screens]),
    )


def _response(drawn: Drawn, place: int) -> object:
    if drawn.left is None or drawn.right is None:
        return SIDES[float(drawn.difference[0, place])]
    return int(drawn.left[0, place]), int(drawn.right[0, place])


def _check(
    plan: Plan,
    screen: Screen,
    reads: bool,
    population: Population,
    generator: np.random.Generator,
) -> dict[str, object]:
    """Responses to an attention check."""
    passes = reads and generator.random() >= population.slips
    responses: dict[str, object] = {}
    for question in plan.asked(screen.item.unit):
        right = screen.item.expected_side(question.id, swapped=screen.swapped) if passes else None
        side = right or get_args(Side)[generator.integers(3)]
        if question.form == "preference":
            responses[question.id] = side
        else:
            responses[question.id] = {"left": (5, 1), "tie": (3, 3), "right": (1, 5)}[side]
    return responses
