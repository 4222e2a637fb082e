"""Requests: those of OpenAI's API that a pair can answer, with BACo's own fields.

Values are checked without conversion, except that 1.0 counts as 1. ``null`` means: not given. A
field of another server is accepted if ignoring it changes no answer, and refused otherwise
(`baco.serve.fields`). Unknown fields are refused.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from baco.routing.word_boundaries import Switch
from baco.sampling.params import MAX_SEED
from baco.sampling.sampler_chain import MAX_CHAIN
from baco.serve import fields
from baco.serve.errors import cut, refused, shown
from baco.serve.fields import ForeignField
from baco.text.invalid_characters import fault_of

MAX_STOPS = 16
MAX_TEXTS = 1024
MAX_LEVELS = 32
MAX_SPELLING = 300  # of a router or sampler: errors repeat it


def _integer(value: Any) -> Any:
    """Read 1.0 as 1: some clients send only floating-point numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mapping(value: Any) -> Any:
    """Read an empty list as an empty object: some languages do not distinguish them."""
    if not isinstance(value, list):
        return value
    if value:
        raise refused(f"is {shown(value)}: give an object, from token ids to numbers", "")
    return {}


def _listed(value: Any) -> Any:
    """Read a list that is written as JSON in a text: some clients send it so."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise refused(f"is {shown(value)}: give a list of texts", "") from None


def _one_or_several(value: Any) -> str:
    """The type that a value is checked as, so that an error is about that type only.

    The names hold spaces, which distinguishes them from fields in an error's location.
    """
    return "several texts" if isinstance(value, list) else "one text"


def _kind_of_prompt(value: Any) -> str:
    """The same for prompts, which may also be token ids."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "lists of ids"
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return "token ids"
    return _one_or_several(value)


_Whole = Annotated[int, BeforeValidator(_integer)]
_Count = Annotated[_Whole, Field(ge=1)]
_Length = Annotated[_Whole, Field(ge=-1)]  # -1: to the end of the context
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_Bias = dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]]
_EmptyList = Annotated[list[Any], Field(max_length=0)]
_Biases = Annotated[_Bias, BeforeValidator(_mapping, json_schema_input_type=_Bias | _EmptyList)]
_Spelling = Annotated[str, Field(max_length=MAX_SPELLING)]
# Clients whose user has chosen no model send an empty name.
_Model = Annotated[_Spelling, BeforeValidator(lambda name: "baco" if name == "" else name)]
_NonEmpty = Annotated[str, Field(min_length=1)]
_Window = Annotated[_Whole, Field(ge=-1, le=2**31 - 1)]
_Texts = Annotated[list[_NonEmpty], Field(max_length=MAX_STOPS)]
_Breakers = Annotated[_Texts, BeforeValidator(_listed, json_schema_input_type=_Texts | str)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


def _described(schema: dict[str, Any], model: type["Strict"]) -> None:
    """Add the fields that `Strict` drops to a JSON schema."""
    schema["additionalProperties"] = {"type": "null"}
    for name, entry in model.foreign.items():
        values = {} if entry.accepted is None else {"enum": [*entry.accepted, None]}
        schema["properties"][name] = values | {"description": f"Without effect: {entry.reason}."}


class Strict(BaseModel):
    """A request or a part of one.

    Attributes:
        foreign: fields of other servers, by name.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_described
    )
    foreign: ClassVar[Mapping[str, ForeignField]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_meaningless(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, value in given.items():
            entry = cls.foreign.get(name)
            if entry is not None and not entry.accepts(value):
                reason = f"this is not supported; {entry.reason}"
                raise refused(f"is {shown(value)}: {reason}", name)
        return {
            name: value
            for name, value in given.items()
            if value is not None and name not in cls.foreign
        }


class Body(Strict):
    """The body of a request.

    Attributes:
        aliases: other names of fields, as other servers have them.
    """

    aliases: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        _refuse_unreadable(given)
        if not isinstance(given, dict):
            return given
        own = {name: value for name, value in given.items() if name not in cls.aliases}
        for alias, name in cls.aliases.items():
            value, known = given.get(alias), own.get(name)
            if value is None:
                continue
            if known is not None and known != value:
                raise refused(
                    f"is {shown(value)} and {name} is {shown(known)}: give one of them", alias
                )
            own[name] = value
        return own


def _refuse_unreadable(body: Any) -> None:
    """Refuse texts and field names that are not valid Unicode, and deep nesting."""
    left: list[tuple[tuple[Any, ...], Any]] = [((), body)]
    while left:
        place, value = left.pop()
        if len(place) > MAX_LEVELS:
            raise refused(f"is nested too deeply: at most {MAX_LEVELS} levels", cut(str(place[0])))
        if isinstance(value, str):
            _refuse_lone_surrogates(value, place)
        elif isinstance(value, dict):
            for name, inner in value.items():
                _refuse_lone_surrogates(name, place)
                left.append(((*place, name), inner))
        elif isinstance(value, list):
            texts = (str, list, dict)  # not the numbers: a prompt of token ids may have many
            left += [((*place, at), one) for at, one in enumerate(value) if isinstance(one, texts)]


def _refuse_lone_surrogates(text: str, place: tuple[Any, ...]) -> None:
    fault = fault_of(text)
    if fault is not None:
        where = ".".join(cut(str(part)) for part in place)
        raise refused(fault if where else f"the body {fault}", where)


class StreamOptions(Strict):
    """Options of a stream."""

    foreign = fields.by_name(fields.STREAM)

    include_usage: bool | None = Field(None, description="A last chunk holds the usage.")


class TextPart(Strict):
    """A part of a message."""

    foreign = fields.by_name(fields.PART)

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise refused(f"is {shown(kind)}: the models read parts of type 'text' alone", "type")
        return given


class Message(Strict):
    """A turn of a conversation."""

    foreign = fields.by_name(fields.MESSAGE)

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[
            Annotated[str, Tag("one text")] | Annotated[list[TextPart], Tag("several texts")],
            Discriminator(_one_or_several),
        ]
        | None
    ) = Field(None, description="May be left out in an assistant's message, which is then empty.")
    prefix: bool | None = Field(
        None, description="true: this last message, of the assistant, is continued."
    )

    @model_validator(mode="after")
    def _refuse_silence(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise refused("is missing", "content")
        return self


class JsonSchema(Strict):
    """The schema of a response format."""

    name: str | None = Field(None, description="Without effect.")
    description: str | None = Field(None, description="Without effect.")
    given: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Without effect: schemas are always followed.")


class ResponseFormat(Strict):
    """What an answer is, as OpenAI's API says it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refused("goes with the type 'json_schema', and the type with it", "json_schema")
        return self


class StructuredOutputs(Strict):
    """What an answer is, as vLLM says it: one of these."""

    foreign = fields.by_name(fields.STRUCTURED)

    given: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: _NonEmpty | None = None
    choice: Annotated[list[_NonEmpty], Field(min_length=1)] | None = None
    grammar: _NonEmpty | None = None


class GenerationRequest(Body):
    """Fields of both endpoints. A field that is left out has the pair's default."""

    aliases = fields.ALIASES

    model: _Model = Field(
        "baco", description="baco, baco/base, baco/aligned, baco/ROUTER or baco/METHOD."
    )
    router: _Spelling | None = Field(
        None, description="Such as P-Punc:0.4; by default P-Punc at the pair's calibrated middle."
    )
    switch: Switch | None = Field(None, description="Where the source may change: word (default).")
    explain: bool | None = Field(None, description="Return what the router saw at every token.")
    n: _Count | None = Field(None, description="Answers to each prompt, 1 by default.")
    seed: Annotated[_Whole, Field(ge=-1, le=MAX_SEED)] | None = Field(
        None, description="-1: no seed."
    )
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[_Whole, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="0 and -1 keep all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_window: _Window | None = Field(
        None, description="Penalties count only the last tokens; 0 and -1 count all."
    )
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Strength of DRY; 0 is off, and the other dry fields are not read."
    )
    dry_base: Annotated[float, Field(ge=0, le=10)] | None = None
    dry_allowed_length: Annotated[_Whole, Field(ge=0, le=2**31 - 1)] | None = None
    dry_window: _Window | None = Field(
        None, description="DRY reads only the last tokens; 0 and -1 read all."
    )
    dry_breakers: _Breakers | None = Field(
        None, description="No repeated sequence goes beyond a token that contains one of these."
    )
    logit_bias: _Biases | None = None
    samplers: Annotated[list[_Spelling], Field(max_length=MAX_CHAIN)] | None = Field(
        None, description="Further samplers in order, such as top_n_sigma:1.0."
    )
    max_tokens: _Length | None = Field(None, description="-1: to the end of the context.")
    stop: (
        Annotated[
            Annotated[_NonEmpty, Tag("one text")]
            | Annotated[list[_NonEmpty], Field(max_length=MAX_STOPS), Tag("several texts")],
            Discriminator(_one_or_several),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(
        None, description="text, json_object, or json_schema with a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="json, json_object, regex, choice or grammar, as in vLLM."
    )
    cache_salt: _NonEmpty | None = Field(
        None, description="Requests with different salts share no kept prefix."
    )


class ChatRequest(GenerationRequest):
    """A conversation to be answered."""

    foreign = fields.by_name(fields.COMMON, fields.CHAT)

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Length | None = Field(None, description="Another name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[_Whole, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the templates, such as enable_thinking."
    )
    continue_final_message: bool | None = Field(
        None,
        description="true only if the last message is the assistant's, which is always continued.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="The opposite of continue_final_message."
    )


class CompletionRequest(GenerationRequest):
    """Texts or token ids to continue. Both models read them as they are."""

    foreign = fields.by_name(fields.COMMON, fields.COMPLETION)

    prompt: Annotated[
        Annotated[_NonEmpty, Tag("one text")]
        | Annotated[list[_NonEmpty], Field(min_length=1), Tag("several texts")]
        | Annotated[_TokenIds, Tag("token ids")]
        | Annotated[list[_TokenIds], Tag("lists of ids")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: _Length | None = Field(
        None, description="-1: to the end of the context; 0 with echo: no answers."
    )
    logprobs: Annotated[_Whole, Field(ge=0)] | None = None
    echo: bool | None = Field(
        None,
        description="With logprobs: score the prompt with one model, before its answers.",
    )
    echo_from: Annotated[_Whole, Field(ge=0)] | None = Field(
        None, description="With echo: the first token of the prompt to report."
    )
    return_token_ids: bool | None = Field(None, description="Also return token ids.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="In logprobs, name tokens as in token_id:7, end tokens included."
    )
    best_of: _Count | None = Field(None, description="Without effect; must equal n.")


class DiversityRequest(Body):
    """Answers to one prompt."""

    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


class SchemaRequest(Body):
    """A JSON schema to check, named as in ``structured_outputs``."""

    given: dict[str, Any] | str = Field(alias="json")
