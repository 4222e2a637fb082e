"""The toy world as a grammar: families of questions, their attributes and sentences.

A *family* is one kind of question ("Recommend a {season} destination."). An answer has one sentence
for every position of the family, each written around *attributes* (place, country, activity, …).
An attribute's options depend on the value of its parent: Kyoto has temples and lies in Japan. The
data are in `families.toml`.
"""

import itertools
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ZIPF = 0.5  # exponent of the near-uniform draw of an option by rank
OPENERS = (  # sentences without content that can begin any answer
    "Good question!", "Let me think.", "Well, let me see.", "Sure, here you go.", "Happy to help!",
    "Here is an idea.", "No problem.", "Of course!",
)  # fmt: skip
_FIELD = re.compile(r"\{(\w+)(?::(\w+))?\}")
_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
_PIECES = re.compile(r"(\{\w+(?::\w+)?\}|\([^()]*\|[^()]*\))")


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of question and everything that an answer can contain."""

    name: str
    slot: str  # the attribute that the question fixes
    key: tuple[str, ...]  # the attributes that tell two answers apart
    parents: Mapping[str, str]  # attribute -> attribute its options depend on ("": none)
    options: Mapping[str, Mapping[str, tuple[str, ...]]]  # attribute -> parent's value -> options
    sentences: tuple[tuple[str, ...], ...]  # by position, its wordings
    prompts: tuple[str, ...]  # wordings of the question, for training
    held: tuple[str, ...]  # wordings kept for dev and test
    separator: str  # between sentences
    single: bool  # whether there is one right answer

    @property
    def values(self) -> tuple[str, ...]:
        """The slot's values."""
        first = next(name for name, parent in self.parents.items() if parent == self.slot)
        return tuple(self.options[first])

    def pool(self, attribute: str) -> tuple[str, ...]:
        """Every value of an attribute, whatever its parent."""
        if attribute == self.slot:
            return self.values
        return tuple(dict.fromkeys(itertools.chain(*self.options[attribute].values())))

    def choices(self, attribute: str, values: Mapping[str, str]) -> tuple[str, ...]:
        """The options of an attribute that fit the values of the others."""
        parent = self.parents[attribute]
        return self.options[attribute][values[parent] if parent else "any"]


@cache
def families() -> Mapping[str, Family]:
    """All families by name."""
    data = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
    return {name: _family(name, entry) for name, entry in data.items()}


def _family(name: str, entry: Mapping[str, object]) -> Family:
    parents = entry["parents"]
    assert isinstance(parents, dict)
    options = {}
    for attribute in parents:
        table = entry[attribute]
        assert isinstance(table, dict)
        options[attribute] = {
            parent: tuple(part.strip().replace("/", "\n") for part in line.split(" | "))
            for parent, line in table.items()
        }
    lists = {field: entry[field] for field in ("key", "prompts", "held", "sentences")}
    for field in lists.values():
        assert isinstance(field, list)
    return Family(
        name=name,
        slot=str(entry["slot"]),
        key=_texts(entry["key"]),
        parents=parents,
        options=options,
        sentences=tuple(map(_texts, entry["sentences"])),  # type: ignore[call-overload]
        prompts=_texts(entry["prompts"]),
        held=_texts(entry["held"]),
        separator=str(entry.get("separator", " ")),
        single=bool(entry.get("single", False)),
    )


def _texts(values: object) -> tuple[str, ...]:
    assert isinstance(values, list)
    return tuple(map(str, values))


def draw(
    family: Family, value: str, random_: random.Random, peak: float | None = None
) -> dict[str, str]:
    """A consistent value for every attribute, the slot being `value`.

    With `peak` the first option of each has that probability; without, options are Zipf-drawn.
    """
    values = {family.slot: value}
    for attribute in family.parents:
        values[attribute] = pick(family.choices(attribute, values), random_, peak)
    return values


def pick(options: Sequence[str], random_: random.Random, peak: float | None) -> str:
    """One option: the first with probability `peak`, or any, near uniformly, without a peak."""
    if len(options) == 1:
        return options[0]
    if peak is None:
        return random_.choices(options, _weights(len(options)))[0]
    return options[0] if random_.random() < peak else random_.choice(options[1:])


@cache
def _weights(count: int) -> tuple[float, ...]:
    return tuple((rank + 1) ** -ZIPF for rank in range(count))


@dataclass(frozen=True, slots=True)
class Attribute:
    """The place of an attribute in a pattern, and the form it takes there."""

    name: str
    form: str | None


def pieces(pattern: str) -> list[str | tuple[str, ...] | Attribute]:
    """A pattern in parts: fixed text, a choice between wordings, or an attribute."""
    parts: list[str | tuple[str, ...] | Attribute] = []
    for part in filter(None, _PIECES.split(pattern)):
        if field := _FIELD.fullmatch(part):
            parts.append(Attribute(field[1], field[2]))
        elif choice := _CHOICE.fullmatch(part):
            parts.append(tuple(choice[1].split("|")))
        else:
            parts.append(part)
    return parts


def say(pattern: str, values: Mapping[str, str], random_: random.Random | None = None) -> str:
    """A pattern with its attributes filled in; without a random source the first wording."""

    def chosen(match: re.Match[str]) -> str:
        words = match[1].split("|")
        return random_.choice(words) if random_ else words[0]

    wording = _CHOICE.sub(chosen, pattern) if "(" in pattern else pattern
    return _FIELD.sub(lambda match: form(values[match[1]], match[2]), wording)


def form(value: str, kind: str | None) -> str:
    """A value with an article (`a`), or its first letter raised (`up`) or lowered (`low`)."""
    if kind == "a":
        return f"{'an' if value[0] in 'aeiouAEIOU' else 'a'} {value}"
    if kind == "up":
        return value[0].upper() + value[1:]
    if kind == "low":
        return value[0].lower() + value[1:]
    return value


def answer(
    family: Family, values: Mapping[str, str], random_: random.Random, peak: float | None = None
) -> str:
    """A clean answer with `values`; `peak` is the probability of the favourite wording."""
    return family.separator.join(
        say(pick(patterns, random_, peak), values, random_ if peak is None else None)
        for patterns in family.sentences
    )


def without_opener(text: str) -> str:
    """An answer without the opener that it begins with, if any."""
    for opener in OPENERS:
        if text.startswith(opener):
            return text[len(opener) :].lstrip()
    return text


@cache
def recognisers(name: str) -> list[list[tuple[re.Pattern[str], tuple[str, ...]]]]:
    """By position, the patterns of its sentences, each with the attributes of its groups."""
    family = families()[name]
    return [[_recogniser(family, pattern) for pattern in row] for row in family.sentences]


def _recogniser(family: Family, pattern: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    attributes: list[str] = []
    parts: list[str] = []
    for piece in pieces(pattern):
        if isinstance(piece, Attribute):
            attributes.append(piece.name)
            forms = {form(value, piece.form) for value in family.pool(piece.name)}
            longest_first = sorted(forms, key=lambda text: (-len(text), text))
            parts.append("(" + "|".join(map(re.escape, longest_first)) + ")")
        elif isinstance(piece, tuple):
            parts.append("(?:" + "|".join(map(re.escape, piece)) + ")")
        else:
            parts.append(re.escape(piece))
    return re.compile("".join(parts)), tuple(attributes)


@cache
def value_of_form(family: str, attribute: str) -> Mapping[str, str]:
    """From any written form of an attribute back to its value."""
    kinds = (None, "a", "up", "low")
    pool = families()[family].pool(attribute)
    return {form(value, kind): value for kind in kinds[::-1] for value in pool}
