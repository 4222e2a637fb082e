"""What clients may send: requests of OpenAI's API that a pair can answer, and BACo's own fields.

Values are checked without conversion, but for 1.0, which counts as 1. ``null`` always means: not
given. What would change the answer and is not supported is refused, as is any field that no client
is known to send; fields of other servers that change no answer are accepted (`baco.serve.fields`).
"""

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
from baco.serve.fields import Foreign
from baco.text.utf8 import fault_of

MOST_STOPS = 16
MOST_TEXTS = 1024
MOST_LEVELS = 32
MOST_SPELLING = 300  # of a router or sampler: errors repeat it


def _integer(value: Any) -> Any:
    """1.0 as 1: the numbers of some clients are all floating-point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mapping(value: Any) -> Any:
    """An empty list as an empty object, for languages that do not tell these apart."""
    if not isinstance(value, list):
        return value
    if value:
        raise refused(f"is {shown(value)}: give an object, from token ids to numbers", "")
    return {}


def _one_or_several(value: Any) -> str:
    """As which of two types a value is checked, so that an error speaks of that one alone.

    The names are not identifiers, which tells them from the names of fields in an error's place.
    """
    return "several texts" if isinstance(value, list) else "one text"


def _kind_of_prompt(value: Any) -> str:
    """The same for prompts, which may be token ids as well."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "lists of ids"
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return "token ids"
    return _one_or_several(value)


_Whole = Annotated[int, BeforeValidator(_integer)]
_Count = Annotated[_Whole, Field(ge=1)]
_Length = Annotated[_Whole, Field(ge=-1)]  # -1 is as long as there is room
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_Bias = dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]]
_Nothing = Annotated[list[Any], Field(max_length=0)]
_Biases = Annotated[_Bias, BeforeValidator(_mapping, json_schema_input_type=_Bias | _Nothing)]
_Spelling = Annotated[str, Field(max_length=MOST_SPELLING)]
_NonEmpty = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


def _described(schema: dict[str, Any], model: type["Strict"]) -> None:
    """Add to a JSON schema what `Strict` drops before fields are checked."""
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
    foreign: ClassVar[Mapping[str, Foreign]] = {}

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
    """A whole request.

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
    """Refuse texts that are not valid Unicode, names of fields included, and endless nesting."""
    left: list[tuple[tuple[Any, ...], Any]] = [((), body)]
    while left:
        place, value = left.pop()
        if len(place) > MOST_LEVELS:
            raise refused(f"is nested too deeply: at most {MOST_LEVELS} levels", cut(str(place[0])))
        if isinstance(value, str):
            _refuse_half_characters(value, place)
        elif isinstance(value, dict):
            for name, inner in value.items():
                _refuse_half_characters(name, place)
                left.append(((*place, name), inner))
        elif isinstance(value, list):
            texts = (str, list, dict)  # not the numbers: a prompt of token ids may have many
            left += [((*place, at), one) for at, one in enumerate(value) if isinstance(one, texts)]


def _refuse_half_characters(text: str, place: tuple[Any, ...]) -> None:
    fault = fault_of(text)
    if fault is not None:
        where = ".".join(cut(str(part)) for part in place)
        raise refused(fault if where else f"the body {fault}", where)


class StreamOptions(Strict):
    """How a stream is told."""

    foreign = fields.by_name(fields.STREAM)

    include_usage: bool | None = Field(None, description="A last chunk says what was counted.")


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
    ) = Field(None, description="Only an assistant's may be left out: it is empty then.")
    prefix: bool | None = Field(
        None, description="true goes with a last message of the assistant, which is continued."
    )

    @model_validator(mode="after")
    def _refuse_silence(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise refused("is missing", "content")
        return self


class Asked(Body):
    """What both endpoints take; what is left out is as the pair has it."""

    aliases = fields.ALIASES

    model: _Spelling = Field("baco", description="baco, baco/base, baco/aligned or baco/ROUTER.")
    router: _Spelling | None = Field(
        None, description="Such as P-Punc:0.4; by default P-Punc at the pair's calibrated middle."
    )
    switch: Switch | None = Field(None, description="Where the source may change: word (default).")
    explain: bool | None = Field(None, description="Tell of every token why it has its source.")
    n: _Count | None = Field(None, description="Answers to each prompt, 1 by default.")
    seed: Annotated[_Whole, Field(ge=-1, le=MAX_SEED)] | None = Field(
        None, description="-1 is as good as none."
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
    logit_bias: _Biases | None = None
    samplers: Annotated[list[_Spelling], Field(max_length=MAX_CHAIN)] | None = Field(
        None, description="Further samplers in order, such as top_n_sigma:1.0."
    )
    max_tokens: _Length | None = Field(None, description="-1 is as many as there is room for.")
    stop: (
        Annotated[
            Annotated[_NonEmpty, Tag("one text")]
            | Annotated[list[_NonEmpty], Field(max_length=MOST_STOPS), Tag("several texts")],
            Discriminator(_one_or_several),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Asked):
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
        None, description="Is the last message the assistant's? It is continued then, in any case."
    )
    add_generation_prompt: bool | None = Field(None, description="The opposite.")


class CompletionRequest(Asked):
    """Texts, or their token ids, to be continued; both halves read them as they are."""

    foreign = fields.by_name(fields.COMMON, fields.COMPLETION)

    prompt: Annotated[
        Annotated[_NonEmpty, Tag("one text")]
        | Annotated[list[_NonEmpty], Field(min_length=1), Tag("several texts")]
        | Annotated[_TokenIds, Tag("token ids")]
        | Annotated[list[_TokenIds], Tag("lists of ids")],
        Discriminator(_kind_of_prompt),
    ]
    max_tokens: _Length | None = Field(
        None, description="-1 is as many as there is room for; 0 goes with echo."
    )
    logprobs: Annotated[_Whole, Field(ge=0)] | None = None
    echo: bool | None = Field(
        None,
        description="With logprobs and max_tokens 0: tell how likely one half finds the prompt.",
    )
    echo_from: Annotated[_Whole, Field(ge=0)] | None = Field(
        None, description="With echo: leave out the prompt's tokens before this one."
    )
    return_token_ids: bool | None = Field(None, description="Also tell the tokens' ids.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Name tokens token_id:7 in logprobs, end tokens included."
    )
    best_of: _Count | None = Field(None, description="Without effect: only n may stand here.")


class DiversityRequest(Body):
    """Answers to one prompt."""

    texts: Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
