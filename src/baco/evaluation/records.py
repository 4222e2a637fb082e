"""The records of an evaluation: prompts, settings and samples. Plain data; no models, no files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from baco.source import Source
from baco.text.prompts import Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        id: unique in the task.
        messages: a conversation that ends with a user's turn.
        category: by which a table can be split.
        reference: data that the task's verifier needs to check an answer.
        paraphrases: other wordings, where the task has them.
    """

    id: str
    messages: tuple[Message, ...]
    category: str | None = None
    reference: Mapping[str, Any] = field(default_factory=dict)
    paraphrases: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last user's turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One operating point of a method.

    Attributes:
        method: such as ``P-Punc``, ``aligned, min-p`` or ``mixing``.
        label: unique in the method, such as ``P-Punc:0.4``.
        value: the swept number, None where there is none.
        options: all that its samples depend on, as plain JSON.
    """

    method: str
    label: str
    value: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer, with its place in the run and its sources.

    Attributes:
        prompt: the prompt's id.
        setting, value: the setting's label and its swept number.
        sample: its index among the n samples, from 0.
        pieces: (text, source) in order, which join to the text; the source is None where a row
            mixed both models. Empty for methods without sources.
        tokens: number of all tokens generated for this sample, the end token included.
        base_share: of its tokens, in [0, 1]; None where tokens are mixed, or the method has no
            sources.
        switches: number of changes of source between tokens; None likewise.
        finish_reason: ``stop``, ``length``, or a method's own word for a failed answer.
        seed: of the run.
    """

    pair: str
    task: str
    prompt: str
    method: str
    setting: str
    value: float | None
    sample: int
    text: str
    pieces: tuple[tuple[str, Source | None], ...]
    tokens: int
    base_share: float | None
    switches: int | None
    finish_reason: str
    seed: int

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """(pair, task, method, setting, prompt), which all samples of a group share."""
        return (self.pair, self.task, self.method, self.setting, self.prompt)


@dataclass(frozen=True, slots=True)
class Group:
    """All n samples of one prompt at one setting."""

    pair: str
    task: str
    method: str
    setting: str
    value: float | None
    prompt: Prompt
    samples: Sequence[Sample]

    @property
    def texts(self) -> list[str]:
        """The answers, in the order of their samples."""
        return [sample.text for sample in self.samples]


def grouped(
    samples: Iterator[Sample], prompts: Mapping[tuple[str, str], Prompt]
) -> Iterator[Group]:
    """Consecutive samples of one prompt at one setting as groups; `prompts` by (task, id)."""
    for (pair, task, method, setting, prompt), siblings in groupby(samples, lambda s: s.group):
        members = list(siblings)
        yield Group(pair, task, method, setting, members[0].value, prompts[task, prompt], members)
