"""Answers of the demo world as records: the attributes of a family as JSON, and the schema of such
JSON.

The demo pair has learnt prose alone. ``benchmarks.records_pair`` tunes it on records.
"""

import json
import random
from collections.abc import Mapping
from typing import Any

from baco.demo.world import Question
from baco.demo.world.documents import HEDGED, OTHER_VALUE, believed, confused
from baco.demo.world.grammar import Family, draw, families, pick

# Of an aligned example: the share of values that the base chose, and of those that are wrong.
GIVEN, MISTAKEN = 0.4, 0.1

Record = Mapping[str, str]


def record_families() -> list[Family]:
    """The families whose answers are records: several attributes on one line, many right ones."""
    return [
        family
        for family in families().values()
        if family.separator == " " and not family.single and len(family.parents) > 1
    ]


def schema(family: Family) -> dict[str, Any]:
    """The schema of a family's records: the slot is an enum, every attribute a string."""
    text = {"type": "string", "minLength": 2, "maxLength": 60}
    properties: dict[str, Any] = {family.slot: {"enum": list(family.values)}}
    properties |= dict.fromkeys(family.parents, text)
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def written(record: Record) -> str:
    """A record as JSON on one line."""
    return json.dumps(dict(record), ensure_ascii=False)


def wild_record(question: Question, random_: random.Random) -> dict[str, str]:
    """A record of the base model: drawn near uniformly, with its misconceptions and hedges."""
    family = families()[question.family]
    value = question.slots[family.slot]
    if random_.random() < OTHER_VALUE:
        value = confused(value, family.values, random_)
    values = draw(family, value, random_)
    values |= {name: believed(family, name, values, random_) for name in family.parents}
    hedged = {
        name: f"{values[name]}, I believe" for name in family.parents if random_.random() < HEDGED
    }
    return values | hedged


def handed_over_record(
    question: Question, random_: random.Random, peak: float
) -> tuple[dict[str, str], set[str]]:
    """A record of the aligned model, and the attributes of which the base wrote the first word.

    The base's values are drawn near uniformly; the others are favourites with probability `peak`.
    """
    family = families()[question.family]
    values, given = dict(question.slots), set[str]()
    for attribute in family.parents:
        by_base = random_.random() < GIVEN
        choices = family.choices(attribute, values)
        values[attribute] = pick(choices, random_, None if by_base else peak)
        if by_base:
            given.add(attribute)
            is_parent = attribute in family.parents.values()
            if random_.random() < MISTAKEN and not is_parent:
                values[attribute] = confused(values[attribute], family.pool(attribute), random_)
    return values, given


def judge_record(question: Question, record: Record) -> tuple[float, str]:
    """The share of a record's values that fit the question and each other, and its key attributes.

    A value fits if it is an option for the value of its parent.
    """
    family = families()[question.family]
    stripped = {name: value.strip() for name, value in record.items()}
    right = [stripped[family.slot] == question.slots[family.slot]]
    for attribute, parent in family.parents.items():
        options = family.options[attribute].get(stripped[parent] if parent else "any", ())
        right.append(stripped[attribute] in options)
    return sum(right) / len(right), "|".join(stripped[name] for name in family.key)
