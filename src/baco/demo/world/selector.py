"""The selector scores answers for preference training. It is never used for evaluation.

It knows neither grammar nor attributes. It counts how many of an answer's word triples occur in
clean answers to such a question, and checks the surface (sentences, capital, full stop).
"""

import random
import re
from functools import cache

from baco.demo.world import Question
from baco.demo.world.grammar import answer as clean_answer
from baco.demo.world.grammar import draw, families

EXAMPLES = 1200  # clean answers to learn each question's word triples from
_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]|\n")


def preference(question: Question, answer: str) -> float:
    """Score of an answer, in [0, 1]."""
    text = answer.strip()
    words = _WORD.findall(text)
    if len(words) < 4:
        return 0.0
    family = families()[question.family]
    known, sizes = _clean(question.family, question.slots[family.slot])
    triples = _triples(words)
    share = sum(triple in known for triple in triples) / len(triples)
    surface = 1.0
    surface *= 1.0 if text[-1] in ".!?" else 0.5
    surface *= 1.0 if text[0].isupper() else 0.5
    surface *= 1.0 if _size(words) in sizes else 0.5
    surface *= len(set(triples)) / len(triples)
    return float(share**2 * surface)


def _triples(words: list[str]) -> list[tuple[str, ...]]:
    padded = ["<", *words, ">"]
    return list(zip(padded, padded[1:], padded[2:], strict=False))


def _size(words: list[str]) -> tuple[int, int]:
    """Numbers of sentence ends and of line breaks."""
    return sum(word in ".!?" for word in words), words.count("\n")


@cache
def _clean(name: str, value: str) -> tuple[frozenset[tuple[str, ...]], frozenset[tuple[int, int]]]:
    family = families()[name]
    random_ = random.Random(f"{name} {value}")
    triples: set[tuple[str, ...]] = set()
    sizes: set[tuple[int, int]] = set()
    for _ in range(EXAMPLES):
        text = clean_answer(family, draw(family, value, random_), random_)
        words = _WORD.findall(text)
        triples.update(_triples(words))
        sizes.add(_size(words))
    return frozenset(triples), frozenset(sizes)
