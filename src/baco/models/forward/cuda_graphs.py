"""Experimental: a `DenseForward` as CUDA graphs, each recorded for one shape and then replayed.

Launching operations one by one takes longer than a small model computes; a CUDA graph launches all
of them at once. It runs the recorded kernels on the recorded addresses: inputs are copied to
buffers that do not move, and a graph is valid for the cache's tables at the addresses they had when
it was recorded. Rows, tokens and columns are rounded up, so that few shapes are recorded.

Nobody has run this on a GPU yet; the tests simulate the device.
"""

import logging
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import functional as F

from baco.kv_cache.batched import CHUNK, BatchedKVCache, Forward
from baco.kv_cache.slots import ForwardPlan, SlotCache
from baco.models.forward.dense import DenseForward

log = logging.getLogger("baco")

# Tokens of all rows up to which a forward is recorded: with more, computing takes most of the time.
_MAX_TOKENS = 256
# Tokens of a row that are recorded; others are padded.
_SPANS = (1, 2, 3, 4, 6, 9, 12, 16)
# The smallest number of columns that attention covers; larger ones are powers of two.
_MIN_WIDTH = 128
# Shapes that may be recorded at a time.
_MAX_SHAPES = 96
# Runs before a recording, so that nothing is allocated for the first time while it is recorded.
_WARM_UPS = 2
# A process records one graph at a time, and no thread may wait for the whole device meanwhile.
_RECORDING = Lock()

# Rows, tokens of each, columns that attention covers.
Shape = tuple[int, int, int]
Step = Callable[[], None]


class Recorder(Protocol):
    """Turns many operations on tensors that do not move into one call."""

    def record(self, step: Step) -> Step:
        """Run ``step`` a few times; return a function that runs the same operations on the same
        addresses. It may be called only as long as the tensors at these addresses are in use.
        """

    def turn(self) -> AbstractContextManager[None]:
        """In this block, work queued on the device runs after all work of earlier blocks."""

    def forget(self) -> None:
        """All recordings are about to be dropped, and none of them will be used again."""


class GraphRecorder:
    """Records CUDA graphs.

    Args:
        device: to record on.
        cuda: the interface to it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        # A stream for each recorder: graphs recorded on one stream share the workspace of its
        # matrix products, and those of the other model may be replayed at the same time.
        self._stream = cuda.Stream(device)
        self._pool = cuda.graph_pool_handle()
        self._done: Any = None

    def record(self, step: Step) -> Step:
        cuda, current = self._cuda, self._cuda.current_stream(self._device)
        with _RECORDING, cuda.device(self._device):
            self._stream.wait_stream(current)
            with cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    step()
            current.wait_stream(self._stream)
            graph = cuda.CUDAGraph()
            # The work of other threads on the device is neither recorded nor refused.
            with cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        replay: Step = graph.replay
        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        current = self._cuda.current_stream(self._device)
        if self._done is not None:
            current.wait_event(self._done)
        try:
            yield
        finally:
            self._done = current.record_event()

    def forget(self) -> None:
        with _RECORDING:
            self._cuda.synchronize(self._device)
        # A pool cannot be used again once all graphs that shared it are gone.
        self._pool = self._cuda.graph_pool_handle()


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Inputs and outputs of the graphs: tokens and columns [_MAX_TOKENS], logits [., V]."""

    tokens: Tensor
    columns: Tensor
    logits: Tensor


class CudaGraphForward:
    """A `DenseForward` that is replayed over caches with static shapes; other caches, and many
    tokens, are read by the plain forward.

    Args:
        forward: the plain forward.
        recorder: by default CUDA graphs.
    """

    def __init__(self, forward: DenseForward, recorder: Recorder | None = None) -> None:
        self._plain = forward
        self._recorder = GraphRecorder(forward.device) if recorder is None else recorder
        self._steps: dict[Shape, Step | None] = {}  # None for a shape that was met once
        self._addresses: tuple[int, ...] = ()  # that the steps were recorded on
        self._buffers: _Buffers | None = None
        self._lock = Lock()  # two threads may decode with one model
        self._spare: deque[SlotCache] = deque(maxlen=1)
        self._proven = self._given_up = False

    def new_cache(self, forward: Forward) -> BatchedKVCache:
        """A cache with the tables of the last one that was freed, so that recordings stay valid."""
        try:
            tables = self._spare.pop()
        except IndexError:
            tables = SlotCache(0, 0)
        cache = BatchedKVCache(forward, tables, chunk=CHUNK)
        finalize(cache, self._spare.append, tables).atexit = False
        return cache

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; return the raw logits after the last ``keep``."""
        rows, span = tokens.shape
        plain = self._given_up or any(cache.plan.long)
        shape = None if plain else _shape(rows, span, cache)
        if shape is None:
            return self._plain(tokens, cache, keep)
        with self._lock, self._recorder.turn():
            self._check_addresses(cache)
            if shape not in self._steps:  # it may never be met again
                logits = self._plain(tokens, cache, keep)
                self._add_shape(shape, logits)
                return logits
            self._fill(shape, tokens, cache.plan)
            step = self._steps[shape] or self._record(shape, cache)
            if step is None:
                return self._plain(tokens, cache, keep)
            step()
            # A copy, since the next step overwrites the buffer.
            return self._logits(shape)[:rows, -min(keep or span, span) :].clone()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Try it on a few tokens.

        Raises:
            Exception: whatever the device raises where the forward cannot be recorded.
            RuntimeError: a recorded forward returns other logits than the plain one.
        """
        recorded, plain = self.new_cache(self), BatchedKVCache(self._plain)
        recorded.cache.preallocate(2, _MIN_WIDTH)
        for cache in (recorded, plain):
            cache.copy_prefix(None, 2)
        for token in range(1, 5):  # met, recorded, replayed
            tokens = torch.tensor([[token], [2 * token]])
            logits, expected = (c.extend(tokens, [1, 1], 1).float() for c in (recorded, plain))
            if not (logits - expected).abs().max() < 0.1 * expected.std():
                raise RuntimeError("a recorded forward returns other logits than the plain one")
        self._proven = True

    def _check_addresses(self, cache: SlotCache) -> None:
        """Drop the recordings if the tables are at other addresses than when they were made."""
        keys, values = self._plain.tables(cache)
        tables = (*self._plain.rotations(cache.columns).values(), *keys, *values)
        addresses = (cache.rows, cache.columns, *(table.data_ptr() for table in tables))
        if addresses != self._addresses:
            self._drop()
            self._addresses = addresses

    def _add_shape(self, shape: Shape, logits: Tensor) -> None:
        if len(self._steps) >= _MAX_SHAPES:
            self._drop()
        self._steps[shape] = None
        if self._buffers is None:
            tokens, columns = (logits.new_zeros(_MAX_TOKENS, dtype=torch.int64) for _ in range(2))
            output = logits.new_empty(_MAX_TOKENS, logits.shape[-1])
            self._buffers = _Buffers(tokens, columns, output)

    def _drop(self) -> None:
        """Drop all recordings: when the first is freed, torch frees memory that others made on the
        same stream still use.
        """
        if any(self._steps.values()):
            self._recorder.forget()
        self._steps.clear()

    def _fill(self, shape: Shape, tokens: Tensor, plan: ForwardPlan) -> None:
        """Copy tokens and columns into the buffers. Padding goes to columns that no token attends
        to before they are overwritten: one behind all rows, and those of unused rows.
        """
        assert self._buffers is not None
        rows, span, _ = shape
        padding = (span - tokens.shape[1], 0, 0, rows - len(tokens))
        columns = F.pad(plan.columns, padding, value=plan.width)
        for buffer, content in (
            (self._buffers.tokens, F.pad(tokens, padding)),
            (self._buffers.columns, columns),
        ):
            buffer[: rows * span].copy_(content.flatten(), non_blocking=True)

    def _record(self, shape: Shape, cache: SlotCache) -> Step | None:
        assert self._buffers is not None
        rows, span, width = shape
        tokens, columns = (
            buffer[: rows * span].view(rows, span)
            for buffer in (self._buffers.tokens, self._buffers.columns)
        )
        keys, values = self._plain.tables(cache)
        rotations, output = self._plain.rotations(cache.columns), self._logits(shape)

        def step() -> None:
            logits = self._plain.read(tokens, columns, rotations, keys, values, 0, width=width)
            output.copy_(logits)

        try:
            self._steps[shape] = self._recorder.record(step)
        except RuntimeError as error:
            if not self._proven:
                raise
            self._given_up = True
            self._drop()
            log.warning(
                "forwards are no longer recorded as CUDA graphs: %s", str(error).partition("\n")[0]
            )
            return None
        return self._steps[shape]

    def _logits(self, shape: Shape) -> Tensor:
        """The logits of a step, [rows, span, V]."""
        assert self._buffers is not None
        rows, span, _ = shape
        return self._buffers.logits[: rows * span].view(rows, span, -1)


def _shape(rows: int, span: int, cache: SlotCache) -> Shape | None:
    """The shape that a forward is recorded as, rounded up where there is room for padding; None
    where the plain forward reads it.
    """
    if not cache.preallocated[0] or span > _SPANS[-1]:
        return None
    last = cache.plan.width
    if last < cache.columns:  # a column behind all rows is free
        rows, span = min(_power_of_two(rows), cache.rows), _SPANS[bisect_left(_SPANS, span)]
    width = min(max(_MIN_WIDTH, _power_of_two(last)), cache.columns)
    return (rows, span, width) if rows * span <= _MAX_TOKENS else None


def _power_of_two(count: int) -> int:
    """The least power of two that is not less than ``count``."""
    return 1 << (count - 1).bit_length()
