"""The base share and diversity of a router on a pair over γ, and γ for a given one of them."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from baco.errors import BacoError


@dataclass(frozen=True, slots=True)
class Curve:
    """Base share and diversity of a router on a pair over the thresholds, lowest base share first.

    Attributes:
        thresholds: γ at each point.
        base_share: in [0, 1], non-decreasing.
        diversity: distinct-2, non-decreasing (an isotonic fit of the measured values).
        aligned: distinct-2 of the aligned model alone.
        prompts, samples, seed: what it was measured with.
    """

    thresholds: tuple[float, ...]
    base_share: tuple[float, ...]
    diversity: tuple[float, ...]
    aligned: float
    prompts: int
    samples: int
    seed: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """From the JSON object that ``asdict`` makes.

        Raises:
            TypeError, ValueError: fields are missing, or its columns do not belong together.
        """
        columns: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
        }
        curve = cls(**columns)
        if not 0 < len(curve.thresholds) == len(curve.base_share) == len(curve.diversity):
            raise ValueError("columns of different lengths")
        return curve

    def at_diversity(self, dial: float) -> float:
        """γ at a dial position in [0, 1]."""
        low = min(self.aligned, self.diversity[0])
        target = low + dial * (self.diversity[-1] - low)
        return _interpolate(self.diversity, self.thresholds, target)

    def at_base_share(self, share: float) -> float:
        """γ at which this share of the tokens comes from the base model.

        Raises:
            BacoError: more than the router gives at any threshold.
        """
        if share > self.base_share[-1]:
            raise BacoError(
                f"base share {share:g} is out of reach: this router gives at most "
                f"{self.base_share[-1]:.2f} on this pair; ask for less, or choose another router"
            )
        return _interpolate(self.base_share, self.thresholds, share)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at the first place where the non-decreasing ``xs`` reach x."""
    upper = bisect.bisect_left(xs, x)
    if upper == 0:
        return ys[0]
    if upper == len(xs):
        return ys[-1]
    lower = upper - 1
    part = (x - xs[lower]) / (xs[upper] - xs[lower])
    return round(ys[lower] + part * (ys[upper] - ys[lower]), 4)
