"""The inputs of each model for a batch that vLLM laid out: tokens, positions and cache slots.

vLLM's batch counts positions from the start of the longer prompt. A model with a shorter prompt
skips the tokens before its own, and counts positions from there. Its keys and values are in the
request's blocks from the first slot on, in cache tensors of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baco.backends.vllm.table import RequestTable
from baco.source import Source


@dataclass(frozen=True, slots=True)
class Step:
    """A batch as vLLM laid it out: N requests, T tokens.

    Attributes:
        requests: their ids.
        scheduled: tokens of each in this step, [N].
        computed: tokens of each before it, [N]; exact for prompt tokens.
        row: the request of each token, int64 [T], on the device.
        ids, positions: of the tokens, [T], on the device.
        lengths: tokens of each request after the step, int32 [N], on the device.
    """

    requests: list[str]
    scheduled: NDArray[np.int32]
    computed: NDArray[np.int32]
    row: Tensor
    ids: Tensor
    positions: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """The inputs of one model in a step.

    Attributes:
        ids, positions: of its tokens, [T'].
        kept: their indices among the step's tokens, int64 [T']; None for all.
        row: the request of each, int64 [T'].
        alive: the requests with any token here, int64 [N']; None for all.
        counts: tokens of these requests, [N'].
        lengths: tokens that the model has of these requests after the step, int32 [N'].
        longest: an upper bound of ``lengths``.
        shifted: whether the positions differ from the step's.
    """

    ids: Tensor
    positions: Tensor
    kept: Tensor | None
    row: Tensor
    alive: Tensor | None
    counts: NDArray[np.int32]
    lengths: Tensor
    longest: int
    shifted: bool

    @classmethod
    def of(cls, step: Step, source: Source, table: RequestTable, slot: Tensor) -> "ModelInputs":
        """A model's inputs in a step; ``slot`` of each request in the table, int64 [N]."""
        device = step.ids.device
        offsets = np.array(table.offsets(step.requests, source), dtype=np.int32)
        dropped = np.clip(offsets - step.computed, 0, step.scheduled)
        counts = step.scheduled - dropped
        kept = alive = None
        row, ids, positions, lengths = step.row, step.ids, step.positions, step.lengths
        shift = table.offset[source][slot]
        lengths = lengths - shift.to(lengths.dtype)
        if dropped.any():
            kept = _upload(_tail(step.scheduled, counts), device)
            row, ids, positions = row[kept], ids[kept], positions[kept]
        if not counts.all():
            living = np.flatnonzero(counts)
            alive = _upload(living, device)
            lengths, counts = lengths[alive], counts[living]
        positions = positions - shift[row]
        if source == "base":
            at = slot[row]
            within = positions.clamp_min(0).clamp_max(table.width - 1)
            prompted = table.base_ids[at, within]
            ids = torch.where(positions < table.base_length[at], prompted, ids)
        longest = int((step.computed + step.scheduled - offsets).max())
        return cls(ids, positions, kept, row, alive, counts, lengths, longest, bool(offsets.any()))

    def slots(self, blocks: Tensor, block_size: int) -> Tensor:
        """Cache slots of the tokens, int64 [T'], by the requests' block table [N, B]."""
        block = blocks[self.row, self.positions // block_size].long()
        return block * block_size + self.positions % block_size

    def metadata(self, make: Callable[..., Any], blocks: Tensor, slots: Tensor) -> Any:
        """vLLM's common attention metadata for these inputs; ``make`` is its class."""
        starts = np.zeros(len(self.counts) + 1, dtype=np.int32)
        np.cumsum(self.counts, out=starts[1:])
        on_host = torch.from_numpy(starts)
        return make(
            query_start_loc=on_host.to(slots.device, non_blocking=True),
            query_start_loc_cpu=on_host,
            seq_lens=self.lengths,
            num_reqs=len(self.counts),
            num_actual_tokens=len(self.positions),
            max_query_len=int(self.counts.max()),
            max_seq_len=self.longest,
            block_table_tensor=blocks if self.alive is None else blocks[self.alive],
            slot_mapping=slots,
            positions=self.positions,
        )


def _tail(scheduled: NDArray[np.int32], counts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Indices of the last ``counts[r]`` of each request's ``scheduled[r]`` tokens, in a row."""
    ends = np.cumsum(scheduled)
    first = np.repeat(ends - counts, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    kept: NDArray[np.int64] = (first + within).astype(np.int64)
    return kept


def _upload(numbers: Sequence[int] | NDArray[Any], device: Any) -> Tensor:
    return torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(device, non_blocking=True)
