"""A CUDA device that is not there: streams, events and graphs, played on a CPU by their rules.

A graph holds operations as they were called while it was captured, on the very tensors, and calls
them again when it is replayed; capturing leaves no trace in memory. Operations carry the time of
their stream, so that two which touch the same memory and are in no order can be told (`Races`).
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
    """What a stream had been told when it was made."""

    def __init__(self, clock: dict["FakeStream", int]) -> None:
        self.clock = clock


class FakeStream:
    """Operations in order, and what each comes after on other streams."""

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
    """Operations that were captured."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._before.append((args[0], args[0].clone()))
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, made))
        return made

    def undo(self) -> None:
        """Capturing runs nothing: put memory back as it was, and spoil what was made."""
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        for func, args, _, made in self.calls:
            if not func._schema.is_mutable:
                for one in _fresh(made, args):
                    one.fill_(torch.nan if one.is_floating_point() else 0)
        self._before.clear()

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            if not func._schema.is_mutable:
                fresh = _fresh(made, args)
                for old, new in zip(fresh, _fresh(again, args), strict=True):
                    old.copy_(new)


def _fresh(made: Any, args: Any) -> list[Tensor]:
    """Of the tensors that an operation made, those that are no views of what it was given."""
    given = {_memory(one) for one in tree_leaves(args) if _plain(one)}
    return [one for one in tree_leaves(made) if _plain(one) and _memory(one) not in given]


def _plain(one: Any) -> bool:
    return isinstance(one, Tensor) and not one.is_mkldnn


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Cuda:
    """What `torch.cuda` is to who is given it.

    Attributes:
        captured: every graph, with the pool, the stream and the error mode it was captured with.
        capturing: is one being captured now?
        synchronized: how often the host waited for all that was told.
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
    """While it is entered, every operation is one of the current stream of ``cuda``.

    Attributes:
        found: operations that touched what an earlier one had written, or wrote what one had read,
            in no order with it.
        streams: how many operations each stream had.
    """

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cuda = cuda
        self._reads: dict[int, dict[FakeStream, int]] = {}
        self._writes: dict[int, dict[FakeStream, int]] = {}
        self.found: list[str] = []
        self.streams: dict[FakeStream, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self._cuda.capturing:
            return made
        stream = self._cuda.current_stream()
        stream.clock[stream] += 1
        self.streams[stream] = self.streams.get(stream, 0) + 1
        changes = func._schema.is_mutable
        new = func is torch.ops.aten.lift_fresh.default  # the host's numbers
        for index, arg in enumerate(() if new else args):
            for tensor in tree_leaves(arg):
                if _plain(tensor):
                    self._touch(str(func), tensor, stream, changes and index == 0)
        for tensor in [] if changes else _fresh(made, () if new else args):
            memory = _memory(tensor)
            self._reads.pop(memory, None)  # it was somebody else's before
            self._writes[memory] = {stream: stream.clock[stream]}
        return made

    def _touch(self, name: str, tensor: Tensor, stream: FakeStream, writes: bool) -> None:
        memory = _memory(tensor)
        before = dict(self._writes.get(memory, {}))
        if writes:
            before = {**self._reads.get(memory, {}), **before}
        for other, time in before.items():
            if stream.clock.get(other, 0) < time:
                self.found.append(name)
        kept = self._writes if writes else self._reads
        kept.setdefault(memory, {})[stream] = stream.clock[stream]


def lean_of(model: PairModel) -> DenseForward:
    forward = model._forward
    assert isinstance(forward, ClampedForward)
    assert isinstance(forward.forward, DenseForward)
    return forward.forward


def recording(model: PairModel, cuda: Cuda) -> PairModel:
    """The model as `compile` leaves it on a CUDA device, which ``cuda`` plays."""
    made = replace(model)
    forward = CudaGraphForward(lean_of(model), GraphRecorder(CUDA, cuda))
    forward.warm_up()
    made.__dict__["_forward"] = ClampedForward(made, forward)
    return made
