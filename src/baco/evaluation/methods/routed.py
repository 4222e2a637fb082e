"""Every router, over a grid of thresholds; Nudging is one of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from baco.evaluation.methods.ensemble import combined
from baco.evaluation.methods.method import Answer, Draw, Family, Grid, answers_of
from baco.evaluation.records import Prompt, Setting
from baco.routing.combiners import Combination
from baco.routing.parser import (
    CONSTANTS,
    lacks_threshold,
    logit_rule_of,
    needs_threshold,
    plain_catalogue,
    router_name,
)
from baco.routing.parser import router as parse
from baco.routing.router import Router, file_digests
from baco.routing.rules import PROBABILITY_SWEEP

if TYPE_CHECKING:
    from baco.api import Baco


class Routed:
    """BACo itself: the router picks the source, at the pair's own sampling."""

    name = "routers"
    family: Family = "BACo"
    help = "every router over a grid of thresholds, Nudging included"
    not_served = "name one router, as in baco/P-Punc:0.4"

    def settings(self, grid: Grid) -> list[Setting]:
        # Single models are methods of their own.
        examples = [line.example for line in plain_catalogue() if line.name not in CONSTANTS]
        spellings = [e if not needs_threshold(e) else router_name(e) for e in examples]
        return [setting for spelling in spellings for setting in self.of(spelling, grid)]

    def of(self, spelling: str, grid: Grid) -> list[Setting]:
        """The settings of one router: all its thresholds, or the one that is spelled out; of a
        combiner, the one.

        Raises:
            BacoError: no such router, or a threshold out of its range.
        """
        name = router_name(spelling)
        if lacks_threshold(spelling):
            # Without a logit rule the threshold is a probability.
            rule = logit_rule_of(name)
            values = grid.thin((rule.sweep if rule else ()) or PROBABILITY_SWEEP)
            routers = [parse(spelling, value) for value in values]
        else:
            routers = [parse(spelling)]
        if isinstance(routers[0], Combination):
            return [combined(routers[0])]
        thresholds = [getattr(router, "threshold", None) for router in routers]
        return [
            _setting(name, router, threshold)
            for router, threshold in zip(routers, thresholds, strict=True)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return answers_of(baco, setting.options["router"], setting, prompts, draw)


def _setting(name: str, router: Router, value: float | None) -> Setting:
    spelling = router.spelling
    options = {"kind": Routed.name, "router": spelling, **file_digests(router)}
    return Setting(name, spelling, value, options)
