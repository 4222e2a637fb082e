"""A stand-in for a CUDA device on a CPU: streams, events and graphs with the rules of CUDA.

A graph keeps the operations that were called while it was captured, with their tensors, and calls
them again when it is replayed; capturing leaves memory as it was. Operations carry the time of
their stream, so that two unordered ones on the same memory are found (`Races`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baco.models.forward.cuda_graphs import CudaGraphForward, GraphRecorder
from baco.models.forward.dense import DenseForward
from baco.models.forward.selection import ClampedForward
from baco.models.model import PairModel

CUDA = torch.device("cuda", 0)


class Event:
    """The work of a stream at the time the event was recorded."""

    def __init__(self, clock: dict["FakeStream", int]) -> None:
        self.clock = clock


class FakeStream:
    """Operations in order, and the time of other streams that each comes after."""

    def __init__(self) -> None:
        self.clock: dict[FakeStream, int] = {self: 0}

    def record_event(self) -> Event:
        return Event(dict(self.clock))

    def wait_event(self, event: Event) -> None:
        for stream, time in event.clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))

    def wait_stream(self, stream: "FakeStream") -> None:
        self.wait_event(stream.record_event())


class Graph(TorchDispatchMode):
    """The captured operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._before.append((args[0], args[0].clone()))
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        return results

    def undo(self) -> None:
        """Capturing runs nothing: restore memory, and overwrite the results."""
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        for func, args, _, results in self.calls:
            if not func._schema.is_mutable:
                for tensor in _fresh(results, args):
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        self._before.clear()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                fresh = _fresh(results, args)
                for old, new in zip(fresh, _fresh(again, args), strict=True):
                    old.copy_(new)


def _fresh(results: Any, args: Any) -> list[Tensor]:
    """The tensors among an operation's results that are not views of its arguments."""
    given = {_memory(tensor) for tensor in tree_leaves(args) if _plain(tensor)}
    return [
        tensor for tensor in tree_leaves(results) if _plain(tensor) and _memory(tensor) not in given
    ]


def _plain(one: Any) -> bool:
    return isinstance(one, Tensor) and not one.is_mkldnn


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Cuda:
    """Has the functions of `torch.cuda` that the code under test calls.

    Attributes:
        captured: every graph, with the pool, the stream and the error mode it was captured with.
        capturing: whether a graph is being captured.
        synchronized: how often the host waited for all submitted work.
    """

    def __init__(self) -> None:
        self.main = FakeStream()
        self._current = [self.main]
        self._pools = self.synchronized = 0
        self.capturing = False
        self.captured: list[tuple[Graph, int, FakeStream, str]] = []

    def Stream(self, _: torch.device) -> FakeStream:  # noqa: N802 (as torch spells them)
        return FakeStream()

    def CUDAGraph(self) -> Graph:  # noqa: N802
        return Graph()

    def current_stream(self, _: Any = None) -> FakeStream:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        assert device.type == "cuda"
        yield

    def synchronize(self, _: Any = None) -> None:
        self.synchronized += 1

    def graph_pool_handle(self) -> int:
        self._pools += 1
        return self._pools

    @contextmanager
    def graph(
        self, graph: Graph, *, pool: int, stream: FakeStream, capture_error_mode: str
    ) -> Iterator[None]:
        self.captured.append((graph, pool, stream, capture_error_mode))
        self.capturing = True
        try:
            with self.stream(stream), graph:
                yield
        finally:
            graph.undo()
            self.capturing = False

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph, *_ in self.captured)


class Races(TorchDispatchMode):
    """Inside, every operation belongs to the current stream of ``cuda``.

    Attributes:
        unordered: operations that read or wrote memory written by an earlier one, or wrote memory
            read by an earlier one, without an order between them.
        streams: how many operations each stream had.
    """

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cuda = cuda
        self._reads: dict[int, dict[FakeStream, int]] = {}
        self._writes: dict[int, dict[FakeStream, int]] = {}
        self.unordered: list[str] = []
        self.streams: dict[FakeStream, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if self._cuda.capturing:
            return results
        stream = self._cuda.current_stream()
        stream.clock[stream] += 1
        self.streams[stream] = self.streams.get(stream, 0) + 1
        changes = func._schema.is_mutable
        new = func is torch.ops.aten.lift_fresh.default  # the host's numbers
        for index, arg in enumerate(() if new else args):
            for tensor in tree_leaves(arg):
                if _plain(tensor):
                    self._touch(str(func), tensor, stream, changes and index == 0)
        for tensor in [] if changes else _fresh(results, () if new else args):
            memory = _memory(tensor)
            self._reads.pop(memory, None)  # freed memory may be allocated again
            self._writes[memory] = {stream: stream.clock[stream]}
        return results

    def _touch(self, name: str, tensor: Tensor, stream: FakeStream, writes: bool) -> None:
        memory = _memory(tensor)
        before = dict(self._writes.get(memory, {}))
        if writes:
            before = {**self._reads.get(memory, {}), **before}
        for other, time in before.items():
            if stream.clock.get(other, 0) < time:
                self.unordered.append(name)
        kept = self._writes if writes else self._reads
        kept.setdefault(memory, {})[stream] = stream.clock[stream]


def lean_of(model: PairModel) -> DenseForward:
    forward = model._forward
    assert isinstance(forward, ClampedForward)
    assert isinstance(forward.forward, DenseForward)
    return forward.forward


def recording(model: PairModel, cuda: Cuda) -> PairModel:
    """The model as `compile` leaves it on a CUDA device, which ``cuda`` plays."""
    recorded = replace(model)
    forward = CudaGraphForward(lean_of(model), GraphRecorder(CUDA, cuda))
    forward.warm_up()
    recorded.__dict__["_forward"] = ClampedForward(recorded, forward)
    return recorded
