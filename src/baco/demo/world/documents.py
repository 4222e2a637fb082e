"""The base's documents: about the same world as the aligned answers, but of every quality.

The faults are those that alignment removes: drift to another subject, wrong facts, answers cut
short, chatter, careless form; a few typing errors. What is said is drawn nearly uniformly.
"""

import random
from collections.abc import Callable

from baco.demo.world import Question, any_question
from baco.demo.world.grammar import Family, draw, families, pick, say

CLEAN = 0.38  # share of answers without a fault
SECOND_FAULT = 0.3
SHARES = {"one question": 0.64, "several questions": 0.12, "page": 0.1, "notes": 0.07, "chat": 0.07}

_OPENERS = (
    "Well, ", "Honestly, ", "Hmm, ", "I think ", "Oh, ", "My friend says that ", "Not sure, but ",
)  # fmt: skip
_TAILS = (
    "I hope that helps.", "My cousin told me so.", "Just my two cents.", "Anyway, have a nice day!",
    "I read it somewhere.", "Thanks for asking.", "Edit: fixed a word.", "More on this next week.",
    "Sorry for the long post.", "What do you think?",
)  # fmt: skip
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
    """An answer with no fault, one or two."""
    family = families()[question.family]
    value = question.slots[family.slot]
    if random_.random() < CLEAN:
        return family.separator.join(_sentences(family, value, random_))
    faults = random_.choices(list(_FAULTS), list(_FAULTS.values()), k=2)
    sentences = _sentences(family, value, random_, wrong=_wrong_facts in faults)
    if random_.random() >= SECOND_FAULT:
        faults = faults[:1]
    for fault in faults:
        sentences = fault(sentences, family, random_)
    return family.separator.join(sentences) or "No idea."


def _sentences(
    family: Family, value: str, random_: random.Random, wrong: bool = False
) -> Sentences:
    values = draw(family, value, random_)
    if wrong:
        for attribute in family.parents:
            if random_.random() < 0.5:
                values[attribute] = random_.choice(family.pool(attribute))
    return [say(random_.choice(patterns), values, random_) for patterns in family.sentences]


def _wrong_facts(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    return sentences  # the values were drawn wrong before they were said


def _drift(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """From some sentence on, about something else."""
    other = random_.choice(list(families().values()))
    strange = _sentences(other, random_.choice(other.values), random_)
    keep = random_.randrange(len(sentences))
    return [*sentences[:keep], *strange[-max(1, len(sentences) - keep) :]]


def _other_value(_said: Sentences, family: Family, random_: random.Random) -> Sentences:
    """The right family, the wrong season."""
    return _sentences(family, random_.choice(family.values), random_)


def _cut(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Stops in the middle of the last sentence, or before it."""
    words = sentences[-1].split(" ")
    if len(sentences) > 1 and random_.random() < 0.4:
        return sentences[:-1]
    return [*sentences[:-1], " ".join(words[: random_.randint(1, max(1, len(words) - 1))])]


def _chatter(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Says more than was asked."""
    opener = random_.choice(_OPENERS) if random_.random() < 0.6 else ""
    first = opener + (sentences[0][0].lower() + sentences[0][1:] if opener else sentences[0])
    tail = [random_.choice(_TAILS)] if not opener or random_.random() < 0.5 else []
    return [first, *sentences[1:], *tail]


def _careless(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Lower case, no full stops, or one run-on sentence."""
    how = random_.randrange(3)
    if how == 0:
        return [sentence.lower().rstrip(".") for sentence in sentences]
    if how == 1:
        return [*sentences[:-1], sentences[-1].rstrip(".")]
    return [" and ".join(s.rstrip(".!?") for s in sentences) + "."]


def _bullets(sentences: Sentences, _family: Family, _random: random.Random) -> Sentences:
    """A list where sentences were wanted."""
    return ["\n".join(f"- {sentence.rstrip('.')}" for sentence in sentences)]


def _shuffled(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Another order, or something said twice."""
    if len(sentences) > 1 and random_.random() < 0.5:
        return sentences[::-1]
    return [*sentences, random_.choice(sentences)]


def _typing_errors(sentences: Sentences, _family: Family, random_: random.Random) -> Sentences:
    """Two neighbouring letters swapped in one word."""
    row = random_.randrange(len(sentences))
    words = sentences[row].split(" ")
    place = random_.randrange(len(words))
    word = words[place]
    if len(word) > 3:
        at = random_.randrange(1, len(word) - 2)
        words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return [*sentences[:row], " ".join(words), *sentences[row + 1 :]]


_FAULTS: dict[Callable[[Sentences, Family, random.Random], Sentences], float] = {
    _wrong_facts: 0.22,
    _drift: 0.22,
    _other_value: 0.12,
    _cut: 0.1,
    _chatter: 0.14,
    _careless: 0.1,
    _bullets: 0.04,
    _shuffled: 0.04,
    _typing_errors: 0.02,
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
