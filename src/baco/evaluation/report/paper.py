"""The paper's own figures, to stand beside a run's."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Reported:
    """Overall Coverage and Dominance as the paper reports them; None where it does not."""

    coverage: float | None = None
    dominance: float | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """One table of the paper.

    Attributes:
        measured_on: tasks and pairs.
        figures: by method or router.
    """

    measured_on: str
    figures: dict[str, Reported]

    def of(self, name: str) -> Reported:
        """The figures of a method; nothing where the paper has none."""
        return self.figures.get(name, Reported())


@cache
def reference(table: str) -> Reference:
    """The paper's `headline` table or its `routers` ablation (arXiv 2511.05650)."""
    text = resources.files("baco.evaluation.report").joinpath("paper.toml").read_text("utf-8")
    found = tomllib.loads(text)[table]
    figures = {name: Reported(**row) for name, row in found["figures"].items()}
    return Reference(found["measured_on"], figures)
