"""Counts the answers of a pair that break the toy world's grammar, on every held-out question.

    python -m benchmarks.broken_grammar [PAIR] [--router ROUTER] [--answers N] [--seed SEED]

prints the count by kind of question, and some of the broken answers with the source of every token.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

from baco.api import Baco
from baco.demo.world import Question, ask
from baco.demo.world.grammar import families
from baco.demo.world.judge import breaks_grammar
from baco.outputs import Completion
from benchmarks import launch


def held_out_questions() -> list[Question]:
    """Every paraphrase kept from training, asked about every value of its family's slot."""
    return [
        ask(family, paraphrase, value)
        for family in families().values()
        for paraphrase in family.held
        for value in family.values
    ]


def broken_answers(
    baco: Baco,
    questions: Sequence[Question],
    *,
    router: str | None = None,
    answers: int = 1,
    seed: int = 0,
) -> list[tuple[Question, Completion]]:
    """The answers, of `answers` to each question at default settings, that break the grammar."""
    rows = baco.generate_batch(
        [question.text for question in questions], router=router, n=answers, seed=seed
    )
    return [
        (question, completion)
        for question, row in zip(questions, rows, strict=True)
        for completion in row
        if breaks_grammar(question, completion.text)
    ]


def main() -> None:
    """Print the count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", nargs="?", default="demo")
    parser.add_argument("--router", help="the pair's own by default")
    parser.add_argument("--answers", type=int, default=4, help="to each question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="broken answers to print")
    arguments = parser.parse_args()
    baco = Baco.load(arguments.pair)
    questions = held_out_questions()
    broken = broken_answers(
        baco, questions, router=arguments.router, answers=arguments.answers, seed=arguments.seed
    )
    total = len(questions) * arguments.answers
    lines = [f"{len(broken)} of {total} answers ({len(broken) / total:.2%}) break the grammar"]
    counts = Counter(question.family for question, _ in broken)
    lines += [f"  {family}: {count}" for family, count in counts.most_common()]
    for question, completion in broken[: arguments.show]:
        sources = "".join("b" if source == "base" else "a" for source in completion.sources)
        lines.append(f"{question.text}\n  {completion.text!r}\n  {sources}")
    print("\n".join(lines))


if __name__ == "__main__":
    launch(main)
