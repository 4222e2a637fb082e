"""The sources of a step's tokens on their way from a worker to the scheduler.

They ride on the output that vLLM's executor sends anyway, whatever the number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

# An attribute that vLLM's output does not have of itself; it is pickled along.
_NAME = "baco_sources"


@dataclass(slots=True)
class Sources:
    """Who speaks at the rows of one step, on its way to the host.

    Attributes:
        requests, counts: whose rows they are, and how many each has.
        previous_source: bool [R], True for the base, on the host once ``ready``.
        ready: what tells so; None where it is there already.
    """

    requests: list[str]
    counts: list[int]
    previous_source: Tensor
    ready: Any

    @classmethod
    def of(cls, requests: list[str], counts: list[int], previous_source: Tensor) -> "Sources":
        """Start the copy to the host; nothing waits for it here."""
        if previous_source.device.type == "cpu":
            return cls(requests, counts, previous_source, None)
        on_host = previous_source.to("cpu", non_blocking=True)
        ready = torch.Event(device=previous_source.device)
        ready.record()
        return cls(requests, counts, on_host, ready)

    def put(self, output: ModelRunnerOutput) -> None:
        """Wait for the copy, and attach to every request which of its rows the base speaks at."""
        if self.ready is not None:
            self.ready.synchronize()
        every, told, at = self.previous_source.tolist(), {}, 0
        for request, count in zip(self.requests, self.counts, strict=True):
            told[request] = every[at : at + count]
            at += count
        setattr(output, _NAME, told)


def sources_of(output: ModelRunnerOutput) -> Mapping[str, list[bool]]:
    """What `Sources.put` attached."""
    told: Mapping[str, list[bool]] = getattr(output, _NAME, {})
    return told


class TellingOutput(AsyncModelRunnerOutput):
    """An output under way, and the sources of its tokens."""

    def __init__(self, output: AsyncModelRunnerOutput, sources: Sources) -> None:
        self.output, self.sources = output, sources

    def get_output(self) -> ModelRunnerOutput:
        """Both, once they are on the host."""
        output = self.output.get_output()
        self.sources.put(output)
        return output
