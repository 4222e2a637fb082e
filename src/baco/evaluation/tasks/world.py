"""The demo world's own questions as a task: those kept for measuring, worded as nobody trained on.

Their judge can read any answer; the families of one right answer make a task where being right is
all that counts.
"""

from itertools import islice

from baco.evaluation.records import Prompt

# Of the questions; the recipe of the demo pair was never chosen by them.
SEED = 20_261
_MANY = 2_000


def prompts(which: str, limit: int | None) -> tuple[Prompt, ...]:
    """The first `limit` test questions, of all families or of those that have a ``single`` answer.

    Every prompt knows the other wordings that are kept from training too.
    """
    from baco.demo.world import Question, ask, questions
    from baco.demo.world.grammar import families

    def prompt(index: int, question: Question) -> Prompt:
        family = families()[question.family]
        value = question.slots[family.slot]
        others = [ask(family, wording, value).text for wording in family.held]
        return Prompt(
            id=f"{question.family}-{index}",
            messages=({"role": "user", "content": question.text},),
            category=question.family,
            reference={"family": question.family, "slots": dict(question.slots)},
            paraphrases=tuple(text for text in others if text != question.text),
        )

    # A question may come again: every family has only so many wordings.
    count = _MANY if which == "single" or limit is None else limit
    unique = {question.text: question for question in questions("test", count, SEED)}
    asked = [q for q in unique.values() if which == "all" or families()[q.family].single]
    return tuple(prompt(i, question) for i, question in enumerate(islice(asked, limit)))
