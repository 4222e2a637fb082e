"""Both halves' forwards at once on one GPU, on two streams.

It knows streams; it knows nothing of what halves read, or when.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _second_stream(device: torch.device) -> Any:
    """One for all engines: torch has few streams, and hands each out several times."""
    return torch.cuda.Stream(device)


class DualStream:
    """Two forwards at once on a CUDA device.

    Args:
        device: where both run.
        cuda: the interface to it.
        stream: for the second of the two; by default one that all engines share.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, stream: Any = None) -> None:
        self._device, self._cuda = device, cuda
        self._stream = _second_stream(device) if stream is None else stream

    def both(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What two pieces of work make that do not need each other, and free nothing but what they
        made themselves.

        Both come after all that the device was told before, and what it is told next comes after
        both.
        """
        here = self._cuda.current_stream(self._device)
        before = here.record_event()
        first = one()
        self._stream.wait_event(before)
        with self._cuda.stream(self._stream):
            second = other()
        here.wait_stream(self._stream)
        second.record_stream(here)  # it is given back here, and its memory was taken there
        return first, second
