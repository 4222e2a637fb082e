"""The demo world's test questions as tasks; their wordings do not occur in training.

The world's judge can read any answer. The families with one right answer are a task of their own,
with a verifier.
"""

from itertools import islice

from baco.evaluation.records import Prompt

# Seed of the questions. They had no part in the choice of the demo pair's recipe.
SEED = 20_261
_MANY = 2_000


def prompts(which: str, limit: int | None) -> tuple[Prompt, ...]:
    """The first `limit` test questions of all families, or of those with a ``single`` right answer.

    Paraphrases of a prompt are the other wordings that do not occur in training.
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

    # Questions can repeat, because every family has a limited number of wordings.
    count = _MANY if which == "single" or limit is None else limit
    unique = {question.text: question for question in questions("test", count, SEED)}
    chosen = [q for q in unique.values() if which == "all" or families()[q.family].single]
    return tuple(prompt(i, question) for i, question in enumerate(islice(chosen, limit)))
