"""The sources of a step's tokens, sent from a worker to the scheduler.

They are attached to the output that vLLM's executor sends anyway, with any number of processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from baco.routing.combiners import ALIGNED, BASE, MIXED

# An attribute that BACo adds to vLLM's output; it is pickled with it.
_NAME = "baco_sources"
_LETTERS = {BASE: "b", ALIGNED: "a", MIXED: "m"}


@dataclass(slots=True)
class Sources:
    """The sources of the rows of one step, while they are copied to the host.

    Attributes:
        requests, counts: the requests, and the number of rows of each.
        rows: of each row, int64 [R], as combiners number them; valid once ``ready``.
        ready: the event after the copy; None where no copy is needed.
    """

    requests: list[str]
    counts: list[int]
    rows: Tensor
    ready: Any

    @classmethod
    def of(cls, requests: list[str], counts: list[int], rows: Tensor) -> "Sources":
        """Start the copy to the host without waiting for it."""
        if rows.device.type == "cpu":
            return cls(requests, counts, rows, None)
        on_host = rows.to("cpu", non_blocking=True)
        ready = torch.Event(device=rows.device)
        ready.record()
        return cls(requests, counts, on_host, ready)

    def put(self, output: ModelRunnerOutput) -> None:
        """Wait for the copy, and attach the sources of each request's rows to the output."""
        if self.ready is not None:
            self.ready.synchronize()
        letters = "".join(_LETTERS[source] for source in self.rows.tolist())
        by_request, first = {}, 0
        for request, count in zip(self.requests, self.counts, strict=True):
            by_request[request] = letters[first : first + count]
            first += count
        setattr(output, _NAME, by_request)


def sources_of(output: ModelRunnerOutput) -> Mapping[str, str]:
    """The sources that `Sources.put` attached, by request: a letter for each row."""
    sources: Mapping[str, str] = getattr(output, _NAME, {})
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
