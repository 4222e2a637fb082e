"""The judge: quality and semantic key of an answer, by the world's grammar. For evaluation only.

Quality is the product of
- grammar: recognised sentences over the larger of the numbers of sentences written and expected;
- consistency: 1, 1/2 or 0 for none, one or more contradictions between attributes (Kyoto in
  France), a name that changes or a repeated sentence;
- topic: 1, or 1/4 where an attribute does not fit the question's slot.
An opener before the first sentence does not count. A right answer has quality 1. The key is the
values of the family's key attributes; answers in which they cannot be read share the key "".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from baco.demo.world import Question
from baco.demo.world.grammar import Family, families, recognisers, value_of_form, without_opener

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True, slots=True)
class Judgement:
    """Quality in [0, 1] and the semantic key ("" if unreadable)."""

    quality: float
    key: str


def judge(question: Question, answer: str) -> Judgement:
    """Score one answer; leading and trailing white space does not count."""
    family = families()[question.family]
    sentences = _sentences(family, answer)
    values, matched, repeated = _read(family, sentences)
    grammar = matched / max(len(sentences), len(family.sentences))
    faults = repeated + _contradictions(family, values)
    on_topic = _fits(family, values, question.slots[family.slot])
    quality = grammar * max(0.0, 1.0 - 0.5 * faults) * (1.0 if on_topic else 0.25)
    key_values = [next(iter(values.get(attribute, ())), None) for attribute in family.key]
    key = "" if None in key_values else "|".join(map(str, key_values))
    return Judgement(quality, key)


def breaks_grammar(question: Question, answer: str) -> bool:
    """Whether an answer is not one sentence of the grammar for every position, in order.

    Whether the sentences are true, are consistent or fit the question does not count.
    """
    family = families()[question.family]
    sentences = _sentences(family, answer)
    _, matched, _ = _read(family, sentences)
    return not matched == len(sentences) == len(family.sentences)


def _sentences(family: Family, answer: str) -> list[str]:
    answer = without_opener(answer.strip())
    if family.separator != "\n":
        return _SENTENCE_END.split(answer)
    lines = answer.split("\n")  # couplets
    return ["\n".join(lines[start : start + 2]) for start in range(0, len(lines), 2)]


def _read(family: Family, sentences: list[str]) -> tuple[dict[str, list[str]], int, int]:
    """Values of every attribute, in order; sentences recognised; sentences repeated."""
    values: dict[str, list[str]] = {}
    matched = 0
    for sentence, ways in zip(sentences, recognisers(family.name), strict=False):
        for pattern, attributes in ways:
            match = pattern.fullmatch(sentence)
            if match:
                matched += 1
                for attribute, text in zip(attributes, match.groups(), strict=True):
                    values.setdefault(attribute, []).append(
                        value_of_form(family.name, attribute)[text]
                    )
                break
    return values, matched, len(sentences) - len(set(sentences))


def _contradictions(family: Family, values: Mapping[str, list[str]]) -> int:
    faults = sum(len(set(of_attribute)) - 1 for of_attribute in values.values())
    for attribute, parent in family.parents.items():
        if attribute in values and parent in values and parent != family.slot:
            faults += values[attribute][0] not in family.options[attribute][values[parent][0]]
    return faults


def _fits(family: Family, values: Mapping[str, list[str]], slot: str) -> bool:
    """Whether all attributes agree with the slot's value in the question."""
    if any(value != slot for value in values.get(family.slot, ())):
        return False
    return all(
        values[attribute][0] in family.options[attribute][slot]
        for attribute, parent in family.parents.items()
        if parent == family.slot and attribute in values
    )
