"""The memory limit of KV caches, from what a user writes to bytes.

Weights do not count: they are loaded before any cache is allocated.
"""

import re
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from baco.errors import BacoError

# The share of free memory that caches may take by default.
SHARE = 0.6
# The share of free memory that kept prefixes may take, within that, where the user sets no limit.
KEPT_SHARE = 0.1
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for end, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-z]*|%)", re.IGNORECASE)


def cache_bytes(
    memory: int | float | str | None, devices: Iterable[torch.device], freed: int = 0
) -> int:
    """A memory limit in bytes.

    Args:
        memory: a whole number of bytes; a number and a unit, as in ``"2GiB"``; a share of the
            memory that is free now, above 0 and up to 1, as a number or as in ``"40%"``; None for
            the default share.
        devices: where the caches are. A share refers to the device with the least free memory.
        freed: bytes that count as free, since they are given back where caches need them.

    Raises:
        BacoError: the limit is none of these.
    """
    limit = SHARE if memory is None else _parse(memory) if isinstance(memory, str) else memory
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit <= 0:
        raise _invalid(memory)
    if isinstance(limit, int):
        return limit
    if limit > 1:
        raise _invalid(memory)
    return int((min(free_bytes(device) for device in devices) + freed) * limit)


def _parse(text: str) -> int | float:
    """Bytes as an integer, or a share as a float."""
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    if match is None or (unit != "%" and unit not in _UNITS):
        raise _invalid(text)
    number = float(match[1])
    if unit == "%":
        return number / 100
    return number if not unit and "." in match[1] else int(number * _UNITS[unit])


def _invalid(memory: Any) -> BacoError:
    return BacoError(
        f"memory is {memory!r}: give bytes, a size as in 2GiB, or a share of free memory as in 40%"
    )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; that of the machine for devices that share its memory."""
    if device.type == "cuda":
        # Memory that torch has reserved and does not use is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
