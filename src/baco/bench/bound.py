"""What the machine allows: how fast weights can be read, and how fast they can be multiplied.

Decoding a few rows reads every weight once for each forward, so bytes over bandwidth bound it;
decoding many rows multiplies every weight with every row, so products over FLOP/s bound it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baco.models.pair import Pair

# How long each figure is measured; the best pass counts.
_SECONDS = 0.5
_LARGEST = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Bound:
    """The machine, and what it makes of a pair.

    Attributes:
        bandwidth: bytes per second of a float32 sum over a buffer as large as both halves' weights:
            a cache that holds them all counts as it does in decoding.
        flops: operations per second of a large matrix product in the weights' own dtype.
        bytes: of weights that one forward of each half reads.
        parameters: that one token is multiplied with, of both halves.
    """

    bandwidth: float
    flops: float
    bytes: dict[str, int]
    parameters: int

    @property
    def few(self) -> float:
        """Tokens per second at n = 1 if both halves are read at every token and all else free."""
        return self.bandwidth / sum(self.bytes.values())

    @property
    def many(self) -> float:
        """Tokens per second at large batches, two operations for each parameter and token."""
        return self.flops / (2 * self.parameters)


def bound(pair: Pair) -> Bound:
    """Measure the machine that a pair lies on."""
    halves = {"base": pair.base, "aligned": pair.aligned}
    sizes = {name: half.size for name, half in halves.items()}
    stored = {name: size.bytes for name, size in sizes.items()}
    device = pair.aligned.device
    buffer = torch.ones(min(sum(stored.values()), _LARGEST) // 4, device=device)
    read = _best(buffer.sum, device)
    rows, inner, outer = 1024, 2048, 4096
    left = torch.ones(rows, inner, dtype=pair.aligned.model.dtype, device=device)
    right = torch.ones(inner, outer, dtype=pair.aligned.model.dtype, device=device)
    product = _best(lambda: left @ right, device)
    return Bound(
        buffer.nbytes / read,
        2 * rows * inner * outer / product,
        stored,
        sum(size.parameters for size in sizes.values()),
    )


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of many passes."""
    began, best = time.perf_counter(), float("inf")
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
