"""The records of an evaluation: prompts, settings, samples. Plain data; no models, no files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from baco.text.prompts import Message

Source = Literal["base", "aligned"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a task.

    Attributes:
        id: unique in the task.
        messages: a conversation that ends with a user's turn.
        category: what a table may be split by.
        reference: what the task's own verifier needs to check an answer.
        paraphrases: other ways to ask the same, where the task has them.
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
        label: as a user would type or say it, unique in the method: ``P-Punc:0.4``.
        value: the swept number, None where there is none.
        options: all that is needed to generate its samples again.
    """

    method: str
    label: str
    value: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer: where it belongs, what it says, and who said it.

    Attributes:
        prompt: the prompt's id.
        setting: the setting's label,
        value: and its swept number.
        sample: which of the n it is, from 0.
        pieces: (text, source) in order, joined the text; empty where the method has no sources.
        tokens: length, the end token included; of all that was generated for this sample.
        base_share: of its tokens, in [0, 1]; None where the method has no sources.
        switches: how often the source changed from token to token; None likewise.
        finish_reason: ``stop`` or ``length``, or a method's own word for an answer it did not get.
        seed: of the run's draws.
    """

    pair: str
    task: str
    prompt: str
    method: str
    setting: str
    value: float | None
    sample: int
    text: str
    pieces: tuple[tuple[str, Source], ...]
    tokens: int
    base_share: float | None
    switches: int | None
    finish_reason: str
    seed: int

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """(pair, task, method, setting, prompt): what its sibling samples share."""
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
    """Sibling samples, which stand together, as groups; `prompts` by (task, id)."""
    for (pair, task, method, setting, prompt), members in groupby(samples, lambda s: s.group):
        same = list(members)
        known = prompts[task, prompt]
        yield Group(pair, task, method, setting, same[0].value, known, same)
