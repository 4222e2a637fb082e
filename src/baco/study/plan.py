"""The plan of a study: everything that is decided before the first judgment.

A plan is one JSON file. It has the texts of consent and rubric, the questions, and which answers
are compared; the prompts and answers themselves are named by their SHA-256 and kept beside it.
Nothing here knows how the judgments are collected or analysed.

A *stimulus* is what a rater judges: a set of answers to one prompt, or one answer. An *item* is two
stimuli for the same prompt, side by side. Its first and second stimulus have no side yet; the
schedule of a rater decides which one is left.
"""

import hashlib
import json
import math
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from baco.errors import BacoError, one_line

FORMAT = 1
POINTS = 5  # of a rating scale

Unit = Literal["set", "answer"]
Form = Literal["preference", "rating"]
Kind = Literal["comparison", "check", "training"]
Check = Literal["equal", "repeated", "shuffled"]
# Of an item's two stimuli, before they have sides.
Choice = Literal["first", "tie", "second"]
Side = Literal["left", "tie", "right"]
Test = Literal["superiority", "equivalence"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question about both stimuli of an item.

    Attributes:
        id: such as ``diversity`` or ``quality_rating``.
        unit: the items it is asked on.
        form: ``preference`` is one choice of left, tie and right; ``rating`` is a number from 1 to
            5 for each side.
        dimension: ``diversity``, ``quality``, ``creativity`` or ``overall``.
        text: as raters read it.
        anchors: of a rating, what each point means, from 1 to 5; of a preference, the labels of
            left, tie and right.
    """

    id: str
    unit: Unit
    form: Form
    dimension: str
    text: str
    anchors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A planned comparison of two methods on one question.

    Attributes:
        id: unique in the plan.
        question: its id.
        treatment, control: labels of methods.
        test: ``superiority``: the treatment is better; ``equivalence``: it is neither better nor
            worse than the control by more than `margin`.
        margin: in points of the scale for a rating, in win rate (0 to 0.5) for a preference.
        primary: whether it is the study's primary outcome.
        hypothesis: in words.
    """

    id: str
    question: str
    treatment: str
    control: str
    test: Test
    hypothesis: str
    margin: float | None = None
    primary: bool = False


@dataclass(frozen=True, slots=True)
class Stimulus:
    """What raters judge: a set of answers, or one answer.

    Attributes:
        id: unique in the plan; raters do not see it.
        unit: ``set`` or ``answer``.
        prompt: the prompt's id.
        method: label of the method that gave the answers; empty for texts of checks and training.
        texts: SHA-256 of every answer as shown, in the order in which they are shown.
        words: of all its texts.
    """

    id: str
    unit: Unit
    prompt: str
    method: str
    texts: tuple[str, ...]
    words: int


@dataclass(frozen=True, slots=True)
class Item:
    """Two stimuli for one prompt.

    Attributes:
        id: unique in the plan; raters do not see it.
        kind: a ``comparison`` of two methods, an attention ``check``, or ``training``.
        unit: of both stimuli.
        prompt: the prompt's id.
        first, second: ids of the stimuli.
        check: which check it is.
        expected: the right choice by question, for checks and training. For a rating, ``first``
            means that the first stimulus gets the higher number.
        feedback: what a rater reads after a training item.
    """

    id: str
    kind: Kind
    unit: Unit
    prompt: str
    first: str
    second: str
    check: Check | None = None
    expected: Mapping[str, Choice] = field(default_factory=dict)
    feedback: str = ""

    def expected_side(self, question: str, *, swapped: bool) -> Side | None:
        """The right side where the second stimulus is left if swapped; None for any side."""
        choice = self.expected.get(question)
        if choice is None or choice == "tie":
            return choice
        return "left" if (choice == "first") != swapped else "right"


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt as raters read it.

    Attributes:
        id: in the task; training prompts begin with ``training/``.
        text: SHA-256 of its text.
    """

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example of the rubric.

    Attributes:
        unit: ``set`` or ``answer``.
        prompt: the prompt's text.
        left, right: the answers of both sides.
        explanation: which judgment is right, and why.
    """

    unit: Unit
    prompt: str
    left: tuple[str, ...]
    right: tuple[str, ...]
    explanation: str


@dataclass(frozen=True, slots=True)
class Comprehension:
    """A question that tests whether a rater understood the task.

    Attributes:
        text: the question.
        options: the answers to choose from.
        right: index of the right one.
        explanation: shown after a wrong answer.
    """

    text: str
    options: tuple[str, ...]
    right: int
    explanation: str


@dataclass(frozen=True, slots=True)
class Checks:
    """Attention checks in the schedule of every rater, by kind.

    Attributes:
        equal: two equal sets, which must tie.
        repeated: one answer repeated as often as a set has answers, which must lose on diversity.
        shuffled: an answer with its words in random order, which must lose on quality.
        words_per_second: nobody reads faster; fewer seconds on an item than its words need at this
            speed are too few.
    """

    equal: int = 1
    repeated: int = 1
    shuffled: int = 1
    words_per_second: float = 20.0


@dataclass(frozen=True, slots=True)
class Exclusions:
    """When judgments are left out of the main analysis. Results with all of them are reported too.

    Attributes:
        failed_checks: a rater with more failed checks is excluded.
        fast_share: a rater with a larger share of comparisons that were answered too fast is
            excluded.
        fast_judgments: whether the single judgments that were given too fast are excluded.
        completed_share: a rater who finished a smaller share of the schedule is excluded.
        same_side_share: a rater who chose one side, left or right, in a larger share of all
            preferences without ties is excluded.
    """

    failed_checks: int = 1
    fast_share: float = 0.2
    fast_judgments: bool = True
    completed_share: float = 0.5
    same_side_share: float = 0.95


@dataclass(frozen=True, slots=True)
class Analysis:
    """How the judgments are analysed.

    Attributes:
        alpha: of the family of planned contrasts.
        power: the power that the plan must reach.
        correction: for the planned contrasts; everything else is exploratory.
        resamples: of the bootstrap.
    """

    alpha: float = 0.05
    power: float = 0.8
    correction: Literal["holm"] = "holm"
    resamples: int = 2000


@dataclass(frozen=True, slots=True)
class Origin:
    """The run that the answers come from.

    Attributes:
        run: name of its directory.
        pair, task: in the run.
        samples: SHA-256 of its ``samples.jsonl``.
        version: of BACo that wrote the plan.
    """

    run: str
    pair: str
    task: str
    samples: str
    version: str


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first judgment.

    Attributes:
        title: shown to raters.
        origin: of the answers.
        methods: labels, the treatment first.
        raters: number of raters.
        seed: of the choice of prompts and answers, and of all schedules.
        set_size: answers of a set.
        word_limit: longer answers are cut there, for every method.
        cut: number of answers that were cut, by method.
        block: comparisons between two pauses; a rater can go back within a block.
        minutes: how long the study takes, as the website tells raters.
        consent: paragraphs that a rater must agree to.
        rubric: paragraphs about the task; a paragraph that begins with ``# `` is a heading.
        examples, comprehension: see their classes.
        questions, contrasts, checks, exclusions, analysis: see their classes.
        prompts, stimuli, items: all that is shown; the order has no meaning.
        prompts_per_rater: number of prompts that a rater judges; None: all of them.
        notes: free text for the registration: hypotheses, funding, deviations.
    """

    title: str
    origin: Origin
    methods: tuple[str, ...]
    raters: int
    seed: int
    set_size: int
    word_limit: int
    cut: Mapping[str, int]
    block: int
    minutes: int
    consent: tuple[str, ...]
    rubric: tuple[str, ...]
    examples: tuple[Example, ...]
    comprehension: tuple[Comprehension, ...]
    questions: tuple[Question, ...]
    contrasts: tuple[Contrast, ...]
    checks: Checks
    exclusions: Exclusions
    analysis: Analysis
    prompts: tuple[PromptText, ...]
    stimuli: tuple[Stimulus, ...]
    items: tuple[Item, ...]
    prompts_per_rater: int | None = None
    notes: str = ""
    format: int = FORMAT

    @classmethod
    def from_json(cls, value: Any) -> "Plan":
        """Read a plan.

        Raises:
            BacoError: a field is missing, unknown, or not what it has to be.
        """
        if isinstance(value, Mapping) and value.get("format") != FORMAT:
            raise BacoError(f"the plan has another format: this baco reads {FORMAT}")
        plan: Plan = _read(cls, value, "plan")
        plan.check()
        return plan

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the plan's canonical JSON: sorted keys, no spaces, UTF-8."""
        return canonical_hash(self.to_json())

    @cached_property
    def stimulus(self) -> Mapping[str, Stimulus]:
        """Every stimulus by its id."""
        return {stimulus.id: stimulus for stimulus in self.stimuli}

    @cached_property
    def item(self) -> Mapping[str, Item]:
        """Every item by its id."""
        return {item.id: item for item in self.items}

    @cached_property
    def question(self) -> Mapping[str, Question]:
        """Every question by its id."""
        return {question.id: question for question in self.questions}

    @cached_property
    def prompt(self) -> Mapping[str, PromptText]:
        """Every prompt by its id."""
        return {prompt.id: prompt for prompt in self.prompts}

    def asked(self, unit: Unit) -> list[Question]:
        """The questions on items of this unit, in their order."""
        return [question for question in self.questions if question.unit == unit]

    def words(self, item: Item) -> int:
        """Number of words of both stimuli."""
        return self.stimulus[item.first].words + self.stimulus[item.second].words

    def check(self) -> None:
        """Check that the parts fit together.

        Raises:
            BacoError: an id that is not there or not unique, or a number out of its range.
        """
        for what, ids in (
            ("question", [question.id for question in self.questions]),
            ("contrast", [contrast.id for contrast in self.contrasts]),
            ("prompt", [prompt.id for prompt in self.prompts]),
            ("stimulus", [stimulus.id for stimulus in self.stimuli]),
            ("item", [item.id for item in self.items]),
            ("method", list(self.methods)),
        ):
            if len(set(ids)) < len(ids):
                twice = next(id for id in ids if ids.count(id) > 1)
                raise BacoError(f"the plan has {what} {twice!r} twice: give every {what} its own")
        for name, least in (("raters", 1), ("set_size", 2), ("word_limit", 1), ("block", 1)):
            if getattr(self, name) < least:
                raise BacoError(f"the plan's {name} is {getattr(self, name)}: give {least} or more")
        if self.prompts_per_rater is not None and self.prompts_per_rater < 1:
            raise BacoError(
                f"the plan's prompts_per_rater is {self.prompts_per_rater}: give 1 or more, or null"
            )
        if not self.checks.words_per_second > 0:
            raise BacoError(
                f"the plan's words_per_second is {self.checks.words_per_second:g}: give a number "
                "above 0"
            )
        self._check_questions()
        for stimulus in self.stimuli:
            _known("prompt", stimulus.prompt, self.prompt)
        for item in self.items:
            _known("stimulus", item.first, self.stimulus)
            _known("stimulus", item.second, self.stimulus)
            for id in item.expected:
                _known("question", id, self.question)
        compared = {
            (i.unit, i.prompt, self.stimulus[i.first].method, self.stimulus[i.second].method)
            for i in self.items
            if i.kind == "comparison"
        }
        for unit, prompt in sorted({(unit, prompt) for unit, prompt, *_ in compared}):
            for pair in combinations(self.methods, 2):
                if (unit, prompt, *pair) not in compared:
                    raise BacoError(
                        f"the plan has no comparison of {pair[0]} and {pair[1]} (unit {unit}) on "
                        f"prompt {prompt!r}: add it, or remove the others of this unit and prompt"
                    )

    def _check_questions(self) -> None:
        for question in self.questions:
            wanted = POINTS if question.form == "rating" else len(get_args(Side))
            if len(question.anchors) != wanted:
                raise BacoError(
                    f"question {question.id!r} has {len(question.anchors)} anchors: a "
                    f"{question.form} needs {wanted}"
                )
        for contrast in self.contrasts:
            _known("question", contrast.question, self.question)
            _known("method", contrast.treatment, self.methods)
            _known("method", contrast.control, self.methods)
            if contrast.test == "equivalence" and not (contrast.margin and contrast.margin > 0):
                raise BacoError(
                    f"contrast {contrast.id!r} tests equivalence: give it a margin above 0"
                )
        for asked in self.comprehension:
            if not 0 <= asked.right < len(asked.options):
                raise BacoError(
                    f"the right option of {asked.text!r} is {asked.right}: it has "
                    f"{len(asked.options)}, counted from 0"
                )


def _known(what: str, id: str, ids: Collection[str]) -> None:
    if id not in ids:
        raise BacoError(f"the plan names {what} {id!r}, which it does not have")


def canonical_hash(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted keys and no spaces, as hexadecimal digits."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def text_hash(text: str) -> str:
    """SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan from its file.

    Raises:
        BacoError: there is no such file, it is not JSON, or not a plan.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BacoError(
            f"{path.parent} holds no study: give the directory that 'baco study plan --out' made"
        ) from error
    except (OSError, ValueError) as error:
        raise BacoError(f"cannot read {path}: {one_line(error)}") from error
    try:
        return Plan.from_json(value)
    except BacoError as error:
        raise BacoError(f"{path}: {error}") from error


def _read(kind: Any, value: Any, place: str) -> Any:
    """A value of JSON as a value of an annotated type.

    Raises:
        BacoError: it is not of this type; the message says where.
    """
    if is_dataclass(kind):
        return _read_fields(kind, value, place)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BacoError(f"{place} is {_shown(value)}: give a list")
        return tuple(_read(parts[0], part, f"{place}[{i}]") for i, part in enumerate(value))
    if origin is not None and issubclass(_class(origin), Mapping):
        if not isinstance(value, Mapping):
            raise BacoError(f"{place} is {_shown(value)}: give an object")
        return {key: _read(parts[1], part, f"{place}.{key}") for key, part in value.items()}
    if origin is Literal:
        if value not in parts:
            raise BacoError(f"{place} is {_shown(value)}: give one of {', '.join(parts)}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _read(parts[0], value, place)
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if kind is float and right:
        right = math.isfinite(value)
    if not right or (kind is not bool and isinstance(value, bool)):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise BacoError(f"{place} is {_shown(value)}: give {names[kind]}")
    return kind(value)


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise BacoError(f"{place} is {_shown(value)}: give an object")
    known = {part.name: part for part in fields(kind)}
    for name in value:
        if name not in known:
            raise BacoError(f"{place} has a field {name!r}, which is unknown: remove it")
    hints, given = get_type_hints(kind), {}
    for name, part in known.items():
        if name in value:
            given[name] = _read(hints[name], value[name], f"{place}.{name}")
        elif part.default is MISSING and part.default_factory is MISSING:
            raise BacoError(f"{place} has no field {name!r}: add it")
    return kind(**given)


def _class(origin: Any) -> type:
    return origin if isinstance(origin, type) else object


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
