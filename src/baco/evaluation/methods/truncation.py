"""The aligned model alone under newer truncation samplers: rivals that need no base model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, answers_of
from baco.evaluation.records import Prompt, Setting

if TYPE_CHECKING:
    from baco.api import Baco

# Temperatures at which each sampler is made to keep answers readable.
TEMPERATURES = (1.0, 1.5, 2.0, 3.0)
# Of each method: the spelling of its sampler, which runs before the temperature, and the
# temperatures. Top-nσ and p-less are meant for high ones (Tang et al. 2024; arXiv 2509.23234); XTC
# removes the likeliest tokens where several are likely.
SAMPLERS = {
    "top-nσ": ("top_n_sigma:1.0", TEMPERATURES),
    "p-less": ("p_less", TEMPERATURES),
    "XTC": ("xtc:probability=0.5,threshold=0.1", (0.7, 1.0, 1.3, 1.6)),
}


class Truncation:
    """The aligned model under top-nσ, p-less and XTC, each over temperatures."""

    name = "truncation"
    family: Family = "aligned"
    help = "the aligned model alone under top-nσ, p-less and XTC; not among the methods of 'all'"
    not_served = "name baco/aligned, and give the sampler in samplers"

    def settings(self, grid: Grid) -> list[Setting]:
        return [
            Setting(
                f"aligned, {title}",
                f"Aligned {title} T={temperature:g}",
                temperature,
                {
                    "kind": self.name,
                    "sampling": {
                        "temperature": temperature,
                        "top_p": 1.0,
                        "min_p": 0.0,
                        "samplers": [sampler],
                    },
                },
            )
            for title, (sampler, temperatures) in SAMPLERS.items()
            for temperature in grid.thin(temperatures)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return answers_of(baco, "Aligned", setting, prompts, draw)
