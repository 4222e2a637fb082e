"""Makes the plan of a study from a run: chooses prompts and answers, and adds checks and training.

All choices follow from the seed, and none of them looks at scores. Answers are cut at one number of
words for every method.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from baco.errors import BacoError
from baco.evaluation.records import Prompt, Setting
from baco.evaluation.store import Run
from baco.study import default_texts as texts_of
from baco.study.plan import (
    Analysis,
    Check,
    Checks,
    Choice,
    Contrast,
    Exclusions,
    Item,
    Origin,
    Plan,
    PromptText,
    Stimulus,
    Unit,
    text_hash,
)
from baco.study.schedule import UNITS
from baco.version import __version__

SET_SIZES = range(4, 7)
CUT = " […]"
# For the minutes that raters are told: careful reading, and a choice.
READING_WORDS_PER_SECOND = 4.0
SECONDS_PER_RESPONSE = 4.0
INTRODUCTION_MINUTES = 4
# Points of the quality scale within which two methods count as equally good.
MARGIN = 0.5
# A text of fewer different words does not look wrong when they are shuffled.
SHUFFLED_WORDS = 6
# Scripts without spaces: one character counts as one word.
WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """What a user decides about a study.

    Attributes:
        methods: names of methods or settings of the run, the treatment first.
        task, pair: in the run; None where it has one only.
        raters: number of raters.
        prompts: number of prompts.
        per_rater: number of prompts that a rater judges; None: all of them.
        set_size: answers of a set.
        word_limit: of every answer.
        creativity: the unit on which it is judged.
        block: comparisons between two pauses.
        seed: of all choices.
        title, consent, rubric, notes: None for the default texts.
    """

    methods: Sequence[str]
    task: str | None = None
    pair: str | None = None
    raters: int = 24
    prompts: int = 40
    per_rater: int | None = None
    set_size: int = 5
    word_limit: int = 80
    creativity: Unit = "set"
    block: int = 10
    seed: int = 0
    title: str | None = None
    consent: Sequence[str] | None = None
    rubric: Sequence[str] | None = None
    notes: str = ""


def build(run: Run, options: StudyOptions) -> tuple[Plan, dict[str, str]]:
    """The plan of a study of a run's answers, and all texts by their SHA-256.

    Raises:
        BacoError: an option out of its range, a method or task that the run does not have, a
            prompt that a method did not answer, too few prompts or answers.
    """
    builder = _Builder(run, options)
    return builder.plan(), builder.texts


class _Builder:
    def __init__(self, run: Run, options: StudyOptions) -> None:
        _check_options(options)
        self._options = options
        self._pair = _only("pair", options.pair, [pair["name"] for pair in run.config["pairs"]])
        self._task = _only("task", options.task, [task["name"] for task in run.config["tasks"]])
        self._settings = [_setting(name, run) for name in options.methods]
        self._methods = tuple(setting.label for setting in self._settings)
        if len(set(self._methods)) < len(self._methods):
            raise BacoError(f"two of the methods are {self._methods}: name each setting once")
        self._run = run
        self._questions = texts_of.questions(options.creativity)
        self.texts: dict[str, str] = {}
        self._prompts: list[PromptText] = []
        self._stimuli: list[Stimulus] = []
        self._items: list[Item] = []
        self._cut = dict.fromkeys(self._methods, 0)

    def plan(self) -> Plan:
        options = self._options
        prompts = {id: p for (task, id), p in self._run.prompts().items() if task == self._task}
        answers = self._answers(prompts)
        chosen, spare = self._choose(list(prompts))
        for id in chosen:
            self._add_prompt(id, conversation_text(prompts[id]))
            self._add_comparisons(id, answers[id])
        self._add_checks(spare or chosen, prompts, answers)
        self._add_training()
        words = {stimulus.id: stimulus.words for stimulus in self._stimuli}
        return Plan(
            title=options.title or texts_of.TITLE,
            origin=Origin(
                run=self._run.path.resolve().name,
                pair=self._pair,
                task=self._task,
                samples=_file_hash(self._run.path / "samples.jsonl"),
                version=__version__,
            ),
            methods=self._methods,
            raters=options.raters,
            seed=options.seed,
            set_size=options.set_size,
            word_limit=options.word_limit,
            cut=self._cut,
            block=options.block,
            minutes=self._minutes(words),
            consent=tuple(options.consent or texts_of.CONSENT),
            rubric=tuple(options.rubric or texts_of.RUBRIC),
            examples=texts_of.EXAMPLES,
            comprehension=texts_of.COMPREHENSION,
            questions=self._questions,
            contrasts=tuple(self._contrasts()),
            checks=Checks(),
            exclusions=Exclusions(),
            analysis=Analysis(),
            prompts=tuple(self._prompts),
            stimuli=tuple(self._stimuli),
            items=tuple(self._items),
            prompts_per_rater=options.per_rater,
            notes=options.notes,
        )

    # Answers.

    def _answers(self, prompts: Mapping[str, Prompt]) -> dict[str, dict[str, list[str]]]:
        """The answers as shown, by prompt and method, in a random order."""
        labels = {(setting.method, setting.label) for setting in self._settings}
        texts: dict[str, dict[str, list[str]]] = {id: {} for id in prompts}
        number = 0
        for sample in self._run.samples():
            if (sample.pair, sample.task) != (self._pair, self._task):
                continue
            if (sample.method, sample.setting) in labels:
                texts[sample.prompt].setdefault(sample.setting, []).append(sample.text)
                number += 1
        if not number:
            raise BacoError(
                f"{self._run.path} holds no answers of these methods yet: let 'baco sweep' finish"
            )
        needed = self._options.set_size + 1  # a single answer that is in no set
        for method in self._methods:
            missing = [id for id in prompts if method not in texts[id]]
            if missing:
                raise BacoError(
                    f"{method} has no answers to {len(missing)} of {len(prompts)} prompts (such as "
                    f"{missing[0]!r}): let 'baco sweep' finish, or choose another method"
                )
            if not any(text.strip() for id in prompts for text in texts[id][method]):
                raise BacoError(f"all answers of {method} are empty: there is nothing to judge")
            fewest = min(len(texts[id][method]) for id in prompts)
            if fewest < needed:
                raise BacoError(
                    f"{method} has {fewest} answers to a prompt: sets of {self._options.set_size} "
                    f"and one answer beside them need {needed}; lower --set-size or draw more "
                    "with 'baco sweep -n'"
                )
        return {
            id: {method: self._shuffled(texts[id][method], id, method) for method in self._methods}
            for id in prompts
        }

    def _choose(self, ids: list[str]) -> tuple[list[str], list[str]]:
        """The prompts to compare on, and those left for checks."""
        wanted = self._options.prompts
        if wanted > len(ids):
            raise BacoError(
                f"task {self._task} has {len(ids)} prompts in {self._run.path}: give --prompts "
                f"{len(ids)} or fewer"
            )
        order = self._shuffled(ids, "prompts")
        return order[:wanted], order[wanted:]

    def _shuffled(self, values: Sequence[str], *parts: object) -> list[str]:
        def mark(place: int) -> bytes:
            words = "/".join(map(str, (self._options.seed, *parts, place)))
            return hashlib.sha256(words.encode()).digest()

        return [values[place] for place in sorted(range(len(values)), key=mark)]

    # Items.

    def _add_comparisons(self, prompt: str, answers: Mapping[str, Sequence[str]]) -> None:
        size = self._options.set_size
        shown = {"set": slice(0, size), "answer": slice(size, size + 1)}
        for unit in UNITS:
            ids = []
            for place, method in enumerate(self._methods):
                cut = [self._limited(text, method) for text in answers[method][shown[unit]]]
                ids.append(self._add_stimulus(f"{unit}/{prompt}/{place}", prompt, cut, method))
            for first, second in combinations(ids, 2):
                id = f"{first}-{second.rpartition('/')[2]}"
                self._items.append(Item(id, "comparison", unit, prompt, first, second))

    def _add_checks(
        self,
        ids: Sequence[str],
        prompts: Mapping[str, Prompt],
        answers: Mapping[str, Mapping[str, Sequence[str]]],
    ) -> None:
        """Attention checks, made of answers to prompts that no comparison has, where some are left.

        Where the answers do not serve, because a set hardly differs in itself or an answer has too
        few words, a text of this package takes their place.
        """
        size, limit, left = self._options.set_size, self._options.word_limit, list(ids)

        def next_prompt() -> str:
            return left.pop(0) if len(left) > 1 else left[0]

        def shown(prompt: str) -> list[list[str]]:
            return [
                [limited(text, limit)[0] for text in own[:size]] for own in answers[prompt].values()
            ]

        def add(
            check: Check, unit: Unit, place: int, prompt: str, sides: Sequence[list[str]]
        ) -> None:
            if prompt in prompts:
                self._add_prompt(prompt, conversation_text(prompts[prompt]))
            id = f"check/{check}/{place}"
            first, second = (
                self._add_stimulus(f"{id}/{side}", prompt, texts)
                for side, texts in enumerate(sides)
            )
            expected = self._expected(check, unit)
            self._items.append(Item(id, "check", unit, prompt, first, second, check, expected))

        checks = Checks()
        for place in range(checks.equal):
            prompt = next_prompt()
            texts = max(shown(prompt), key=lambda texts: len(set(texts)))
            add("equal", "set", place, prompt, [texts, texts])
        for place in range(checks.repeated):
            prompt = next_prompt()
            texts = max(shown(prompt), key=lambda texts: len(set(texts)))
            if len(set(texts)) < size - 1:
                prompt, texts = self._spare_prompt(), list(texts_of.SPARE_SET[:size])
            add("repeated", "set", place, prompt, [texts, texts[:1] * size])
        for place in range(checks.shuffled):
            prompt = next_prompt()
            text = max((texts[0] for texts in shown(prompt)), key=count_words)
            words, space = text.split(), " "
            if len(words) < SHUFFLED_WORDS:  # a script without spaces, or a short answer
                words, space = WORD.findall(text), ""
            if len(set(words)) < SHUFFLED_WORDS:
                prompt, text, space = self._spare_prompt(), texts_of.SPARE_SET[0], " "
                words = text.split()
            shuffled = space.join(self._shuffled(words, "words", place))
            add("shuffled", "answer", place, prompt, [[text], [shuffled]])

    def _expected(self, check: Check, unit: Unit) -> dict[str, Choice]:
        if check == "equal":
            return {question.id: "tie" for question in self._questions if question.unit == unit}
        dimension = "diversity" if check == "repeated" else "quality"
        return {
            q.id: "first" for q in self._questions if (q.unit, q.dimension) == (unit, dimension)
        }

    def _spare_prompt(self) -> str:
        self._add_prompt("check/spare", texts_of.SPARE_PROMPT)
        return "check/spare"

    def _add_training(self) -> None:
        for place, exercise in enumerate(texts_of.EXERCISES):
            prompt = f"training/{place}"
            self._add_prompt(prompt, exercise.prompt)
            first, second = (
                self._add_stimulus(
                    f"training/{place}/{side}", prompt, texts[: self._options.set_size]
                )
                for side, texts in enumerate((exercise.first, exercise.second))
            )
            dimension = "diversity" if exercise.unit == "set" else "quality"
            expected = {
                question.id: exercise.expected
                for question in self._questions
                if (question.unit, question.dimension) == (exercise.unit, dimension)
                and (question.form == "preference" or exercise.expected != "tie")
            }
            self._items.append(
                Item(
                    prompt, "training", exercise.unit, prompt, first, second,
                    expected=expected, feedback=exercise.feedback,
                )
            )  # fmt: skip

    def _minutes(self, words: Mapping[str, int]) -> int:
        """Minutes for a rater: one pair of methods of every prompt, the checks, the training."""
        pairs = len(self._methods) * (len(self._methods) - 1) // 2
        share = min(1.0, (self._options.per_rater or self._options.prompts) / self._options.prompts)
        seconds = 0.0
        for item in self._items:
            responses = sum(
                2 if question.form == "rating" else 1
                for question in self._questions
                if question.unit == item.unit
            )
            reading = (words[item.first] + words[item.second]) / READING_WORDS_PER_SECOND
            seen = share / pairs if item.kind == "comparison" else 1
            seconds += seen * (reading + responses * SECONDS_PER_RESPONSE)
        return math.ceil(seconds / 60) + INTRODUCTION_MINUTES

    def _add_prompt(self, id: str, text: str) -> None:
        if all(prompt.id != id for prompt in self._prompts):
            self._prompts.append(PromptText(id, self._kept(text)))

    def _add_stimulus(self, id: str, prompt: str, texts: Sequence[str], method: str = "") -> str:
        hashes, words = tuple(map(self._kept, texts)), sum(map(count_words, texts))
        unit: Unit = "answer" if len(texts) == 1 else "set"
        self._stimuli.append(Stimulus(id, unit, prompt, method, hashes, words))
        return id

    def _limited(self, text: str, method: str) -> str:
        shown, is_cut = limited(text, self._options.word_limit)
        self._cut[method] += is_cut
        return shown

    def _kept(self, text: str) -> str:
        hash = text_hash(text)
        self.texts[hash] = text
        return hash

    # Contrasts.

    def _contrasts(self) -> Iterator[Contrast]:
        """The first method against each other one.

        It must be better than a base model in quality. It must be more diverse than any other
        method, with a quality that is equivalent.
        """
        treatment, *controls = self._settings
        primary = True
        for number, control in enumerate(controls, 1):
            pair = treatment.label, control.label
            if control.method.partition(",")[0].lower() == "base":
                yield Contrast(
                    f"quality-{number}", "quality", *pair, "superiority",
                    f"Raters prefer answers of {pair[0]} to answers of {pair[1]} in quality.",
                )  # fmt: skip
                continue
            yield Contrast(
                f"diversity-{number}", "diversity", *pair, "superiority",
                f"Raters find more different ideas in sets of {pair[0]} than in sets of {pair[1]}.",
                primary=primary,
            )  # fmt: skip
            primary = False
            yield Contrast(
                f"no-loss-{number}", "quality_rating", *pair, "equivalence",
                f"Answers of {pair[0]} and of {pair[1]} differ by less than {MARGIN:g} points in "
                "quality.",
                margin=MARGIN,
            )  # fmt: skip


def count_words(text: str) -> int:
    """Number of words; of scripts without spaces, of characters."""
    return len(WORD.findall(text))


def limited(text: str, words: int) -> tuple[str, bool]:
    """A text cut after this many words, and whether it was longer."""
    text = text.strip()
    for number, word in enumerate(WORD.finditer(text), 1):
        if number > words:
            return text[: word.start()].rstrip() + CUT, True
    return text, False


def conversation_text(prompt: Prompt) -> str:
    """A prompt as raters read it: its one turn, or all turns with their roles."""
    if len(prompt.messages) == 1:
        return prompt.text.strip()
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content'].strip()}"
        for message in prompt.messages
    )


def _check_options(options: StudyOptions) -> None:
    if len(options.methods) < 2:
        raise BacoError("a study compares two or more methods of the run: name them with --methods")
    if options.set_size not in SET_SIZES:
        raise BacoError(f"--set-size is {options.set_size}: give 4, 5 or 6")
    for name in ("raters", "prompts", "per_rater", "word_limit", "block"):
        number = getattr(options, name)
        if number is not None and number < 1:
            shown = name.replace("_", "-")
            raise BacoError(f"--{shown} is {getattr(options, name)}: give 1 or more")


def _only(what: str, given: str | None, known: Sequence[str]) -> str:
    """The named one, or the only one."""
    if given is None and len(known) == 1:
        return known[0]
    if given is None:
        raise BacoError(
            f"the run has several {what}s: give --{what} with one of {', '.join(known)}"
        )
    if given not in known:
        raise BacoError(f"the run has no {what} {given!r}: it has {', '.join(known)}")
    return given


def _setting(name: str, run: Run) -> Setting:
    """The setting that a user names by its label, or by a method that has one plain setting.

    Of a method with many, the plain one is that at temperature 1, with nothing else set.
    """
    settings = run.settings
    wanted = name.strip().lower()
    named = [s for s in settings if s.label.lower() == wanted]
    of_method = [s for s in settings if s.method.partition(",")[0].lower() == wanted]
    plain = [s for s in of_method if s.label.lower() == f"{wanted} t=1"]
    if named or plain or len(of_method) == 1:
        return (named or plain or of_method)[0]
    if of_method:
        raise BacoError(
            f"method {name!r} has {len(of_method)} settings in {run.path}: name one of "
            f"{', '.join(setting.label for setting in of_method)}"
        )
    labels = [setting.label for setting in settings]
    close = difflib.get_close_matches(name, labels, 3, 0.3) or labels[:3]
    raise BacoError(f"{run.path} has no method {name!r}: name one such as {', '.join(close)}")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
