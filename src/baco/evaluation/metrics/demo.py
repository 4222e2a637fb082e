"""The demo world's own judge, as a judge of equivalence and as a reward: exact, and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

from baco.demo.world import Question
from baco.demo.world.judge import Verdict, judge
from baco.errors import BacoError
from baco.evaluation.metrics.protocols import Answers, Prompts

if TYPE_CHECKING:
    from baco.evaluation.records import Prompt

DEMO = "demo"


def _made_by() -> dict[str, str]:
    return {"judge": "demo world", "baco": version("baco")}


@dataclass(frozen=True, slots=True)
class DemoJudge:
    """Reads answers by the world's grammar; its prompts carry family and slots as reference."""

    made_by: Mapping[str, str] = field(default_factory=_made_by)

    def partition(self, prompts: Prompts, answers: Answers) -> list[list[int]]:
        """Answers with one semantic key are one class; so are all that cannot be read."""
        classes = []
        for prompt, row in zip(prompts, answers, strict=True):
            numbers: dict[str, int] = {}
            keys = [verdict(prompt, text).key for text in row]
            classes.append([numbers.setdefault(key, len(numbers)) for key in keys])
        return classes

    def rewards(self, prompts: Prompts, answers: Answers) -> list[list[float]]:
        """The judge's quality, 0 to 1."""
        return [
            [verdict(prompt, text).quality for text in row]
            for prompt, row in zip(prompts, answers, strict=True)
        ]

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        """Quality 0 to 1 on the scale of utility: 1 + 9 × quality."""
        return [[1.0 + 9.0 * quality for quality in row] for row in rewards]


def verdict(prompt: "Prompt", text: str) -> Verdict:
    """What the world's judge says of an answer.

    Raises:
        BacoError: the prompt is none of the demo world's.
    """
    told = prompt.reference
    if not {"family", "slots"} <= told.keys():
        raise BacoError(
            f"prompt {prompt.id!r} is no question of the demo world: its judge cannot read the "
            "answers; use the task 'demo', or a model instead of 'demo'"
        )
    said = Question(told["family"], told["slots"], prompt.text)
    return judge(said, text.strip())
