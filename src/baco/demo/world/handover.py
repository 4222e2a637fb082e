"""Answers written by both models of a pair, from which the aligned model learns to continue.

In a pair the base model writes some of the words, most often where a sentence, an attribute or a
choice of words begins. An aligned model that was trained on its own favourites alone cannot
continue such a text. In these answers the base has made some of the choices. Its words are context
and are not learnt; the aligned model learns to finish what they begin and to return to its own
favourites.
"""

import random
import re
from collections.abc import Iterator

from baco.demo.world import PEAK, Question, any_question
from baco.demo.world.documents import OPENED, confused
from baco.demo.world.grammar import OPENERS, Attribute, Family, families, form, pick, pieces

GIVEN = 0.5  # share of an answer's choices that the base made
MISTAKEN = 0.1  # share of the attributes chosen by the base whose value does not fit

Words = list[tuple[str, bool]]  # a word with the white space before it; whether it is learnt

_WORD = re.compile(r"\s*(?:[\w']+|[^\w\s])")


def handed_over_examples(
    count: int, seed: int, peak: float = PEAK
) -> Iterator[tuple[Question, Words]]:
    """Training questions, each with an answer of which the base has made some choices.

    In the others the favourite has probability `peak`.
    """
    random_ = random.Random(f"handed over {seed}")
    for _ in range(count):
        question = any_question(random_)
        yield question, handed_over(question, random_, peak)


def learnt(text: str) -> Words:
    """The words of an answer of which all words are learnt."""
    return [(word, True) for word in _WORD.findall(text)]


def handed_over(question: Question, random_: random.Random, peak: float = PEAK) -> Words:
    """The words of an answer of which the base has made some choices."""
    family = families()[question.family]
    values = dict(question.slots)
    text, given = "", []  # `given`: for every character, whether the base wrote it

    def add(part: str, words: int = 0) -> None:
        """Append a part of which the base wrote the first `words` words."""
        nonlocal text
        ends = [match.end() for match in _WORD.finditer(part)]
        by_base = ends[min(words, len(ends)) - 1] if words and ends else 0
        text += part
        given.extend([True] * by_base + [False] * (len(part) - by_base))

    if random_.random() < OPENED:
        add(random_.choice(OPENERS) + family.separator, words=1)
    for position, patterns in enumerate(family.sentences):
        by_base = random_.random() < GIVEN
        pattern = random_.choice(patterns) if by_base else pick(patterns, random_, peak)
        add(family.separator if position else "")
        # The first fixed word of a sentence settles its pattern.
        settled = not by_base
        for piece in pieces(pattern):
            if isinstance(piece, Attribute):
                value, chosen = _value(family, piece.name, values, random_, peak)
                words = 1 + random_.randrange(2) if chosen else int(not settled)
                add(form(value, piece.form), words)
            elif isinstance(piece, tuple):
                by_base = random_.random() < GIVEN
                add(random_.choice(piece) if by_base else piece[0], int(by_base))
            else:
                add(piece, int(not settled))
                settled = True
    return [
        (match[0], not given[match.end() - len(match[0].lstrip())])
        for match in _WORD.finditer(text)
    ]


def _value(
    family: Family, attribute: str, values: dict[str, str], random_: random.Random, peak: float
) -> tuple[str, bool]:
    """An attribute's value, and whether the base has just chosen it."""
    if attribute in values:
        return values[attribute], False
    parent = family.parents[attribute]
    if parent and parent not in values:
        _value(family, parent, values, random_, peak)
    by_base = random_.random() < GIVEN
    value = pick(family.choices(attribute, values), random_, None if by_base else peak)
    if by_base and random_.random() < MISTAKEN:
        value = confused(value, family.pool(attribute), random_)
    values[attribute] = value
    return value, by_base
