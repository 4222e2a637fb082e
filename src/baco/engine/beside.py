"""Both halves' forwards at once on one GPU: on two streams, where both will be read anyway.

It knows streams and how often one half was enough; it knows nothing of what halves read.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from baco.routing.routers import Source

# Where one half's rows were enough in less than this share of the rounds lately, both are read.
_SELDOM = 0.1
# How quickly that share follows what is seen, and how quickly it rises while nobody looks: every
# ten rounds or so somebody does.
_FADE, _DOUBT = 0.1, 0.001


@cache
def _second_stream(device: torch.device) -> Any:
    """One for all engines: torch has few streams, and hands each out several times."""
    return torch.cuda.Stream(device)


class Beside:
    """Two forwards at once on a CUDA device.

    Args:
        device: where both run.
        cuda: the interface to it.
        stream: for the second of the two; by default one that all engines share.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, stream: Any = None) -> None:
        self._device, self._cuda = device, cuda
        self._stream = _second_stream(device) if stream is None else stream
        self._enough: dict[Source, float] = {"base": 0.5, "aligned": 0.5}

    def pays(self, half: Source) -> bool:
        """Is it to be expected that the other half is read too, whatever this one says?"""
        if self._enough[half] >= _SELDOM:
            return False
        self._enough[half] += _DOUBT
        return True

    def saw(self, half: Source, enough: bool) -> None:
        """A half's rows were enough for a round, or not."""
        self._enough[half] += _FADE * (enough - self._enough[half])

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
