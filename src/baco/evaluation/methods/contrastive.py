"""Contrastive decoding (O'Brien and Lewis 2023, arXiv 2309.09117): the combiner ``Contrast``.

The aligned model is the expert and the base model the amateur, so it turns up what alignment
changed: the opposite direction to the ensemble's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, answers_of
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco.api import Baco

STRENGTHS = (0.1, 0.25, 0.5, 1.0)  # 0.5 is the paper's
PLAUSIBLE = 0.1  # the paper's


class Contrastive:
    """The aligned model's logits against the base model's, over the strength β."""

    name = "contrastive"
    family: Family = "ensemble"
    needs_one_tokenizer = True
    help = "the aligned model's logits against the base model's (contrastive decoding)"
    not_served = "name its combiner, as in baco/Contrast:0.5,0.1"

    def settings(self, grid: Grid) -> list[Setting]:
        return [
            Setting(
                "contrastive",
                f"contrastive, β={strength:g}",
                strength,
                {"kind": self.name, "combiner": f"Contrast:{strength},{PLAUSIBLE}"},
            )
            for strength in grid.thin(STRENGTHS)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return answers_of(baco, setting.options["combiner"], setting, prompts, draw)
