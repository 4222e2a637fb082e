"""The lean forward without Python in it, on a GPU: recorded once for a shape, and then replayed.

Starting operations one by one costs more than a small model computes; a CUDA graph starts all of
them at once. It runs the very kernels that were recorded, on the very addresses: what goes in is
copied to buffers that stay where they are, and a recording belongs to the cache's tables as they
lay when it was made. Rows, tokens and columns are rounded up, so that few shapes are recorded.
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
from baco.models.forward.llama import LlamaForward

log = logging.getLogger("baco")

# Tokens of all rows up to which a forward is recorded: beyond, what it computes costs more.
_MOST = 256
# Tokens of a row that are recorded; others are padded.
_SPANS = (1, 2, 3, 4, 6, 9, 12, 16)
# Columns that attention looks at, at least; beyond, twice as many at a time.
_NARROWEST = 128
# Shapes for which there are recordings at a time.
_SHAPES = 96
# Runs before a recording, so that nothing is made for the first time while it is recorded.
_WARM_UPS = 2
# A process records one thing at a time, and nobody may wait for the whole device meanwhile.
_ALONE = Lock()

# Rows, tokens of each, columns that attention looks at.
Shape = tuple[int, int, int]
Step = Callable[[], None]


class Recorder(Protocol):
    """What makes one call of many operations on tensors that stay where they are."""

    def record(self, step: Step) -> Step:
        """Run ``step`` a few times; what then runs the same operations on the same addresses. It
        may be called only while these are somebody's.
        """

    def turn(self) -> AbstractContextManager[None]:
        """Inside, what is told to the device comes after all that was told in turns before."""

    def forget(self) -> None:
        """All recordings will be dropped now, and none of them is used again."""


class GraphRecorder:
    """Records CUDA graphs.

    Args:
        device: where.
        cuda: the interface to it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device, self._cuda = device, cuda
        # A stream of its own: recordings made on one stream share the workspace of its matrix
        # products, and those of another half may be replayed at the same time.
        self._stream = cuda.Stream(device)
        self._pool = cuda.graph_pool_handle()
        self._done: Any = None

    def record(self, step: Step) -> Step:
        cuda, here = self._cuda, self._cuda.current_stream(self._device)
        with _ALONE, cuda.device(self._device):
            self._stream.wait_stream(here)
            with cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    step()
            here.wait_stream(self._stream)
            graph = cuda.CUDAGraph()
            # What other threads do on the device is neither recorded nor refused.
            with cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        replay: Step = graph.replay
        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        here = self._cuda.current_stream(self._device)
        if self._done is not None:
            here.wait_event(self._done)
        try:
            yield
        finally:
            self._done = here.record_event()

    def forget(self) -> None:
        with _ALONE:
            self._cuda.synchronize(self._device)
        # A pool cannot be taken up again once all graphs that shared it are gone.
        self._pool = self._cuda.graph_pool_handle()


@dataclass(frozen=True, slots=True)
class _Buffers:
    """What recordings read and write: tokens and their columns [_MOST], logits [_MOST, V]."""

    tokens: Tensor
    columns: Tensor
    logits: Tensor


class CudaGraphForward:
    """A lean forward that is replayed, over caches that hold their tables where they are; others,
    and many tokens, are read plainly.

    Args:
        lean: the plain forward.
        recorder: CUDA graphs where none is given.
    """

    def __init__(self, lean: LlamaForward, recorder: Recorder | None = None) -> None:
        self._lean = lean
        self._recorder = GraphRecorder(lean.device) if recorder is None else recorder
        self._steps: dict[Shape, Step | None] = {}  # None where a shape was seen once
        self._addresses: tuple[int, ...] = ()  # that the steps were recorded on
        self._buffers: _Buffers | None = None
        self._lock = Lock()  # two threads may decode with one half
        self._spare: deque[SlotCache] = deque(maxlen=1)
        self._proven = self._given_up = False

    def new_cache(self, forward: Forward) -> BatchedKVCache:
        """A store whose tables are those of the last one that is gone, so that recordings last."""
        try:
            cache = self._spare.pop()
        except IndexError:
            cache = SlotCache(0, 0)
        store = BatchedKVCache(forward, cache, chunk=CHUNK)
        finalize(store, self._spare.append, cache).atexit = False
        return store

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; the raw logits after the last ``keep`` of them."""
        rows, span = tokens.shape
        shape = None if self._given_up else _shape(rows, span, cache)
        if shape is None:
            return self._lean(tokens, cache, keep)
        with self._lock, self._recorder.turn():
            self._settle(cache)
            if shape not in self._steps:  # it may never come again
                logits = self._lean(tokens, cache, keep)
                self._see(shape, logits)
                return logits
            self._fill(shape, tokens, cache.plan)
            step = self._steps[shape] or self._record(shape, cache)
            if step is None:
                return self._lean(tokens, cache, keep)
            step()
            # The next step writes over it.
            return self._said(shape)[:rows, -min(keep or span, span) :].clone()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Try it out on a few tokens; whatever is raised where it cannot be recorded, RuntimeError
        where it then says something else.
        """
        store, plain = self.new_cache(self), BatchedKVCache(self._lean)
        store.cache.preallocate(2, _NARROWEST)
        for one in (store, plain):
            one.copy_prefix(None, 2)
        for token in range(1, 5):  # seen, recorded, replayed
            tokens = torch.tensor([[token], [2 * token]])
            found, expected = (one.extend(tokens, [1, 1], 1).float() for one in (store, plain))
            if not (found - expected).abs().max() < 0.1 * expected.std():
                raise RuntimeError("a recorded forward says something else than the plain one")
        self._proven = True

    def _settle(self, cache: SlotCache) -> None:
        """Drop what was recorded on other addresses than those of these tables."""
        keys, values = self._lean.tables(cache)
        tables = (*self._lean.rotations(cache.columns), *keys, *values)
        addresses = (cache.rows, cache.columns, *(table.data_ptr() for table in tables))
        if addresses != self._addresses:
            self._drop()
            self._addresses = addresses

    def _see(self, shape: Shape, logits: Tensor) -> None:
        if len(self._steps) >= _SHAPES:
            self._drop()
        self._steps[shape] = None
        if self._buffers is None:
            tokens, columns = (logits.new_zeros(_MOST, dtype=torch.int64) for _ in range(2))
            said = logits.new_empty(_MOST, logits.shape[-1])
            self._buffers = _Buffers(tokens, columns, said)

    def _drop(self) -> None:
        """Drop all recordings: with the first that goes, torch lets go of memory that others made
        on the same stream still use.
        """
        if any(self._steps.values()):
            self._recorder.forget()
        self._steps.clear()

    def _fill(self, shape: Shape, tokens: Tensor, plan: ForwardPlan) -> None:
        """Put tokens and their columns where a step reads them. Padding goes where nobody looks
        before a token is written there: to a column behind all rows, and to rows that are nobody's.
        """
        assert self._buffers is not None
        rows, span, _ = shape
        padding = (span - tokens.shape[1], 0, 0, rows - len(tokens))
        columns = F.pad(plan.columns, padding, value=plan.width)
        for buffer, own in (
            (self._buffers.tokens, F.pad(tokens, padding)),
            (self._buffers.columns, columns),
        ):
            buffer[: rows * span].copy_(own.flatten(), non_blocking=True)

    def _record(self, shape: Shape, cache: SlotCache) -> Step | None:
        assert self._buffers is not None
        rows, span, width = shape
        tokens, columns = (
            buffer[: rows * span].view(rows, span)
            for buffer in (self._buffers.tokens, self._buffers.columns)
        )
        keys, values = self._lean.tables(cache)
        rotations, said = self._lean.rotations(cache.columns), self._said(shape)

        def step() -> None:
            read = self._lean.read(tokens, columns, rotations, keys, values, 0, width=width)
            said.copy_(read)

        try:
            self._steps[shape] = self._recorder.record(step)
        except RuntimeError as error:
            if not self._proven:
                raise
            self._given_up = True
            self._drop()
            log.warning("forwards are recorded no more: %s", str(error).partition("\n")[0])
            return None
        return self._steps[shape]

    def _said(self, shape: Shape) -> Tensor:
        """The logits of a step, [rows, span, V]."""
        assert self._buffers is not None
        rows, span, _ = shape
        return self._buffers.logits[: rows * span].view(rows, span, -1)


def _shape(rows: int, span: int, cache: SlotCache) -> Shape | None:
    """What a forward is recorded as, rounded up where there is room for padding; None where it is
    to be read plainly.
    """
    if not cache.preallocated[0] or span > _SPANS[-1]:
        return None
    last = cache.plan.width
    if last < cache.columns:  # a column behind all rows is left
        rows, span = min(_up(rows), cache.rows), _SPANS[bisect_left(_SPANS, span)]
    width = min(max(_NARROWEST, _up(last)), cache.columns)
    return (rows, span, width) if rows * span <= _MOST else None


def _up(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()
