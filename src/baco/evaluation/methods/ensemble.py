"""Soft mixing: every token is drawn from both models' distributions at once ("ensemble").

With w the base's weight, either their probabilities are mixed, w·P_base + (1 − w)·P_aligned, or
their logits, softmax(w·l_base + (1 − w)·l_aligned): the weighted geometric mean. The combiners
``Ensemble`` and ``LogitEnsemble`` draw; truncation and temperature shape the mixed distribution.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, answers_of
from baco.evaluation.records import Prompt, Setting
from baco.routing.combiners import Combination

if TYPE_CHECKING:
    from baco.api import Baco

WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
COMBINERS = {"probabilities": "Ensemble", "logits": "LogitEnsemble"}


class Ensemble:
    """Mixed distributions over a grid of the base's weight w."""

    name = "ensemble"
    family: Family = "ensemble"
    needs_one_tokenizer = True
    not_served = "name its combiner, as in baco/Ensemble:0.3 or baco/LogitEnsemble:0.3"
    help = "both models' distributions mixed at every token: of probabilities, and of logits"

    def settings(self, grid: Grid) -> list[Setting]:
        return [
            Setting(
                f"ensemble, {mixed}",
                f"ensemble of {mixed}, w={weight:g}",
                weight,
                {"kind": self.name, "mixed": mixed, "weight": weight},
            )
            for mixed in COMBINERS
            for weight in grid.thin(WEIGHTS)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        options = setting.options
        combiner = options.get("combiner") or f"{COMBINERS[options['mixed']]}:{options['weight']}"
        return answers_of(baco, combiner, setting, prompts, draw)


def combined(combination: Combination) -> Setting:
    """The setting of a combiner that a user names like a router."""
    spelling = combination.spelling
    value = next(iter(combination.numbers), None)
    options = {"kind": Ensemble.name, "combiner": spelling}
    return Setting(combination.combiner.name, spelling, value, options)
