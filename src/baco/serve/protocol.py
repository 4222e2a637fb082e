"""What clients may send: requests of OpenAI's API that a pair can answer, and BACo's own fields.

Values are checked without conversion. What would change the answer and is not supported is refused,
as is any field that no API knows; fields that change no answer are taken and have no effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baco.routing.select import Switch
from baco.sampling import MAX_SEED, MOST_LOGPROBS

MOST_STOPS = 16
MOST_PROMPTS = 1024
TEXT_ONLY = "is not supported: this server answers in plain text; leave it out"

# Fields of OpenAI's API that would change the answer, and why they are refused.
REFUSED = {
    "response_format": "is not supported but for {'type': 'text'}: BACo holds no answer to a "
    "grammar; leave it out and ask for the format in the prompt",
    "tools": "is not supported: BACo calls no tools; leave it out",
    "tool_choice": "is not supported: BACo calls no tools; leave it out",
    "functions": "is not supported: BACo calls no functions; leave it out",
    "function_call": "is not supported: BACo calls no functions; leave it out",
    "audio": TEXT_ONLY,
    "modalities": TEXT_ONLY,
    "prediction": "is not supported: BACo drafts by itself; leave it out",
    "web_search_options": "is not supported: BACo searches nowhere; leave it out",
    "reasoning_effort": "is not supported: the chat template decides; leave it out",
    "verbosity": "is not supported: say so in the prompt; leave it out",
    "suffix": "is not supported: BACo only continues texts",
    "best_of": "is not supported: ask for n answers and choose yourself",
}

_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_Spelling = Annotated[str, Field(max_length=1000)]  # errors repeat it
_NonEmpty = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
_Several = Field(min_length=1, max_length=MOST_PROMPTS)
_Nothing = Annotated[list[Any], Field(max_length=0)]


class Strict(BaseModel):
    """A request or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """How a stream is told."""

    include_usage: bool | None = Field(None, description="A last chunk says what was counted.")
    include_obfuscation: bool | None = Field(None, description="Without effect.")


class PlainText(Strict):
    """The one format there is."""

    type: Literal["text"]


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation; what clients send back of an answer's other fields is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Without effect.")
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: _Nothing | None = None
    annotations: _Nothing | None = None


class Asked(Strict):
    """What both endpoints take. null is as good as nothing: the pair's own value holds."""

    model: _Spelling = Field("baco", description="baco, baco/base, baco/aligned or baco/ROUTER.")
    router: _Spelling | None = Field(
        None, description="Such as P-Punc:0.4; by default P-Punc at the pair's calibrated middle."
    )
    switch: Switch | None = Field(None, description="Where the source may change: word (default).")
    explain: bool | None = Field(None, description="Tell of every token why it has its source.")
    n: _Count | None = Field(None, description="Answers to each prompt, 1 by default.")
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: _Count | None = None
    stop: _NonEmpty | Annotated[list[_NonEmpty], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Without effect.")


class ChatRequest(Asked):
    """A conversation to be answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: PlainText | None = None
    tools: _Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = Field(None, description="Without effect.")
    functions: _Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    verbosity: None = None
    metadata: dict[str, str] | None = Field(None, description="Without effect.")
    store: bool | None = Field(None, description="Without effect: nothing is stored.")
    service_tier: str | None = Field(None, description="Without effect.")
    safety_identifier: str | None = Field(None, description="Without effect.")
    prompt_cache_key: str | None = Field(None, description="Without effect.")


class CompletionRequest(Asked):
    """Texts, or their token ids, to be continued; both halves read them as they are."""

    prompt: (
        _NonEmpty
        | Annotated[list[_NonEmpty], _Several]
        | _TokenIds
        | Annotated[list[_TokenIds], _Several]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="0 goes with echo."
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = Field(
        None,
        description="With logprobs and max_tokens 0: tell how likely one half finds the prompt.",
    )
    echo_from: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="With echo: leave out the prompt's tokens before this one."
    )
    return_token_ids: bool | None = Field(None, description="Also tell the tokens' ids.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Name tokens token_id:7 in logprobs, end tokens included."
    )
    suffix: Literal[""] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


class DiversityRequest(Strict):
    """Answers to one prompt."""

    texts: Annotated[list[str], _Several]
