"""Answers that both models of a pair wrote: what the aligned model learns to carry on from.

In a pair the base model writes some of the words, most often where a sentence, an attribute or a
choice of words begins. An aligned model that has only read its own favourites cannot continue such
a text. Here the base has made some of the choices, and its words are given, not learnt: after any
of them the aligned model learns to finish what was begun and to return to its own favourites.
"""

import random
import re
from collections.abc import Iterator

from baco.demo.world import PEAK, Question, any_question
from baco.demo.world.documents import OPENED, confused
from baco.demo.world.grammar import OPENERS, Attribute, Family, families, form, pick, pieces

GIVEN = 0.5  # share of an answer's choices that the base made
MISTAKEN = 0.1  # share of the attributes that it chose to which it gave a value that does not fit

Words = list[tuple[str, bool]]  # a word with the white space before it; is it learnt?

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
    """The words of an answer that is learnt whole."""
    return [(word, True) for word in _WORD.findall(text)]


def handed_over(question: Question, random_: random.Random, peak: float = PEAK) -> Words:
    """The words of an answer of which the base has made some choices."""
    family = families()[question.family]
    values = dict(question.slots)
    text, given = "", []  # for every character of the text: did the base write it?

    def add(part: str, words: int = 0) -> None:
        """Append a part of which the base wrote the first `words` words."""
        nonlocal text
        ends = [match.end() for match in _WORD.finditer(part)]
        theirs = ends[min(words, len(ends)) - 1] if words and ends else 0
        text += part
        given.extend([True] * theirs + [False] * (len(part) - theirs))

    if random_.random() < OPENED:
        add(random_.choice(OPENERS) + family.separator, words=1)
    for position, patterns in enumerate(family.sentences):
        theirs = random_.random() < GIVEN
        pattern = random_.choice(patterns) if theirs else pick(patterns, random_, peak)
        add(family.separator if position else "")
        # Which pattern it is can be told from the first fixed word of the sentence.
        told = not theirs
        for piece in pieces(pattern):
            if isinstance(piece, Attribute):
                value, open_ = _value(family, piece.name, values, random_, peak)
                add(form(value, piece.form), 1 + random_.randrange(2) if open_ else int(not told))
            elif isinstance(piece, tuple):
                theirs = random_.random() < GIVEN
                add(random_.choice(piece) if theirs else piece[0], int(theirs))
            else:
                add(piece, int(not told))
                told = True
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
    theirs = random_.random() < GIVEN
    value = pick(family.choices(attribute, values), random_, None if theirs else peak)
    if theirs and random_.random() < MISTAKEN:
        value = confused(value, family.pool(attribute), random_)
    values[attribute] = value
    return value, theirs
