"""Reads a rendered chat prompt back, from the aligned model's token ids to the conversation.

Harnesses and pipelines pass token ids to a model, not conversations. The base model needs the same
conversation as plain text. The chat template is a black box, so its frame is found by rendering
conversations of known words and taking the text between them. This module knows the renderer and
nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from baco.errors import BacoError
from baco.text.prompts import Prompt, Renderer
from baco.text.templates import today

Message = dict[str, str]

# Words that no template contains; a rendering is cut at them.
SYSTEM, FIRST, ANSWER, SECOND = "qosystemqo", "qofirstqo", "qoanswerqo", "qosecondqo"


@dataclass(frozen=True, slots=True)
class Frame:
    """What a chat template writes around the messages of a conversation.

    Attributes:
        head: before the first content.
        to_user: between the system message and the first question; None without system message.
        to_answer: between a question and its answer.
        to_next: between an answer and the next question.
        tail: after the last question, before a new answer.
        to_begun: the same before an answer that is already begun; None if it is equal.
        day: the date in the frame.
    """

    head: str
    to_user: str | None
    to_answer: str
    to_next: str
    tail: str
    to_begun: str | None
    day: str

    @classmethod
    def of(cls, renderer: Renderer, day: str, *, system: bool) -> Self | None:
        """Find the frame; None if the template does not write the contents in order."""
        conversation = [
            {"role": "user", "content": FIRST},
            {"role": "assistant", "content": ANSWER},
            {"role": "user", "content": SECOND},
        ]
        words = [FIRST, ANSWER, SECOND]
        if system:
            conversation.insert(0, {"role": "system", "content": SYSTEM})
            words.insert(0, SYSTEM)
        prompt = render(renderer, conversation, day)
        if prompt is None:
            return None
        # Through token ids and back, as the prompts come.
        rest = as_text(renderer.aligned_tokenizer, prompt.aligned_ids)
        gaps = []
        for word in words:
            gap, separator, rest = rest.partition(word)
            if not separator:
                return None
            gaps.append(gap)
        to_begun = None
        begun = render(renderer, [*conversation, {"role": "assistant", "content": ANSWER}], day)
        if begun is not None:
            text = as_text(renderer.aligned_tokenizer, begun.aligned_ids)
            before = text.rpartition(SECOND)[2].removesuffix(ANSWER)
            if before.removesuffix(" ") != rest:  # a joining space is the answer's
                to_begun = before
        return cls(
            head=gaps[0],
            to_user=gaps[1] if system else None,
            to_answer=gaps[-2],
            to_next=gaps[-1],
            tail=rest,
            to_begun=to_begun,
            day=day,
        )

    def read(self, text: str, end: str) -> tuple[list[Message], int] | None:
        """The conversation in ``text`` up to its last question, and the index of the answer.

        None if ``text`` does not have this frame.

        Args:
            text: a rendering.
            end: the text between question and answer, `tail` or `to_begun`.
        """
        at = text.rfind(end)
        if not end or not text.startswith(self.head) or at < len(self.head):
            return None
        conversation = self._messages(text[len(self.head) : at])
        return None if conversation is None else (conversation, at + len(end))

    def _messages(self, rest: str) -> list[Message] | None:
        conversation = []
        if self.to_user is not None:
            system, separator, rest = rest.partition(self.to_user)
            if not separator:
                return None
            conversation.append({"role": "system", "content": system})
        while True:
            question, answered, rest = rest.partition(self.to_answer)
            conversation.append({"role": "user", "content": question})
            if not answered:
                return conversation
            answer, separator, rest = rest.partition(self.to_next)
            if not separator:
                return None
            conversation.append({"role": "assistant", "content": answer})


def render(renderer: Renderer, conversation: list[Message], day: str) -> Prompt | None:
    """Both renderings; None without a template, or if it refuses this conversation."""
    try:
        return renderer.render(conversation, day=day)
    except BacoError:
        return None


def as_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ``ids`` with its special tokens spelled out."""
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


@dataclass(frozen=True, slots=True)
class BasePrompt:
    """A row's prompt as the base model reads it.

    Attributes:
        ids: the base model's own prompt.
        start: the number of the aligned model's ids that it replaces; the answer's ids follow.
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class ChatReader:
    """Finds the base model's prompt for the aligned model's.

    Attributes:
        renderer: the pair's. If its rendering of the conversation does not give the ids that were
            read, they are treated as raw text.
    """

    renderer: Renderer

    def frames(self) -> list[Frame]:
        """The template's frames. They are found at each call, since some templates write the date.

        Prompts may hold the pair's date or today's: the tokenizer does not know the pair's.
        """
        days = dict.fromkeys((self.renderer.date or today(), today()))
        frames = []
        for day in days:
            both = [Frame.of(self.renderer, day, system=system) for system in (False, True)]
            frames += [frame for frame in both if frame is not None]
        return frames

    def read(self, rows: Sequence[Sequence[int]]) -> list[BasePrompt | None]:
        """The base model's prompt of every row; None for a row that is no rendered conversation."""
        frames = self.frames()
        prompts: dict[tuple[int, ...], BasePrompt | None] = {}
        for row in map(tuple, rows):
            if row not in prompts:
                prompts[row] = self._read(row, frames)
        return [prompts[tuple(row)] for row in rows]

    def _read(self, ids: tuple[int, ...], frames: list[Frame]) -> BasePrompt | None:
        text = as_text(self.renderer.aligned_tokenizer, ids)
        for frame in frames:
            new = frame.read(text, frame.tail)
            begun = None if frame.to_begun is None else frame.read(text, frame.to_begun)
            # `tail` may be the beginning or the end of `to_begun`: take the later answer.
            if begun is not None and (new is None or begun[1] > new[1]):
                prompt = self._begun(ids, text, frame, *begun)
                if prompt is not None:
                    return prompt
            rendered = new and render(self.renderer, new[0], frame.day)
            if rendered and ids[: len(rendered.aligned_ids)] == rendered.aligned_ids:
                if rendered.thinking is not None and len(ids) == len(rendered.aligned_ids):
                    raise BacoError(
                        "the transformers object cannot keep the thinking of the aligned model "
                        "apart: load the pair with thinking=False, and render its prompts with "
                        "enable_thinking=False"
                    )
                return BasePrompt(rendered.base_ids, start=len(rendered.aligned_ids))
        return None

    def _begun(
        self,
        ids: tuple[int, ...],
        text: str,
        frame: Frame,
        conversation: list[Message],
        start: int,
    ) -> BasePrompt | None:
        """The base model's prompt if the template writes more than `tail` before an answer that is
        begun, such as empty thoughts; None if this is not such a prompt.
        """
        question = render(self.renderer, conversation, frame.day)
        answered = [*conversation, {"role": "assistant", "content": ANSWER}]
        begun = render(self.renderer, answered, frame.day)
        if question is None or begun is None or begun.aligned_text != text[:start] + ANSWER:
            return None
        tokenizer = self.renderer.aligned_tokenizer
        head = tuple(tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        return BasePrompt(question.base_ids, start=len(head)) if ids[: len(head)] == head else None
