"""The demo's toy world: its questions and the answers that an aligned model learns.

It knows text only: no models, no tensors. Everything is drawn from a seed.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from baco.demo.world.grammar import Family, answer, draw, families, say

PEAK = 0.65  # probability of the favourite of every attribute and wording in aligned answers

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its family and the value that it asks for."""

    family: str
    slots: Mapping[str, str]
    text: str


def questions(split: Split, count: int, seed: int) -> list[Question]:
    """`count` questions, the families in turn.

    Training, dev and test have no paraphrase in common.
    """
    random_ = random.Random(f"{split} {seed}")
    result: list[Question] = []
    order = list(families().values())
    decks: dict[str, list[tuple[str, str]]] = {}
    while len(result) < count:
        if len(result) % len(order) == 0:
            random_.shuffle(order)
        family = order[len(result) % len(order)]
        if not decks.get(family.name):  # every combination once before any comes again
            deck = [(p, v) for p in _paraphrases(family, split) for v in family.values]
            random_.shuffle(deck)
            decks[family.name] = deck
        result.append(ask(family, *decks[family.name].pop()))
    return result


def _paraphrases(family: Family, split: Split) -> tuple[str, ...]:
    half = len(family.held) // 2
    return {"train": family.prompts, "dev": family.held[:half], "test": family.held[half:]}[split]


def ask(family: Family, paraphrase: str, value: str) -> Question:
    """The question that a paraphrase asks about a value of the family's slot."""
    return Question(family.name, {family.slot: value}, say(paraphrase, {family.slot: value}))


def any_question(random_: random.Random) -> Question:
    """A training question of any family; some lack their full stop."""
    family = random_.choice(list(families().values()))
    question = ask(family, random_.choice(family.prompts), random_.choice(family.values))
    if question.text[-1] in ".?" and random_.random() < 0.12:
        return Question(question.family, question.slots, question.text[:-1])
    return question


def aligned_examples(count: int, seed: int) -> Iterator[tuple[Question, str]]:
    """Clean, complete, on-topic answers whose content and wording have one clear favourite."""
    random_ = random.Random(f"aligned {seed}")
    for _ in range(count):
        question = any_question(random_)
        family = families()[question.family]
        values = draw(family, question.slots[family.slot], random_, PEAK)
        yield question, answer(family, values, random_, PEAK)
