"""Whole answers mixed: m of the n samples are from the base model, the rest from the aligned one.

It is a rival without routing, and a strong one in lexical diversity. Base samples have the lower
indices; every sample keeps the noise of its index.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import ref

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, sampled
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco.api import Baco

Rows = list[list[Answer]]


class Mixing:
    """m of n samples from base, for every m; at the pair's own sampling."""

    name = "mixing"
    family: Family = "mixing"
    help = "m of the n samples from base, the others from aligned, for every m"
    not_served = "ask baco/base for m of the answers and baco/aligned for the others"

    def __init__(self) -> None:
        # The settings differ only in m, so both models' answers are kept for the next setting. The
        # pair is referenced weakly: it can be freed, and another one is never taken for it.
        self._pair: Callable[[], object] = lambda: None
        self._input: object = None
        self._answers: tuple[Rows, Rows] = ([], [])

    def settings(self, grid: Grid) -> list[Setting]:
        shares = range(grid.n + 1)
        if grid.preset == "quick":
            shares = range(0, grid.n + 1, max(1, grid.n // 4))
        return [
            Setting(
                "mixing",
                f"{share} of {grid.n} from base",
                float(share),
                {"kind": self.name, "from_base": share},
            )
            for share in shares
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        base, aligned = self._both(baco, prompts, draw)
        share = setting.options["from_base"]
        return [[*b[:share], *a[share:]] for b, a in zip(base, aligned, strict=True)]

    def _both(self, baco: "Baco", prompts: Sequence[Prompt], draw: Draw) -> tuple[Rows, Rows]:
        conversations = [prompt.messages for prompt in prompts]
        if self._pair() is not baco or self._input != (conversations, draw):
            self._pair, self._input = ref(baco), (conversations, draw)
            base, aligned = (
                sampled(baco, router, conversations, draw.n, draw.seed, draw.sampling)
                for router in ("Base", "Aligned")
            )
            self._answers = (base, aligned)
        return self._answers
