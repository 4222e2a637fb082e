"""Responses: the objects of OpenAI's API. Every choice has its provenance in ``baco``."""

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, Field

from baco.engine.sequence import FinishReason
from baco.source import Source

T = TypeVar("T")
# A field that is left out if it is None, as OpenAI does. In other fields None becomes null.
Maybe = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class WhyToken(BaseModel):
    """A token as the router saw it; probabilities in [0, 1], entropy in nats."""

    text: str
    source: Source | None
    base: float | None = None
    aligned: float | None = None
    max_base: float | None = None
    entropy_base: float | None = None
    predicted: str | None = None
    asked: bool | None = None
    wanted: Source | None = None


class Provenance(BaseModel):
    """Which model wrote which part of the text.

    Attributes:
        sources: (text, source) in order; in a chunk, of its new text. The source is null where a
            combiner mixed both models' rows.
        base_share: share of the tokens so far whose source is base; null where any is mixed.
        switches: changes of the source from one token to the next so far; null likewise.
        why: one entry for every new token, if asked for.
        router, seed: repeat the answer; on whole answers and on the last chunk of one.
        date: the day that a template wrote into the prompt; needed to repeat the answer.
        outcome: a method's own word for a reply that it could not use as it should, such as
            ``unparsed``.
    """

    sources: list[tuple[str, Source | None]]
    base_share: float | None
    switches: int | None
    why: Maybe[list[WhyToken]] = None
    router: Maybe[str] = None
    seed: Maybe[int] = None
    date: Maybe[str] = None
    outcome: Maybe[str] = None


class PromptTokensDetails(BaseModel):
    """How many tokens of the prompts were kept from earlier requests and not read again."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """How many tokens of the answers are thinking."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Numbers of tokens: of the prompts, as the aligned model reads them, and of all answers, their
    thinking included.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: Maybe[CompletionTokensDetails] = None

    @classmethod
    def of(cls, prompts: int, answers: int, cached: int = 0, thinking: int = 0) -> Self:
        """The usage of these numbers of tokens; ``answers`` includes the thinking."""
        details = CompletionTokensDetails(reasoning_tokens=thinking) if thinking else None
        return cls(
            prompt_tokens=prompts,
            completion_tokens=answers,
            total_tokens=prompts + answers,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=details,
        )


class TopLogprob(BaseModel):
    """A token that could have been drawn."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that was drawn, and the most likely ones under its source there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of new tokens, end tokens left out."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Log-probabilities as ``/v1/completions`` reports them."""

    tokens: list[str]
    token_logprobs: list[float | None]  # null for a text's first token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(BaseModel):
    """An answer as a turn of the conversation.

    Attributes:
        reasoning_content, reasoning: the thinking before it, if there is any. Clients of DeepSeek,
            SGLang and llama.cpp read the first name, those of vLLM and OpenRouter the second.
    """

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: Maybe[str] = None
    reasoning: Maybe[str] = None
    refusal: None = None


class Delta(BaseModel):
    """What a chunk adds to a turn; attributes as for `AnswerMessage`."""

    role: Maybe[Literal["assistant"]] = None
    content: Maybe[str] = None
    reasoning_content: Maybe[str] = None
    reasoning: Maybe[str] = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    baco: Provenance


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    baco: Maybe[Provenance] = None


class TextChoice(BaseModel):
    """One continuation of a text, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: Maybe[list[int]] = None
    token_ids: Maybe[list[int]] = None
    baco: Provenance

    def follow(self, prompt: "TextChoice") -> None:
        """Put a prompt with its log-probabilities before the text and its own (``echo``)."""
        before, after = prompt.logprobs, self.logprobs
        assert before is not None
        assert after is not None
        self.logprobs = TextLogprobs(
            tokens=before.tokens + after.tokens,
            token_logprobs=before.token_logprobs + after.token_logprobs,
            top_logprobs=before.top_logprobs + after.top_logprobs,
            text_offset=[
                *before.text_offset,
                *(len(prompt.text) + offset for offset in after.text_offset),
            ],
        )
        self.text = prompt.text + self.text


class Reply(BaseModel):
    """The fields that all replies and chunks have."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None = None


class ChatReply(Reply):
    """Answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Reply):
    """A piece of the answers to a conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Maybe[Usage] = None


class TextReply(Reply):
    """Continuations of a text; as a chunk, pieces of them."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Maybe[Usage] = None


class ModelCard(BaseModel):
    """A model name for requests, and its context window if it has one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["baco"] = "baco"
    max_model_len: Maybe[int] = None


class ModelList(BaseModel):
    """The model names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server answers requests."""

    status: Literal["ok", "closing", "ended"]


class RouterEntry(BaseModel):
    """A router as the page lists it.

    Attributes:
        low, high: the range of γ that calibration tries; null if there is none.
        default: γ at the middle of the dial; without a dial, that of the example.
        dial: the calibration as [diversity in 0 … 1, γ], diversity rising; null without one.
        page: a sentence about a logit rule, with {gamma} or {percent} in it.
        compares: the quantity that a logit rule compares with γ, and its side when base speaks.
        keeps: what a content rule keeps for aligned: of one word, and of all.
    """

    name: str
    example: str
    sentence: str
    takes_threshold: bool
    low: float | None
    high: float | None
    default: float | None
    dial: list[tuple[float, float]] | None
    page: str | None = None
    compares: tuple[str, Literal["below", "above"]] | None = None
    keeps: tuple[str, str] | None = None


class Limits(BaseModel):
    """The most that a request may ask for."""

    n: int
    max_tokens: int


class Info(BaseModel):
    """What is served."""

    pair: str
    version: str
    default_router: str
    examples: list[str]
    limits: Limits


class Diversity(BaseModel):
    """How different answers are.

    Attributes:
        distinct: the number of distinct answers.
        distinct_2: distinct pairs of neighbouring words / all such pairs.
        embedding_distance: mean cosine distance of two answers; null if it cannot be measured.
        why_not: the reason for that.
    """

    distinct: int
    distinct_2: float
    embedding_distance: float | None
    why_not: str | None
