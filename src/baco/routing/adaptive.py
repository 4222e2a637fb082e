"""Thresholds that adapt while answers are written.

A rule's grid lists thresholds from the lowest base share to the highest. An adaptive threshold
moves along this grid, between its values linearly, and stays within its ends. Where it is depends
on the answer's own past, and on what lower-numbered samples of the same prompt have at the same
positions or before. So sample i depends neither on later samples nor on the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from baco.routing.signals import Past
from baco.sampling.parameters import written

# Steps along the grid for each token too few or too many.
STEPS_PER_TOKEN = 2.0
# An earlier sample has gone the same way if it has this many last tokens of the answer.
ALIKE_TOKENS = 3

# What a target is held over: each answer, or all samples of a prompt together.
Over = Literal["answer", "samples"]


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What moves a threshold.

    Attributes:
        share: the base share to hold.
        distinct: the share of fresh tokens to hold, see :class:`baco.routing.signals.Siblings`.
        siblings: steps where one earlier sample has gone the same way, see `apart`.
        over: what ``share`` or ``distinct`` is held over.
    """

    share: float | None = None
    distinct: float | None = None
    siblings: float | None = None
    over: Over = "answer"

    @property
    def sibling_aware(self) -> bool:
        """Whether it reads the lower-numbered samples of the same prompt."""
        alone = self.distinct is None and self.siblings is None and self.over == "answer"
        return not alone

    @property
    def arguments(self) -> dict[str, str]:
        """Its arguments in a spelling."""
        numbers = {"share": self.share, "distinct": self.distinct, "siblings": self.siblings}
        given = {key: written(value) for key, value in numbers.items() if value is not None}
        return given | ({} if self.over == "answer" else {"over": self.over})

    def steps(self, past: Past) -> Tensor:
        """Steps towards a higher base share, float32 [N]."""
        steps = torch.zeros(len(past.length), device=past.length.device)
        if self.share is not None:
            steps = steps + STEPS_PER_TOKEN * self._missing_base(self.share, past)
        if self.distinct is not None:
            steps = steps + STEPS_PER_TOKEN * self._missing_fresh(self.distinct, past)
        if self.siblings is not None:
            assert past.siblings is not None
            steps = steps + apart(self.siblings, past.siblings.alike)
        return steps

    def _missing_base(self, share: float, past: Past) -> Tensor:
        if self.over == "answer":
            return owed(share, past.length, past.num_base)
        assert past.siblings is not None
        total = owed(share, past.siblings.length, past.siblings.num_base)
        return total / past.siblings.earlier.add(1)

    def _missing_fresh(self, share: float, past: Past) -> Tensor:
        siblings = past.siblings
        assert siblings is not None
        if self.over == "answer":
            # The first sample has none to differ from.
            return owed(share, past.length, siblings.own_fresh) * (siblings.earlier > 0)
        total = owed(share, siblings.compared, siblings.num_fresh)
        return total / siblings.earlier.clamp_min(1)


def apart(strength: float, alike: Tensor) -> Tensor:
    """Steps that lead an answer away from earlier samples: strength · log2(alike + 1).

    Args:
        strength: the steps where one earlier sample has gone the same way.
        alike: how many earlier samples have gone the same way, int64 [N].

    Returns:
        float32 [N].
    """
    return strength * (alike + 1).float().log2()


def owed(share: float, length: Tensor, count: Tensor) -> Tensor:
    """How many tokens are missing to reach a target share; negative where there are too many.

    Args:
        share: the target.
        length: tokens so far, int64 [N].
        count: those of them that count towards the share, int64 [N].

    Returns:
        float32 [N].
    """
    return length.float() * share - count


def moved(threshold: float, grid: Sequence[float], steps: Tensor) -> Tensor:
    """A threshold moved along a rule's grid: towards a higher base share by positive steps.

    Args:
        threshold: where it starts.
        grid: monotone, two values or more.
        steps: float32 [N]; one step leads from one value of the grid to the next.

    Returns:
        float32 [N].
    """
    values = torch.tensor(grid, dtype=torch.float32, device=steps.device)
    place = (_place(threshold, grid) + steps).clamp(0, len(grid) - 1)
    low = place.floor().long().clamp_max(len(grid) - 2)
    return values[low] + (values[low + 1] - values[low]) * (place - low)


def at_share(grid: Sequence[float], share: float) -> float:
    """The threshold that lies this share of the way along a grid, to four decimals."""
    place = share * (len(grid) - 1)
    low = min(int(place), len(grid) - 2)
    return round(grid[low] + (grid[low + 1] - grid[low]) * (place - low), 4)


def _place(threshold: float, grid: Sequence[float]) -> float:
    """The index of a threshold in a grid, between two of its values a fraction."""
    sign = 1 if grid[-1] > grid[0] else -1
    rising = [sign * value for value in grid]
    wanted = min(max(sign * threshold, rising[0]), rising[-1])
    low = max(i for i, value in enumerate(rising[:-1]) if i == 0 or value <= wanted)
    return low + (wanted - rising[low]) / (rising[low + 1] - rising[low])
