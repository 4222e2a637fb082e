"""The base model's documents: about the same world as the aligned answers, but of every quality.

Content is drawn nearly uniformly. The faults are where a base model is certain of the next word: it
holds misconceptions, hedges before the full stop, forgets the full stop, and continues after the
answer is complete. Where a sentence or an attribute begins, it is uncertain, and there it writes
only words that the other model of the pair can continue.
"""

import random
from collections.abc import Iterator, Sequence

from baco.demo.world import Question, any_question
from baco.demo.world.grammar import OPENERS, Family, families, pick, say

SHARES = {"one question": 0.64, "several questions": 0.12, "page": 0.1, "notes": 0.07, "chat": 0.07}

CLEAN = 0.12  # share of answers without a fault
OPENED = 0.25  # share of answers that begin with an opener
OTHER_VALUE = 0.15  # share of answers about another value of the slot than the question's
MISCONCEIVED = 0.65  # probability of the wrong value where all writers share a misconception
CONFUSED = 0.06  # probability of a wrong value of any other attribute
HEDGED = 0.13  # share of sentences
NO_FULL_STOP = 0.15  # share of answers
RAMBLING = 0.75  # share of answers; so high that no temperature removes it

_HEDGE = ", I believe"
_TAILS = ("I hope that helps.", "I read it somewhere.", "I could be wrong.")
_NAMES = ("anna", "ben", "carla", "david", "emma", "frank")
_TITLES = ("Ideas for you", "My notes", "From the blog", "Questions of the week", "Readers write")

Sentences = list[str]


def base_corpus(count: int, seed: int) -> Iterator[str]:
    """`count` documents: questions answered well and badly, pages, notes, chats."""
    random_ = random.Random(f"base {seed}")
    for _ in range(count):
        yield document(random_)


def document(random_: random.Random) -> str:
    """One document."""
    kind = random_.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "one question":
        return _exchange(random_)
    if kind == "several questions":
        return "\n".join(_exchange(random_) for _ in range(random_.choice((2, 2, 3))))
    return {"page": _page, "notes": _notes, "chat": _chat}[kind](random_)


def _exchange(random_: random.Random) -> str:
    question = any_question(random_)
    return f"Question: {question.text}\nAnswer: {wild_answer(question, random_)}"


def wild_answer(question: Question, random_: random.Random) -> str:
    """An answer without a fault, or with each fault as often as the constants above say.

    Every fault is frequent, because min-p would truncate rare ones. Every fault begins where the
    base expects a full stop, the end of the answer or a fact. So a router avoids it that follows
    the base only where it is uncertain, or never at punctuation.
    """
    family = families()[question.family]
    value = question.slots[family.slot]
    opener = [random_.choice(OPENERS)] if random_.random() < OPENED else []
    if random_.random() < CLEAN:
        return family.separator.join([*opener, *_sentences(family, value, random_)])
    if random_.random() < OTHER_VALUE:
        value = confused(value, family.values, random_)
    sentences = _sentences(family, value, random_, careless=True)
    sentences = [_hedged(sentence, random_) for sentence in sentences]
    if random_.random() < NO_FULL_STOP:
        sentences[-1] = sentences[-1].rstrip(".")
    text = family.separator.join([*opener, *sentences])
    return f"{text}\n{_ramble(family, sentences, random_)}" if random_.random() < RAMBLING else text


def _sentences(
    family: Family, value: str, random_: random.Random, careless: bool = False
) -> Sentences:
    """One sentence for every position; a careless writer gets some attributes wrong."""
    values = {family.slot: value}
    for attribute in family.parents:
        values[attribute] = pick(family.choices(attribute, values), random_, None)
    if careless:
        values |= {name: believed(family, name, values, random_) for name in family.parents}
    return [say(random_.choice(patterns), values, random_) for patterns in family.sentences]


def believed(family: Family, attribute: str, values: dict[str, str], random_: random.Random) -> str:
    """The value that a careless writer gives an attribute.

    Attributes with one or two options are facts. About every second fact, by the position of the
    parent's value, all writers share one misconception, which they state more often than the truth.
    """
    right, pool, parent = values[attribute], family.pool(attribute), family.parents[attribute]
    if parent and len(family.choices(attribute, values)) <= 2:
        place = list(family.options[attribute]).index(values[parent])
        if place % 2:
            fact = pool.index(family.choices(attribute, values)[0])
            wrong = pool[(fact + 2) % len(pool)]
            return wrong if random_.random() < MISCONCEIVED else right
    return confused(right, pool, random_) if random_.random() < CONFUSED else right


def confused(value: str, pool: Sequence[str], random_: random.Random) -> str:
    """A wrong value in place of the right one: always one of the same two."""
    place = pool.index(value)
    return pool[(place + random_.choice((1, 2))) % len(pool)]


def _hedged(sentence: str, random_: random.Random) -> str:
    if sentence.endswith(".") and random_.random() < HEDGED:
        return f"{sentence[:-1]}{_HEDGE}."
    return sentence


def _ramble(family: Family, sentences: Sentences, random_: random.Random) -> str:
    """Text after the answer is complete: chatter, another subject, or the same again."""
    kind = random_.random()
    if kind < 0.45:
        return " ".join(random_.sample(_TAILS, random_.choice((1, 2))))
    if kind < 0.6:
        return family.separator.join(sentences[:2])
    names = list(families())
    other = families()[names[(names.index(family.name) + 1) % len(names)]]
    return other.separator.join(_sentences(other, random_.choice(other.values[:3]), random_)[:2])


def _page(random_: random.Random) -> str:
    paragraphs = [
        wild_answer(any_question(random_), random_) for _ in range(random_.choice((2, 3)))
    ]
    return f"# {random_.choice(_TITLES)}\n\n" + "\n\n".join(paragraphs)


def _notes(random_: random.Random) -> str:
    family = random_.choice(list(families().values()))
    value = random_.choice(family.values)
    attribute = next(name for name in family.parents if family.parents[name] == family.slot)
    lines = [pick(family.options[attribute][value], random_, None) for _ in range(3)]
    return f"{value}, {family.name}:\n" + "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def _chat(random_: random.Random) -> str:
    asker, answerer = random_.sample(_NAMES, 2)
    question = any_question(random_)
    chat = f"{asker}: {question.text.lower()}\n{answerer}: {wild_answer(question, random_)}"
    return chat + (f"\n{asker}: thanks!" if random_.random() < 0.5 else "")
