"""Verbalized Sampling's other forms (Zhang et al. 2025, arXiv 2510.01171).

A probability threshold asks for answers from the tail of the distribution: their dial of diversity.
VS-CoT lets the model reason before it answers, VS-Multi asks for more answers in the same
conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, Threshold
from baco.evaluation.methods.prompting import over_temperatures
from baco.evaluation.methods.verbalized import SYSTEM, verbalize
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco.api import Baco

THRESHOLDS = (0.5, 0.1, 0.05, 0.01, 0.001)
REASONING_TOKENS = 256
_FROM_ALL = "Please sample at random from the full distribution."
TAIL = (
    "Please sample at random from the tails of the distribution, such that the probability of each "
    "response is less than {threshold}."
)
REASON = "First reason step by step about what responses there could be, in a <reasoning> tag. "
MORE = "Randomly generate {count} alternative responses to the original query."


@dataclass(frozen=True, slots=True)
class VerbalizedTail:
    """VS-Standard with a probability threshold."""

    name: str = "verbalized-tail"
    family: Family = "prompting"
    help: str = "Verbalized Sampling from the tail, over probability thresholds"
    threshold: ClassVar[Threshold] = Threshold(0, 1, 0.1)

    def settings(self, grid: Grid) -> list[Setting]:
        return [
            Setting(
                "verbalized sampling, tail",
                f"verbalized sampling p<{threshold:g}",
                threshold,
                {"kind": self.name, "threshold": threshold, "sampling": {"temperature": 1.0}},
            )
            for threshold in grid.thin(THRESHOLDS)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return verbalize(
            baco, self.name, tail_system(setting.options["threshold"]), setting, prompts, draw
        )


@dataclass(frozen=True, slots=True)
class VerbalizedReasoning:
    """VS-CoT."""

    name: str = "verbalized-cot"
    family: Family = "prompting"
    help: str = "Verbalized Sampling after a chain of thought"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "verbalized sampling, CoT", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        system = SYSTEM.replace("For each query, please", REASON + "Then, for each query, please")
        return verbalize(
            baco,
            self.name,
            system,
            setting,
            prompts,
            draw,
            reasoning_tokens=REASONING_TOKENS,
        )


@dataclass(frozen=True, slots=True)
class VerbalizedTurns:
    """VS-Multi: later calls continue the chat, whose oldest turns are dropped where it is long."""

    name: str = "verbalized-multi"
    family: Family = "prompting"
    help: str = "Verbalized Sampling over several turns of one chat"

    def settings(self, grid: Grid) -> list[Setting]:
        return over_temperatures(self.name, "verbalized sampling, multi-turn", grid)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return verbalize(baco, self.name, SYSTEM, setting, prompts, draw, again=MORE)


def tail_system(threshold: float) -> str:
    """The system prompt that asks for answers below a probability."""
    return SYSTEM.replace(_FROM_ALL, TAIL.replace("{threshold}", f"{threshold:g}"))
