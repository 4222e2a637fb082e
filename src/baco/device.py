"""The machine: its processor and cores, and transfers to its devices that do not wait."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tensor_on(
    device: torch.device, values: Sequence[Any], dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of plain numbers on a device.

    ``torch.tensor(..., device=device)`` would wait until the device has done all queued work.
    """
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name of this machine's processor."""
    # On Linux the platform module does not know the name.
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
