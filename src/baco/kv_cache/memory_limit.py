"""How much memory cached keys and values may take: what a user writes, in bytes.

Weights are not in it: they are held before any cache is made.
"""

import re
from collections.abc import Iterable
from typing import Any

import psutil
import torch

from baco.errors import BacoError

# The part of free memory that caches take where nothing is said.
SHARE = 0.6
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for end, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([a-z]*|%)", re.IGNORECASE)


def cache_bytes(memory: int | float | str | None, devices: Iterable[torch.device]) -> int:
    """A setting in bytes: a whole number of them, ``"2GiB"``, or a share of what is free now.

    Args:
        memory: bytes; a text of a number and a unit; a share above 0 and up to 1, as a number or
            as in ``"40%"``; None for the usual share.
        devices: where the caches lie; a share is one of the fullest device's free memory.

    Raises:
        BacoError: no such setting.
    """
    asked = SHARE if memory is None else _read(memory) if isinstance(memory, str) else memory
    if isinstance(asked, bool) or not isinstance(asked, int | float) or asked <= 0:
        raise _wrong(memory)
    if isinstance(asked, int):
        return asked
    if asked > 1:
        raise _wrong(memory)
    return int(min(free_bytes(device) for device in devices) * asked)


def _read(text: str) -> int | float:
    """Bytes, or a share as a float."""
    found = _SIZE.fullmatch(text.strip())
    unit = found[2].lower() if found else ""
    if found is None or (unit != "%" and unit not in _UNITS):
        raise _wrong(text)
    number = float(found[1])
    if unit == "%":
        return number / 100
    return number if not unit and "." in found[1] else int(number * _UNITS[unit])


def _wrong(memory: Any) -> BacoError:
    return BacoError(
        f"memory is {memory!r}: give bytes, a size as in 2GiB, or a share of free memory as in 40%"
    )


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses; of the machine, for devices that share its memory."""
    if device.type == "cuda":
        # What torch keeps for later use is free too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available
