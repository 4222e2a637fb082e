"""The demo world's judge as equivalence and as reward: exact, and without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from baco.demo.world import Question
from baco.demo.world.judge import Judgement, judge
from baco.errors import BacoError
from baco.evaluation.metrics.protocols import Answers, Prompts
from baco.evaluation.records import Prompt

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class DemoJudge:
    """Reads answers by the world's grammar; prompts have family and slots as their reference."""

    made_by: Mapping[str, str] = field(
        default_factory=lambda: {"judge": "demo world", "baco": version("baco")}
    )

    def partition(self, prompts: Prompts, answers: Answers) -> list[list[int]]:
        """Answers with one semantic key form a class, and so do all unreadable answers."""
        classes = []
        for prompt, row in zip(prompts, answers, strict=True):
            numbers: dict[str, int] = {}
            keys = [judged(prompt, text).key for text in row]
            classes.append([numbers.setdefault(key, len(numbers)) for key in keys])
        return classes

    def rewards(self, prompts: Prompts, answers: Answers) -> list[list[float]]:
        """The judge's quality, 0 to 1."""
        return [
            [judged(prompt, text).quality for text in row]
            for prompt, row in zip(prompts, answers, strict=True)
        ]

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        """Quality 0 to 1 on the scale of utility: 1 + 9 × quality."""
        return [[1.0 + 9.0 * quality for quality in row] for row in rewards]


def judged(prompt: Prompt, text: str) -> Judgement:
    """The judgement of an answer.

    Raises:
        BacoError: the prompt is not a question of the demo world.
    """
    reference = prompt.reference
    if not {"family", "slots"} <= reference.keys():
        raise BacoError(
            f"prompt {prompt.id!r} is not a question of the demo world: its judge cannot read the "
            "answers; use the task 'demo', or a model instead of 'demo'"
        )
    question = Question(reference["family"], reference["slots"], prompt.text)
    return judge(question, text.strip())
