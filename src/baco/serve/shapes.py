"""The two shapes of OpenAI's API that answers are told in: chat completions and completions."""

import time
import uuid
from dataclasses import dataclass
from typing import Protocol

from baco.completion import Chunk
from baco.serve.choices import Choice, tokens_of
from baco.serve.replies import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatReply,
    Delta,
    Provenance,
    Reply,
    TextChoice,
    TextReply,
    Usage,
)


class Shape(Protocol):
    """Tells one request's answers; indices are those of its choices."""

    def opening(self, index: int, /) -> Reply | None:
        """What a stream begins a choice with."""

    def chunk(self, index: int, choice: Choice, chunk: Chunk, told: Provenance) -> Reply:
        """A piece of a choice."""

    def counted(self, usage: Usage) -> Reply:
        """A stream's last word, if asked."""

    def reply(self, choices: list[Choice], usage: Usage) -> Reply:
        """All choices at once."""


@dataclass(frozen=True, slots=True)
class Head:
    """What all replies to a request begin with."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Head":
        """The head of a new reply."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


class ChatShape:
    """``/v1/chat/completions``."""

    def __init__(self, model: str, logprobs: bool) -> None:
        self._head, self._logprobs = Head.new("chatcmpl", model), logprobs

    def opening(self, index: int) -> Reply:
        return self._chunk(
            [
                ChatChunkChoice(
                    index=index,
                    delta=Delta(role="assistant", content=""),
                    logprobs=None,
                    finish_reason=None,
                )
            ]
        )

    def chunk(self, index: int, choice: Choice, chunk: Chunk, told: Provenance) -> Reply:
        return self._chunk(
            [
                ChatChunkChoice(
                    index=index,
                    delta=Delta(content=chunk.text) if chunk.text else Delta(),
                    logprobs=choice.chat_logprobs(chunk.tokens) if self._logprobs else None,
                    finish_reason=chunk.finish_reason,
                    baco=told,
                )
            ]
        )

    def counted(self, usage: Usage) -> Reply:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> Reply:
        head = self._head
        return ChatChunk(
            id=head.id, created=head.created, model=head.model, choices=choices, usage=usage
        )

    def reply(self, choices: list[Choice], usage: Usage) -> Reply:
        head = self._head
        told = [self._whole(index, choice) for index, choice in enumerate(choices)]
        return ChatReply(
            id=head.id, created=head.created, model=head.model, choices=told, usage=usage
        )

    def _whole(self, index: int, choice: Choice) -> ChatChoice:
        assert choice.completion is not None
        tokens = tokens_of(choice.completion)
        return ChatChoice(
            index=index,
            message=AnswerMessage(content=choice.completion.text),
            logprobs=choice.chat_logprobs(tokens) if self._logprobs else None,
            finish_reason=choice.completion.finish_reason,
            baco=choice.whole(),
        )


class TextShape:
    """``/v1/completions``."""

    def __init__(self, model: str, logprobs: bool) -> None:
        self._head, self._logprobs = Head.new("cmpl", model), logprobs

    def opening(self, _: int) -> None:
        return None

    def chunk(self, index: int, choice: Choice, chunk: Chunk, told: Provenance) -> Reply:
        told_choice = TextChoice(
            index=index,
            text=chunk.text,
            logprobs=choice.text_logprobs(chunk.tokens) if self._logprobs else None,
            finish_reason=chunk.finish_reason,
            baco=told,
        )
        return self._reply([told_choice], None)

    def counted(self, usage: Usage) -> Reply:
        return self._reply([], usage)

    def reply(self, choices: list[Choice], usage: Usage) -> Reply:
        return self._reply(
            [self._whole(index, choice) for index, choice in enumerate(choices)], usage
        )

    def _reply(self, choices: list[TextChoice], usage: Usage | None) -> Reply:
        head = self._head
        return TextReply(
            id=head.id, created=head.created, model=head.model, choices=choices, usage=usage
        )

    def _whole(self, index: int, choice: Choice) -> TextChoice:
        assert choice.completion is not None
        tokens = tokens_of(choice.completion)
        return TextChoice(
            index=index,
            text=choice.completion.text,
            logprobs=choice.text_logprobs(tokens) if self._logprobs else None,
            finish_reason=choice.completion.finish_reason,
            baco=choice.whole(),
        )
