"""What an answer has to be: JSON of a schema, a match of a regular expression, one of some choices,
or a sentence of a grammar.

This is what a request says. :mod:`baco.sampling.constraint` compiles it for one vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from baco.errors import BacoError
from baco.text.invalid_characters import check_characters

Kind = Literal["schema", "regex", "choice", "grammar"]
# The schema of ``response_format: {"type": "json_object"}``.
ANY_OBJECT = '{"type": "object"}'
# Keywords that say nothing about what is valid.
_ANNOTATIONS = (
    "$schema $id $comment $anchor title description default example examples deprecated readOnly "
    "writeOnly contentEncoding contentMediaType contentSchema discriminator"
)
# Keywords that constrain, all of which the compiler has.
_CONSTRAINTS = (
    "$ref $defs definitions type enum const anyOf oneOf allOf properties required "
    "additionalProperties patternProperties minProperties maxProperties items prefixItems "
    "additionalItems minItems maxItems minLength maxLength pattern format minimum maximum "
    "exclusiveMinimum exclusiveMaximum multipleOf"
)
_KNOWN = frozenset((_ANNOTATIONS + " " + _CONSTRAINTS).split())
# The days of the calendar, from the year 1 on, as Python and pydantic read them. The compiler's own
# ``date`` and ``date-time`` have the year 0, and 29 February in every year.
_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_CALENDAR = f"^({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
# Where a schema has further schemas.
_ONE = ("items", "additionalProperties", "additionalItems")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")

_TOO_DEEP = "the schema is nested too deeply: use $ref"


@dataclass(frozen=True, slots=True)
class Schema:
    """A JSON schema.

    Attributes:
        text: the schema as JSON.
        model: the pydantic model that it was made from; None where it was given as JSON.
    """

    text: str
    model: Any = field(default=None, compare=False, repr=False)

    def parse(self, answer: str) -> Any:
        """The value of a JSON text: an instance of the model if there is one, else plain data.

        Raises:
            ValueError: the text is not JSON, or the model refuses it.
        """
        if self.model is not None:
            return self.model.model_validate_json(answer)
        return json.loads(answer)


@dataclass(frozen=True, slots=True)
class Structure:
    """What an answer has to be.

    Attributes:
        kind: how it is described.
        text: the description; for ``schema`` and ``choice`` as JSON.
    """

    kind: Kind
    text: str


def check_schema(given: Any) -> Schema | None:
    """A schema from what a user gives: a mapping, JSON text or a pydantic model.

    Raises:
        BacoError: it is none of these, or has a keyword that is not supported.
    """
    if given is None or isinstance(given, Schema):
        return given
    model = given if callable(getattr(given, "model_json_schema", None)) else None
    if model is not None:
        given = _closed(model.model_json_schema())
    elif isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise BacoError(f"the schema is not JSON: {error}") from error
        except RecursionError as error:
            raise BacoError(_TOO_DEEP) from error
    if not isinstance(given, Mapping):
        raise BacoError(
            f"the schema is {type(given).__name__}: give a JSON object or a pydantic model"
        )
    try:
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        _check_keywords(json.loads(text))
    except BacoError:
        raise
    except (TypeError, ValueError) as error:
        raise BacoError(f"the schema cannot be written as JSON: {error}") from error
    except RecursionError as error:
        raise BacoError(_TOO_DEEP) from error
    check_characters("schema", text)
    return Schema(text, model)


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a pydantic model without properties that the model would ignore."""
    for _, part in _parts(schema, "#"):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def _check_keywords(schema: Any) -> None:
    """Refuse keywords that would not be enforced."""
    for place, part in _parts(schema, "#"):
        for keyword in part:
            if keyword not in _KNOWN:
                raise BacoError(
                    f"the schema's keyword {keyword!r} (at {place}) is not supported: leave it "
                    "out, or say the same with other keywords (docs/structured.md lists them)"
                )


def with_calendar(schema: str) -> str:
    """A schema whose strings of the formats ``date`` and ``date-time`` name days that exist."""
    if '"date' not in schema:
        return schema
    whole = json.loads(schema)
    for _, part in _parts(whole, "#"):
        if part.get("format") in ("date", "date-time"):
            part["allOf"] = [*part.get("allOf", ()), {"pattern": _CALENDAR}]
    return json.dumps(whole, ensure_ascii=False)


def _parts(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A schema and all schemas inside it, with their places."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for keyword in _ONE:
        yield from _parts(schema.get(keyword), f"{place}/{keyword}")
    for keyword in _LISTS:
        if isinstance(schema.get(keyword), list):
            for index, part in enumerate(schema[keyword]):
                yield from _parts(part, f"{place}/{keyword}/{index}")
    for keyword in _NAMED:
        if isinstance(schema.get(keyword), dict):
            for name, part in schema[keyword].items():
                yield from _parts(part, f"{place}/{keyword}/{name}")


def check_pattern(name: str, given: object) -> None:
    """A regular expression or a grammar: BacoError for anything but text that is not empty."""
    if given is None:
        return
    if not isinstance(given, str) or not given.strip():
        raise BacoError(f"{name} is {given!r}: give text that is not empty")
    check_characters(name, given)


def check_choice(given: object) -> tuple[str, ...]:
    """Choices: BacoError for anything but different texts that are not empty."""
    if given is None:
        return ()
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(s, str) and s for s in texts):
        raise BacoError(f"choice is {given!r}: give a list of non-empty texts")
    for text in texts:
        check_characters("choice", text)
    return tuple(dict.fromkeys(texts))


def structure_of(
    schema: Schema | None, regex: str | None, choice: tuple[str, ...], grammar: str | None
) -> Structure | None:
    """What an answer has to be; None where anything goes.

    Raises:
        BacoError: more than one is given.
    """
    given: list[Structure] = []
    if schema is not None:
        given.append(Structure("schema", schema.text))
    if regex is not None:
        given.append(Structure("regex", regex))
    if choice:
        given.append(Structure("choice", json.dumps(choice, ensure_ascii=False)))
    if grammar is not None:
        given.append(Structure("grammar", grammar))
    if len(given) > 1:
        kinds = " and ".join(structure.kind for structure in given)
        raise BacoError(f"{kinds} are given: an answer has one structure, so give one of them")
    return given[0] if given else None
