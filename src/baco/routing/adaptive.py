"""Thresholds that adapt while an answer is written.

A rule's grid lists thresholds from the lowest base share to the highest. An adaptive threshold
moves along this grid, between its values linearly, and stays within its ends. Where it is depends
on the answer's own past alone, so that answers can be repeated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Steps along the grid for each token that the base model has written too few or too many.
STEPS_PER_TOKEN = 2.0


# "The same way": the last tokens are the same, as many as this.
ALIKE_TOKENS = 3


def apart(strength: float, alike: Tensor) -> Tensor:
    """Steps for answers that earlier samples have gone the same way as.

    Args:
        strength: steps for the first such sample; each doubling adds as many.
        alike: earlier samples that have gone the same way, int64 [N].

    Returns:
        float32 [N].
    """
    return strength * (alike + 1).float().log2()


def owed(share: float, length: Tensor, num_base: Tensor) -> Tensor:
    """How many tokens the base model has written too few for a target share; negative: too many.

    Args:
        share: the target base share.
        length: tokens of the answer so far, int64 [N].
        num_base: those of them whose source is base, int64 [N].

    Returns:
        float32 [N].
    """
    return length.float() * share - num_base


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


def _place(threshold: float, grid: Sequence[float]) -> float:
    """The index of a threshold in a grid, between two of its values a fraction."""
    sign = 1 if grid[-1] > grid[0] else -1
    rising = [sign * value for value in grid]
    wanted = min(max(sign * threshold, rising[0]), rising[-1])
    low = max(i for i, value in enumerate(rising[:-1]) if i == 0 or value <= wanted)
    return low + (wanted - rising[low]) / (rising[low + 1] - rising[low])
