"""Every router, over a grid of thresholds; Nudging is one of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from baco.evaluation.methods.protocol import Answer, Draw, Grid, sampled
from baco.evaluation.records import Prompt, Setting
from baco.routing.registry import catalogue, family, needs_threshold
from baco.routing.registry import router as parse

if TYPE_CHECKING:
    from baco import Baco

# Thresholds of every logit rule, from nearly always aligned to nearly always base or the other way
# round; closest together where a model is least sure, for there a step moves most words.
THRESHOLDS: Mapping[str, Sequence[float]] = {
    "P": (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9),
    "H": (0.5, 1.0, 1.6, 2.3, 2.8, 3.3, 4.0),  # nats
    "Gap": (0.2, 0.7, 1.2, 1.8, 2.4, 2.9, 3.5),  # nats
    "Rand": (0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    "Nudging": (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9),
}
# Single models are methods of their own; a combination of both content rules is none of the
# catalogue's examples.
_NOT_SWEPT = ("Base", "Aligned")
_BESIDE = ("Punc-FC",)


class Routed:
    """BACo itself: the router picks who speaks, at the pair's own sampling."""

    name = "routers"
    help = "every router over a grid of thresholds, Nudging included"

    def settings(self, grid: Grid) -> list[Setting]:
        examples = [line.example for line in catalogue() if line.name not in _NOT_SWEPT]
        spellings = [e if not needs_threshold(e) else family(e) for e in (*examples, *_BESIDE)]
        return [setting for spelling in spellings for setting in self.of(spelling, grid)]

    def of(self, spelling: str, grid: Grid) -> list[Setting]:
        """The settings of one router: all its thresholds, or the one that is spelled out.

        Raises:
            BacoError: no such router, or a threshold out of its range.
        """
        name = family(spelling)
        if needs_threshold(spelling) and ":" not in spelling:
            values = grid.thin(_thresholds(name))
            return [_setting(name, f"{name}:{value:g}", value) for value in values]
        router = parse(spelling)
        return [_setting(name, router.spelling, getattr(router, "threshold", None))]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        asked = [prompt.messages for prompt in prompts]
        return sampled(baco, setting.options["router"], asked, draw.n, draw.seed, draw.sampling)


def _setting(name: str, spelling: str, value: float | None) -> Setting:
    return Setting(name, spelling, value, {"kind": Routed.name, "router": spelling})


def _thresholds(name: str) -> Sequence[float]:
    """Of a combination those of its logit rule; of a user's own rule those of a probability."""
    rule = next((rule for rule in name.split("-") if rule in THRESHOLDS), "P")
    return THRESHOLDS[rule]
