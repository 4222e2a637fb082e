"""One model alone over temperature, top-p and min-p: what a user has without BACo."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from baco.evaluation.methods.method import Answer, Draw, Family, Grid, answers_of
from baco.evaluation.records import Prompt, Setting
from baco.source import Source

if TYPE_CHECKING:
    from baco.api import Baco

TEMPERATURES = {"base": (0.4, 0.7, 1.0, 1.3, 1.6), "aligned": (0.7, 1.0, 1.3, 1.6, 2.0)}
TOP_P = (0.5, 0.8, 0.9, 0.95)
# Nguyen et al. 2025 (arXiv 2407.01082): min-p keeps high temperatures readable.
MIN_P = ((1.0, 0.1), (1.5, 0.1), (2.0, 0.1), (3.0, 0.1), (1.0, 0.03), (2.0, 0.03), (3.0, 0.03))


@dataclass(frozen=True, slots=True)
class Single:
    """The base or the aligned model over three grids of sampling parameters."""

    source: Source
    not_served: ClassVar[str] = "name the model alone, as in baco/base"

    @property
    def name(self) -> str:
        return self.source

    @property
    def help(self) -> str:
        return f"the {self.source} model alone over temperature, top-p and min-p"

    @property
    def family(self) -> Family:
        return self.source

    def settings(self, grid: Grid) -> list[Setting]:
        return list(self._settings(grid))

    def _settings(self, grid: Grid) -> Iterator[Setting]:
        for temperature in grid.thin(TEMPERATURES[self.source]):
            yield self._setting("temperature", temperature, temperature=temperature)
        for top_p in grid.thin(TOP_P):
            yield self._setting("top-p", top_p, top_p=top_p)
        for temperature, min_p in MIN_P if grid.preset == "full" else MIN_P[:4]:
            yield self._setting("min-p", temperature, temperature=temperature, min_p=min_p)

    def _setting(self, swept: str, value: float, **given: float) -> Setting:
        sampling = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | given
        label = f"{self.source.capitalize()} T={sampling['temperature']:g}"
        label += "".join(
            f" {key.replace('_', '-')}={sampling[key]:g}"
            for key in ("top_p", "min_p")
            if key in given
        )
        options: dict[str, Any] = {"kind": self.name, "sampling": sampling}
        return Setting(f"{self.source}, {swept}", label, value, options)

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        return answers_of(baco, self.source.capitalize(), setting, prompts, draw)
