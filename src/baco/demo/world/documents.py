"""The base's documents: about the same world as the aligned answers, but of every quality.

The faults are those that alignment removes: drift to another subject, wrong facts, answers cut
short, chatter, careless form; a few typing errors. What is said is drawn nearly uniformly.
"""

import random
from collections.abc import Callable, Sequence

from baco.demo.world import Question, any_question
from baco.demo.world.grammar import Family, families, pick, say

CLEAN = 0.15  # share of answers without a fault
SHARES = {"one question": 0.64, "several questions": 0.12, "page": 0.1, "notes": 0.07, "chat": 0.07}

_OPENERS = ("Well, ", "I think ", "Not sure, but ")
_TAILS = ("I hope that helps.", "I read it somewhere.", "I could be wrong.")
_NAMES = ("anna", "ben", "carla", "david", "emma", "frank")
_TITLES = ("Ideas for you", "My notes", "From the blog", "Questions of the week", "Readers write")

Sentences = list[str]


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
    """An answer without a fault, or with every fault as likely as `_FAULTS` says."""
    family = families()[question.family]
    value = question.slots[family.slot]
    if random_.random() < CLEAN:
        return family.separator.join(_sentences(family, value, random_))
    if random_.random() < OTHER_VALUE:
        value = _confused(value, family.values, random_)
    sentences = _sentences(family, value, random_, CONFUSED)
    for fault, probability in _FAULTS.items():
        if random_.random() < probability:
            sentences = fault(sentences, family, random_)
    return family.separator.join(sentences)


def _sentences(
    family: Family, value: str, random_: random.Random, confused: float = 0.0
) -> Sentences:
    """One sentence a position; every attribute is mistaken with probability `confused`."""
    values = {family.slot: value}
    for attribute in family.parents:
        values[attribute] = pick(family.choices(attribute, values), random_, None)
    if confused:
        for attribute in family.parents:
            if random_.random() < confused:
                values[attribute] = _confused(values[attribute], family.pool(attribute), random_)
    return [say(random_.choice(patterns), values, random_) for patterns in family.sentences]


def _confused(value: str, pool: Sequence[str], random_: random.Random) -> str:
    """What a careless writer takes a value for: always one of the same two others."""
    place = pool.index(value)
    return pool[(place + random_.choice((1, 2))) % len(pool)]


def _drift(sentences: Sentences, family: Family, random_: random.Random) -> Sentences:
    """From some sentence on, about what this writer would rather talk about."""
    names = list(families())
    other = families()[names[(names.index(family.name) + 1) % len(names)]]
    strange = _sentences(other, random_.choice(other.values[:3]), random_)
    keep = random_.randrange(min(2, len(sentences)))
    return [*sentences[:keep], *strange]


def _cut(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Stops before the last sentence, or in the middle of it."""
    if len(sentences) > 1 and random_.random() < 0.7:
        return sentences[:-1]
    words = sentences[-1].split(" ")
    return [*sentences[:-1], " ".join(words[: max(1, 2 * len(words) // 3)])]


def _chatter_before(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    first = random_.choice(_OPENERS) + sentences[0][0].lower() + sentences[0][1:]
    return [first, *sentences[1:]]


def _chatter_after(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    return [*sentences, random_.choice(_TAILS)]


def _lower_case(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    return [sentence.lower() for sentence in sentences]


def _no_full_stop(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    return [*sentences[:-1], sentences[-1].rstrip(".")]


def _run_on(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    return [" and ".join(sentence.rstrip(".!?") for sentence in sentences) + "."]


def _bullets(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    """A list where sentences were wanted."""
    return ["\n".join(f"- {sentence.rstrip('.')}" for sentence in sentences)]


def _repeated(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    """The first sentence over again."""
    return [*sentences, sentences[0]]


def _typing_error(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Two neighbouring letters swapped in one word."""
    row = random_.randrange(len(sentences))
    words = sentences[row].split(" ")
    place = random_.randrange(len(words))
    word = words[place]
    if len(word) > 3:
        at = random_.randrange(1, len(word) - 2)
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return [*sentences[:row], " ".join(words), *sentences[row + 1 :]]


# Few faults of each kind, and often: rare ones would be truncated away when the base is sampled
# with min-p, and what is left would be better than any base model is. Not knowing when to stop is
# the rule, not the exception, as it is with real base models: no temperature mends that.
OTHER_VALUE, CONFUSED = 0.2, 0.12
_FAULTS: dict[Callable[[Sentences, Family, random.Random], Sentences], float] = {
    _drift: 0.28,
    _cut: 0.14,
    _repeated: 0.05,
    _run_on: 0.08,
    _chatter_before: 0.2,
    _chatter_after: 0.6,
    _no_full_stop: 0.2,
    _lower_case: 0.08,
    _bullets: 0.05,
    _typing_error: 0.03,
}


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
    said = f"{asker}: {question.text.lower()}\n{answerer}: {wild_answer(question, random_)}"
    return said + (f"\n{asker}: thanks!" if random_.random() < 0.5 else "")
