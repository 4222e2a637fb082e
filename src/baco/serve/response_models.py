"""What clients get: the objects of OpenAI's API, each choice with its provenance in ``baco``."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field

from baco.engine.sequence import FinishReason
from baco.source import Source

T = TypeVar("T")
# Left out where it is None, as OpenAI leaves it out; elsewhere None is told as null.
Maybe = Annotated[T | None, Field(exclude_if=lambda value: value is None)]


class WhyToken(BaseModel):
    """A token as the router saw it; probabilities in [0, 1], entropy in nats."""

    text: str
    source: Source
    base: float | None = None
    aligned: float | None = None
    max_base: float | None = None
    entropy_base: float | None = None
    predicted: str | None = None
    asked: bool | None = None
    wanted: Source | None = None


class Provenance(BaseModel):
    """Which model said what.

    Attributes:
        sources: text in order, in stretches of one source; of a chunk, its new text.
        base_share: share of the tokens so far whose source is base.
        switches: how often the source changed from one token to the next so far.
        why: of every new token, if asked.
        router, seed: what gives the answer again; on whole answers and the last chunk of one.
        date: the day that a template wrote into the prompt, which gives it again too.
    """

    sources: list[tuple[str, Source]]
    base_share: float
    switches: int
    why: Maybe[list[WhyToken]] = None
    router: Maybe[str] = None
    seed: Maybe[int] = None
    date: Maybe[str] = None


class Usage(BaseModel):
    """Tokens of the prompts, as the aligned model reads them, and of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have been said."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that was said, and the most likely ones of its source there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of new tokens, end tokens left out."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """The same as the older endpoint tells it."""

    tokens: list[str]
    token_logprobs: list[float | None]  # null where nothing stands before a token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(BaseModel):
    """An answer as a turn of the conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Delta(BaseModel):
    """What a chunk adds to a turn."""

    role: Maybe[Literal["assistant"]] = None
    content: Maybe[str] = None


class ChatChoice(BaseModel):
    """One answer to a conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    baco: Provenance


class ChatChunkChoice(BaseModel):
    """What a chunk brings to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    baco: Maybe[Provenance] = None


class TextChoice(BaseModel):
    """One continuation of a text, or what a chunk brings to it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    prompt_token_ids: Maybe[list[int]] = None
    token_ids: Maybe[list[int]] = None
    baco: Provenance


class Reply(BaseModel):
    """What every reply and chunk begins with."""

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
    """A name that requests may give as their model, and its context window where it is bounded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["baco"] = "baco"
    max_model_len: Maybe[int] = None


class ModelList(BaseModel):
    """All such names."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Does the server answer requests?"""

    status: Literal["ok", "closing", "ended"]


class RouterEntry(BaseModel):
    """A router, for a chooser.

    Attributes:
        low, high: range in which its threshold makes a difference; null where nothing bounds it.
        default: γ at the middle of the dial, else of the example.
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
    """How unlike answers are.

    Attributes:
        distinct: how many differ at all.
        distinct_2: different / all pairs of neighbouring words over the answers.
        embedding_distance: mean cosine distance of every two; null where it cannot be measured,
        why_not: for this reason.
    """

    distinct: int
    distinct_2: float
    embedding_distance: float | None
    why_not: str | None
