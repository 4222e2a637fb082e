"""The texts that raters read where a study does not bring its own: consent, rubric, training.

All of them become part of the plan, so a study keeps what its raters read.
"""

from dataclasses import dataclass

from baco.study.plan import Choice, Comprehension, Example, Question, Unit

TITLE = "Comparing answers"

CONSENT = (
    "You will read short answers to the same request and say which ones you prefer. The answers "
    "were written by computer programs. There are no right or wrong opinions.",
    "It takes about {minutes} minutes. You can pause at any time: your link brings you back to the "
    "place where you stopped, on this device or another one.",
    "Taking part is voluntary. You can withdraw at any time, without giving a reason. Withdrawing "
    "deletes all your answers at once.",
    "We store your answers, the time that you spend on each item, and a random number in place of "
    "your name. We do not store your name, your address on the internet, or anything else about "
    "you or your device.",
    "The answers of all participants are analysed together. They may be published under their "
    "random numbers, so that other researchers can check the analysis.",
    "Programs can write unpleasant or wrong texts. Please withdraw if you do not want to read "
    "them.",
)

RUBRIC = (
    "You will see a request and two sides, A and B. What is A on one item has nothing to do with "
    "what is A on the next one.",
    "# Sets of answers",
    "On some items, A and B are sets of several answers to the same request. Judge each set as a "
    "whole.",
    "**Diversity** is about ideas and not about words. Two answers are different if somebody who "
    "has read one of them would gain something by reading the other: another idea, place, story or "
    "point of view. The same idea in other words is not different. Longer is not more diverse.",
    "**Creativity** is how original and surprising the answers are, as long as they still answer "
    "the request.",
    "# Single answers",
    "On other items, A and B are one answer each. **Quality** is how well an answer does what was "
    "requested: it is complete, correct and clear, and it reads well. A long answer is not better "
    "for being long.",
    "# Ties",
    "Choose “No difference” if you see none. Do not guess a side.",
    "Some items test attention. They are easy for everybody who reads both sides.",
)

COMPREHENSION = (
    Comprehension(
        "Five answers recommend the same hotel in five different wordings. How diverse is the set?",
        ("Very diverse: every answer is worded differently", "Not diverse: it is one idea"),
        1,
        "Diversity is about ideas. The same idea in other words is not different.",
    ),
    Comprehension(
        "You read both sides and see no difference. What do you choose?",
        ("A", "B", "No difference"),
        2,
        "“No difference” is an answer like the others. Do not guess a side.",
    ),
    Comprehension(
        "One answer is twice as long as the other. Is it better?",
        ("Yes", "Only if it answers the request better", "No"),
        1,
        "Length alone does not count. What counts is how well the request is answered.",
    ),
)

_SIDES = ("A", "No difference", "B")
_CREATIVITY = {
    "set": "Which set is more creative: more original and surprising?",
    "answer": "Which answer is more creative: more original and surprising?",
}


def questions(creativity: Unit) -> tuple[Question, ...]:
    """The questions of a study, in the order in which they are asked.

    Args:
        creativity: the unit on which creativity is judged.
    """
    creative = Question(
        "creativity",
        creativity,
        "preference",
        "creativity",
        _CREATIVITY[creativity],
        _SIDES,
    )
    return (
        Question(
            "diversity_rating",
            "set",
            "rating",
            "diversity",
            "How many different ideas does each set have?",
            (
                "One idea: all answers say the same",
                "Nearly all answers say the same",
                "About half of the answers are different ideas",
                "Most answers are different ideas",
                "Every answer is a different idea",
            ),
        ),
        Question(
            "diversity",
            "set",
            "preference",
            "diversity",
            "Which set has more different ideas?",
            _SIDES,
        ),
        *((creative,) if creativity == "set" else ()),
        Question(
            "overall",
            "set",
            "preference",
            "overall",
            "You wanted several suggestions. Which set would you rather have?",
            _SIDES,
        ),
        Question(
            "quality_rating",
            "answer",
            "rating",
            "quality",
            "How good is each answer to this request?",
            (
                "Unusable: it does not answer, or cannot be understood",
                "Poor: it answers with serious faults",
                "Acceptable: it answers with clear weaknesses",
                "Good: it has small weaknesses",
                "Excellent: there is nothing to improve",
            ),
        ),
        Question(
            "quality",
            "answer",
            "preference",
            "quality",
            "Which answer is better?",
            _SIDES,
        ),
        *((creative,) if creativity == "answer" else ()),
    )


EXAMPLES = (
    Example(
        "set",
        "Suggest a present for a friend who likes gardening.",
        (
            "A pair of leather gloves that last for years.",
            "A subscription to a seed box, with new varieties every month.",
            "An afternoon together in the botanical garden.",
            "A small greenhouse for the windowsill.",
        ),
        (
            "A sturdy pair of gardening gloves.",
            "Good gloves for working in the garden.",
            "Gloves, ideally made of leather, so that thorns cannot hurt.",
            "A set of two pairs of garden gloves.",
        ),
        "A has four different ideas. B has one idea, gloves, in four wordings. A is more diverse: "
        "5 for A, 1 for B.",
    ),
    Example(
        "answer",
        "Explain in one or two sentences why the sky is blue.",
        (
            "Air scatters the blue part of sunlight more than the red part, so blue light reaches "
            "our eyes from all directions.",
        ),
        (
            "The sky is blue because of the sky, and the sea is blue too, and many people like "
            "blue, which is a colour of the sky.",
        ),
        "A explains it correctly and clearly. B is readable but explains nothing. A is better: for "
        "example 5 for A, 2 for B.",
    ),
)


# For attention checks where the answers of a run do not serve.
SPARE_PROMPT = "Suggest something to do on a free evening."
SPARE_SET = (
    "Cook a dish from a country that you have never visited, with music from there.",
    "Call a friend you have not talked to for a year.",
    "Go to the swimming pool just before it closes, when it is empty.",
    "Write a letter to yourself and open it in ten years.",
    "Repair the lamp that has not worked since spring.",
    "Lie on the grass and learn the names of five stars.",
)


@dataclass(frozen=True, slots=True)
class Exercise:
    """A training item.

    Attributes:
        unit: ``set`` or ``answer``.
        prompt: its text.
        first, second: the answers; of a set the first ones are shown, as many as the study's sets
            have.
        expected: the right choice by dimension; ratings follow it, except that a tie of the
            preference leaves them free.
        feedback: shown after the answer.
    """

    unit: Unit
    prompt: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    expected: Choice
    feedback: str


EXERCISES = (
    Exercise(
        "set",
        "Name a way to spend a rainy Sunday.",
        (
            "Bake bread and eat the first slice while it is warm.",
            "Visit the museum that you always walk past.",
            "Build a fort of blankets with the children.",
            "Sort old photographs and send the best ones to friends.",
            "Learn three chords on a borrowed guitar.",
            "Walk in the rain on purpose, and take a hot bath afterwards.",
        ),
        (
            "Watch a film on the sofa.",
            "Stay in and watch a good film.",
            "Make popcorn and watch a film.",
            "Watch an old film with a blanket.",
            "Choose a film and watch it together.",
            "Watch two films in a row.",
        ),
        "first",
        "One set has a different idea in each answer. The other set has one idea, a film.",
    ),
    Exercise(
        "set",
        "Where should I go for a weekend?",
        (
            "Lisbon has trams, hills and custard tarts.",
            "Go to Lisbon: the light there is famous.",
            "I would choose the capital of Portugal, for its views and its music.",
            "A weekend in Lisbon is never boring.",
            "How about the city on the Tagus, Lisbon?",
            "Take an early flight to Lisbon and eat fish by the river.",
        ),
        (
            "Go to Lisbon.",
            "Go to the mountains.",
            "Go to Vienna.",
            "Go to the nearest lake.",
            "Go to Bruges.",
            "Go to the North Sea.",
        ),
        "second",
        "The long set has many words and one destination. The short set has a new destination in "
        "each answer. Diversity is about ideas and not about words.",
    ),
    Exercise(
        "answer",
        "Explain in one sentence what a library is.",
        ("A library is a place that lends books and other media to everybody.",),
        ("A library is of the, which people are book in and because there were then.",),
        "first",
        "One answer explains it clearly. The other one cannot be understood.",
    ),
    Exercise(
        "answer",
        "Suggest a name for a cat.",
        ("Call her Pepper.",),
        ("Name her Ginger.",),
        "tie",
        "Both answers do what was requested, and neither is better: no difference.",
    ),
)
