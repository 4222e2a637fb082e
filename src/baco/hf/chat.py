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
from baco.prompts import Prompt, Renderer

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
        tail: after the last question, the generation prompt included.
    """

    head: str
    to_user: str | None
    to_answer: str
    to_next: str
    tail: str

    @classmethod
    def of(cls, renderer: Renderer, *, system: bool) -> Self | None:
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
        prompt = render(renderer, conversation)
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
        return cls(
            head=gaps[0],
            to_user=gaps[1] if system else None,
            to_answer=gaps[-2],
            to_next=gaps[-1],
            tail=rest,
        )

    def read(self, text: str) -> list[Message] | None:
        """The conversation in ``text``, up to its last generation prompt."""
        end = text.rfind(self.tail)
        if not self.tail or not text.startswith(self.head) or end < len(self.head):
            return None
        rest = text[len(self.head) : end]
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


def render(renderer: Renderer, conversation: list[Message]) -> Prompt | None:
    """Both renderings, or None where there is no template or it refuses this conversation."""
    try:
        return renderer.render(conversation)
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
        """The template's frames, learnt anew each time: some templates write today's date."""
        found = (Frame.of(self.renderer, system=system) for system in (False, True))
        return [frame for frame in found if frame is not None]

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
            conversation = frame.read(text)
            prompt = conversation and render(self.renderer, conversation)
            if prompt and ids[: len(prompt.aligned_ids)] == prompt.aligned_ids:
                return BasePrompt(prompt.base_ids, start=len(prompt.aligned_ids))
        return None
