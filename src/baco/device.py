"""The machine: its processor and cores, and transfers to its devices that do not wait."""

import ctypes
import os
import platform
import sys
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


def keep_memory() -> None:
    """Ask glibc to keep freed memory, for work that makes and drops large tensors all the time.

    Without it page faults of new buffers take a third of such work's time.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another libc
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in <malloc.h>
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)
