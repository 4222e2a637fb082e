"""From numbers of the host to a device, without waiting for what the device has yet to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def tensor_on(
    device: torch.device, values: Sequence[Any], dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of plain numbers on a device.

    Made there outright it would wait until the device has done all it was told before.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
