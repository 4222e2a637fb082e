"""Experimental: both models' forwards at once on one GPU, on two CUDA streams.

Tests run it on a simulated device only; it has not run on a GPU. `ModelRunner` uses it where both
models of a pair on one GPU are compiled to CUDA graphs, and nowhere else. This module knows
streams; it does not know what the forwards compute.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _second_stream(device: torch.device) -> Any:
    """One stream for all engines: torch has few, and hands each out several times."""
    return torch.cuda.Stream(device)


class DualStream:
    """Runs two forwards concurrently on a CUDA device.

    Args:
        device: where both run.
        cuda: the interface to it.
        stream: for the second forward; by default one that all engines share.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, stream: Any = None) -> None:
        self._device, self._cuda = device, cuda
        self._stream = _second_stream(device) if stream is None else stream

    def run(
        self, first: Callable[[], Tensor], second: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run two independent forwards and return both results. Neither may free tensors that it
        did not allocate.

        Both start after all work queued before, and work queued later waits for both.
        """
        main = self._cuda.current_stream(self._device)
        before = main.record_event()
        result = first()
        self._stream.wait_event(before)
        with self._cuda.stream(self._stream):
            other = second()
        main.wait_stream(self._stream)
        other.record_stream(main)  # it was allocated on the second stream
        return result, other
