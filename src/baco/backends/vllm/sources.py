"""The sources of a step's tokens, sent from a worker to the scheduler.

They are attached to the output that vLLM's executor sends anyway, with any number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

# An attribute that BACo adds to vLLM's output; it is pickled with it.
_NAME = "baco_sources"


@dataclass(slots=True)
class Sources:
    """The sources of the rows of one step, while they are copied to the host.

    Attributes:
        requests, counts: the requests, and the number of rows of each.
        is_base: bool [R], True for the base; valid once ``ready``.
        ready: the event after the copy; None where no copy is needed.
    """

    requests: list[str]
    counts: list[int]
    is_base: Tensor
    ready: Any

    @classmethod
    def of(cls, requests: list[str], counts: list[int], is_base: Tensor) -> "Sources":
        """Start the copy to the host without waiting for it."""
        if is_base.device.type == "cpu":
            return cls(requests, counts, is_base, None)
        on_host = is_base.to("cpu", non_blocking=True)
        ready = torch.Event(device=is_base.device)
        ready.record()
        return cls(requests, counts, on_host, ready)

    def put(self, output: ModelRunnerOutput) -> None:
        """Wait for the copy, and attach the sources of each request's rows to the output."""
        if self.ready is not None:
            self.ready.synchronize()
        is_base, by_request, first = self.is_base.tolist(), {}, 0
        for request, count in zip(self.requests, self.counts, strict=True):
            by_request[request] = is_base[first : first + count]
            first += count
        setattr(output, _NAME, by_request)


def sources_of(output: ModelRunnerOutput) -> Mapping[str, list[bool]]:
    """The sources that `Sources.put` attached, by request: True for the base."""
    sources: Mapping[str, list[bool]] = getattr(output, _NAME, {})
    return sources


class OutputWithSources(AsyncModelRunnerOutput):
    """An asynchronous output, and the sources of its tokens."""

    def __init__(self, output: AsyncModelRunnerOutput, sources: Sources) -> None:
        self.output, self.sources = output, sources

    def get_output(self) -> ModelRunnerOutput:
        """Wait for both, and return the output with its sources."""
        output = self.output.get_output()
        self.sources.put(output)
        return output
