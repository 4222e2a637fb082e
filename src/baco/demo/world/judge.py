"""The judge: what an answer is worth, and what it says. For evaluation only.

It parses an answer by the world's grammar. Quality is the product of
- grammar: recognised sentences over the larger of sentences said and sentences wanted;
- consistency: 1, 1/2 or 0 for none, one or more contradictions between attributes (Kyoto in
  France), a name that changes or a sentence said twice;
- topic: 1, or 1/4 where what is said does not fit the question's slot.
An opener before the first sentence does not count. So a right answer scores 1; cut, drifting,
chatty or badly formatted ones lose their share. The key is the values of the family's key
attributes; answers of which they cannot be read share the key "".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from baco.demo.world import Question
from baco.demo.world.grammar import Family, families, recognisers, unspoken, without_opener

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Quality in [0, 1] and the semantic key ("" if unreadable)."""

    quality: float
    key: str


def judge(question: Question, answer: str) -> Verdict:
    """Score one answer; leading and trailing white space does not count."""
    family = families()[question.family]
    sentences = _sentences(family, answer)
    said, matched, doubled = _read(family, sentences)
    wanted = len(family.sentences)
    grammar = matched / max(len(sentences), wanted)
    asked = question.slots[family.slot]
    faults = doubled + _contradictions(family, said)
    on_topic = _fits(family, said, asked)
    quality = grammar * max(0.0, 1.0 - 0.5 * faults) * (1.0 if on_topic else 0.25)
    values = [next(iter(said.get(attribute, ())), None) for attribute in family.key]
    key = "" if None in values else "|".join(str(value) for value in values)
    return Verdict(quality, key)


def breaks_grammar(question: Question, answer: str) -> bool:
    """Is an answer anything but one sentence of the grammar for every position, in order?

    Whether the sentences are true, agree with one another or fit the question does not count.
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


@cache
def _recognisers(name: str) -> list[list[tuple[re.Pattern[str], tuple[str, ...]]]]:
    return recognisers(families()[name])


def _read(family: Family, sentences: list[str]) -> tuple[dict[str, list[str]], int, int]:
    """What was said of every attribute, in order; sentences recognised; sentences repeated."""
    said: dict[str, list[str]] = {}
    matched = 0
    for sentence, ways in zip(sentences, _recognisers(family.name), strict=False):
        for pattern, attributes in ways:
            match = pattern.fullmatch(sentence)
            if match:
                matched += 1
                for attribute, text in zip(attributes, match.groups(), strict=True):
                    said.setdefault(attribute, []).append(unspoken(family.name, attribute)[text])
                break
    return said, matched, len(sentences) - len(set(sentences))


def _contradictions(family: Family, said: Mapping[str, list[str]]) -> int:
    faults = sum(len(set(values)) - 1 for values in said.values())
    for attribute, parent in family.parents.items():
        if attribute in said and parent in said and parent != family.slot:
            faults += said[attribute][0] not in family.options[attribute][said[parent][0]]
    return faults


def _fits(family: Family, said: Mapping[str, list[str]], asked: str) -> bool:
    if any(value != asked for value in said.get(family.slot, ())):
        return False
    return all(
        said[attribute][0] in family.options[attribute][asked]
        for attribute, parent in family.parents.items()
        if parent == family.slot and attribute in said
    )
