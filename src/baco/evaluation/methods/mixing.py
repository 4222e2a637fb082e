"""Whole answers mixed: m of the n samples are the base model's, the rest the aligned model's.

A rival without any routing, and a strong one in wording. Base samples have the lower indices, so
that every sample keeps the noise of its own index.
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

    def __init__(self) -> None:
        # The settings differ in m only: what both models said is kept for the next one. The pair is
        # held weakly, so that one that is gone is neither kept nor taken for one in its place.
        self._by: Callable[[], object] = lambda: None
        self._asked: object = None
        self._said: tuple[Rows, Rows] = ([], [])

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
        asked = (tuple(prompt.messages for prompt in prompts), draw)
        if self._by() is not baco or self._asked != asked:
            self._by, self._asked = ref(baco), asked
            base, aligned = (
                sampled(baco, router, asked[0], draw.n, draw.seed, draw.sampling)
                for router in ("Base", "Aligned")
            )
            self._said = (base, aligned)
        return self._said
