"""Formats answers as the two endpoints of OpenAI's API do: chat completions and completions."""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from baco.engine.sequence import FinishReason
from baco.outputs import Chunk
from baco.serve.choices import Choice
from baco.serve.response_models import (
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


class Formatter(Protocol):
    """Formats the answers to one request; indices are those of its choices."""

    def opening(self, index: int, /) -> Reply | None:
        """The chunk that opens a choice of a stream; None if there is none."""

    def chunk(self, index: int, choice: Choice, chunk: Chunk, provenance: Provenance) -> Reply:
        """A chunk of a choice."""

    def counted(self, usage: Usage) -> Reply:
        """The last chunk of a stream, with the usage."""

    def whole(self, index: int, choice: Choice) -> BaseModel:
        """A choice whose answer has ended."""

    def reply(self, usage: Usage) -> Reply:
        """The reply, still without its choices."""


def _head(prefix: str, model: str) -> dict[str, Any]:
    """The fields that all replies to a request share."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


class ChatFormatter:
    """``/v1/chat/completions``."""

    def __init__(self, model: str, logprobs: bool) -> None:
        self._head, self._logprobs = _head("chatcmpl", model), logprobs

    def opening(self, index: int) -> Reply:
        delta = Delta(role="assistant", content="")
        return self._chunk(
            [ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)]
        )

    def chunk(self, index: int, choice: Choice, chunk: Chunk, provenance: Provenance) -> Reply:
        thinking = chunk.thinking or None
        part = ChatChunkChoice(
            index=index,
            delta=Delta(content=chunk.text or None, reasoning_content=thinking, reasoning=thinking),
            logprobs=choice.chat_logprobs(chunk.tokens) if self._logprobs else None,
            finish_reason=chunk.finish_reason,
            baco=provenance,
        )
        return self._chunk([part])

    def counted(self, usage: Usage) -> Reply:
        return self._chunk([], usage)

    def answer(
        self, index: int, text: str, finish_reason: FinishReason, provenance: Provenance
    ) -> ChatChoice:
        """A choice of a method's answer."""
        return ChatChoice(
            index=index,
            message=AnswerMessage(content=text),
            logprobs=None,
            finish_reason=finish_reason,
            baco=provenance,
        )

    def answer_chunk(self, choice: ChatChoice) -> Reply:
        """The same as the one chunk of a stream."""
        part = ChatChunkChoice(
            index=choice.index,
            delta=Delta(content=choice.message.content or None),
            logprobs=None,
            finish_reason=choice.finish_reason,
            baco=choice.baco,
        )
        return self._chunk([part])

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> Reply:
        return ChatChunk(**self._head, choices=choices, usage=usage)

    def reply(self, usage: Usage) -> Reply:
        return ChatReply(**self._head, choices=[], usage=usage)

    def whole(self, index: int, choice: Choice) -> ChatChoice:
        assert choice.completion is not None
        thinking = choice.completion.thinking or None
        return ChatChoice(
            index=index,
            message=AnswerMessage(
                content=choice.completion.text, reasoning_content=thinking, reasoning=thinking
            ),
            logprobs=choice.chat_logprobs(choice.tokens) if self._logprobs else None,
            finish_reason=choice.completion.finish_reason,
            baco=choice.whole(),
        )


class TextFormatter:
    """``/v1/completions``.

    Args:
        model: as the request names it.
        logprobs: report log-probabilities.
        prompts: of every answer, with log-probabilities, to put before it (``echo``); or none.
    """

    def __init__(self, model: str, logprobs: bool, prompts: Sequence[TextChoice] = ()) -> None:
        self._head, self._logprobs = _head("cmpl", model), logprobs
        self._prompts = prompts

    def opening(self, _: int) -> None:
        return None

    def chunk(self, index: int, choice: Choice, chunk: Chunk, provenance: Provenance) -> Reply:
        first = len(choice.tokens) == len(chunk.tokens)
        part = TextChoice(
            index=index,
            text=chunk.text,
            logprobs=choice.text_logprobs(chunk.tokens) if self._logprobs else None,
            finish_reason=chunk.finish_reason,
            prompt_token_ids=self._prompt(choice) if first else None,
            token_ids=self._ids(choice, (token.id for token in chunk.tokens)),
            baco=provenance,
        )
        return self._reply([part], None)

    def counted(self, usage: Usage) -> Reply:
        return self._reply([], usage)

    def reply(self, usage: Usage) -> Reply:
        return self._reply([], usage)

    def _reply(self, choices: list[TextChoice], usage: Usage | None) -> Reply:
        return TextReply(**self._head, choices=choices, usage=usage)

    def whole(self, index: int, choice: Choice) -> TextChoice:
        assert choice.completion is not None
        answer = TextChoice(
            index=index,
            text=choice.completion.text,
            logprobs=choice.text_logprobs(choice.tokens) if self._logprobs else None,
            finish_reason=choice.completion.finish_reason,
            prompt_token_ids=self._prompt(choice),
            token_ids=self._ids(choice, choice.completion.token_ids),
            baco=choice.whole(),
        )
        if self._prompts:
            answer.follow(self._prompts[index])
        return answer

    def _prompt(self, choice: Choice) -> list[int] | None:
        return list(choice.prompt.aligned_ids) if choice.ids and choice.prompt else None

    def _ids(self, choice: Choice, ids: Iterable[int]) -> list[int] | None:
        return list(ids) if choice.ids else None
