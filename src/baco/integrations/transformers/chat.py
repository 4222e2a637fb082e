"""Reading a rendered chat prompt back: from the aligned half's token ids to the conversation.

Harnesses and pipelines hand a model token ids, not conversations; but the base half wants the same
conversation as plain text. The chat template is a black box, so its frame is learnt by rendering
conversations of known words and looking at what stands between them. It knows the pair's renderer;
it knows nothing of models.
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
        to_user: from the system message to the first question; None where there is no such message.
        to_answer: from a question to its answer.
        to_next: from an answer to the next question.
        tail: after the last question, where an answer is asked for,
        to_begun: and where an answer is begun; None where that is the same.
        day: the date in it.
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
        """Learn the frame; None where the template does not lay a conversation out in order."""
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
        # Through token ids and back, since that is the way the prompts themselves come.
        rest = as_text(renderer.aligned_tokenizer, prompt.aligned_ids)
        gaps = []
        for word in words:
            gap, found, rest = rest.partition(word)
            if not found:
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
        """The conversation in ``text``, up to its last question, and where its answer begins.

        Args:
            text: a rendering.
            end: what stands between the two, `tail` or `to_begun`.
        """
        at = text.rfind(end)
        if not end or not text.startswith(self.head) or at < len(self.head):
            return None
        conversation = self._messages(text[len(self.head) : at])
        return None if conversation is None else (conversation, at + len(end))

    def _messages(self, rest: str) -> list[Message] | None:
        conversation = []
        if self.to_user is not None:
            system, found, rest = rest.partition(self.to_user)
            if not found:
                return None
            conversation.append({"role": "system", "content": system})
        while True:
            question, answered, rest = rest.partition(self.to_answer)
            conversation.append({"role": "user", "content": question})
            if not answered:
                return conversation
            answer, found, rest = rest.partition(self.to_next)
            if not found:
                return None
            conversation.append({"role": "assistant", "content": answer})


def render(renderer: Renderer, conversation: list[Message], day: str) -> Prompt | None:
    """Both renderings, or None where there is no template or it refuses this conversation."""
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
    """One row's prompt as the base half reads it.

    Attributes:
        ids: the base half's own prompt.
        start: how many of the aligned half's ids it stands for; the answer's ids follow.
    """

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class ChatReader:
    """Finds the base half's prompt for the aligned half's.

    Attributes:
        renderer: the pair's. Its rendering of the conversation found must give the very ids that
            were read, or they are taken for raw text.
    """

    renderer: Renderer

    def frames(self) -> list[Frame]:
        """The template's frames, learnt anew each time: some templates write today's date.

        Callers render with the tokenizer, which knows nothing of a date that the pair is given.
        """
        days = dict.fromkeys((self.renderer.date or today(), today()))
        frames = []
        for day in days:
            found = [Frame.of(self.renderer, day, system=system) for system in (False, True)]
            frames += [frame for frame in found if frame is not None]
        return frames

    def read(self, rows: Sequence[Sequence[int]]) -> list[BasePrompt | None]:
        """The base half's prompt of every row; None where a row is no rendered conversation."""
        frames = self.frames()
        known: dict[tuple[int, ...], BasePrompt | None] = {}
        for row in map(tuple, rows):
            if row not in known:
                known[row] = self._read(row, frames)
        return [known[tuple(row)] for row in rows]

    def _read(self, ids: tuple[int, ...], frames: list[Frame]) -> BasePrompt | None:
        text = as_text(self.renderer.aligned_tokenizer, ids)
        for frame in frames:
            asked = frame.read(text, frame.tail)
            begun = None if frame.to_begun is None else frame.read(text, frame.to_begun)
            # What asks for an answer may be the beginning of what stands before one, or the end.
            if begun is not None and (asked is None or begun[1] > asked[1]):
                found = self._begun(ids, text, frame, *begun)
                if found is not None:
                    return found
            prompt = asked and render(self.renderer, asked[0], frame.day)
            if prompt and ids[: len(prompt.aligned_ids)] == prompt.aligned_ids:
                return BasePrompt(prompt.base_ids, start=len(prompt.aligned_ids))
        return None

    def _begun(
        self,
        ids: tuple[int, ...],
        text: str,
        frame: Frame,
        conversation: list[Message],
        start: int,
    ) -> BasePrompt | None:
        """The base half's prompt where the answer begins behind more than what asks for it, such as
        empty thoughts.
        """
        asking = render(self.renderer, conversation, frame.day)
        answered = [*conversation, {"role": "assistant", "content": ANSWER}]
        begun = render(self.renderer, answered, frame.day)
        if asking is None or begun is None or begun.aligned_text != text[:start] + ANSWER:
            return None
        tokenizer = self.renderer.aligned_tokenizer
        head = tuple(tokenizer(text[:start], add_special_tokens=False)["input_ids"])
        return BasePrompt(asking.base_ids, start=len(head)) if ids[: len(head)] == head else None
