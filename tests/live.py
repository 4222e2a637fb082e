"""Memory that is alive: bytes of the tensors that a piece of work allocates, and their peak."""

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from baco.engine.engine import Engine
from baco.engine.sequence import Request, SequenceState


@dataclass
class LiveStorages:
    """Bytes of the recorded storages that are alive, and their peak."""

    alive: dict[int, int] = field(default_factory=dict)
    peak: int = 0

    @property
    def now(self) -> int:
        return sum(self.alive.values())

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key)
            self.peak = max(self.peak, self.now)


@contextmanager
def cache_tables() -> Iterator[LiveStorages]:
    """Record every table of a cache that is allocated inside: caches allocate them by
    ``new_zeros``, and only these tensors have four dimensions.
    """
    log, make = LiveStorages(), Tensor.new_zeros

    def new_zeros(self: Tensor, *size: Any, **options: Any) -> Tensor:
        table = make(self, *size, **options)
        if table.dim() == 4:
            log.enter(table)
        return table

    Tensor.new_zeros = new_zeros  # type: ignore[method-assign, assignment]
    try:
        yield log
    finally:
        Tensor.new_zeros = make  # type: ignore[method-assign]


class _AllocationMode(TorchDispatchMode):
    """Records the tensors that operations allocate, except cache tables and views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = LiveStorages()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(part) for part in tree_iter((args, kwargs)) if isinstance(part, Tensor)}
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_zeros.default and results.dim() == 4:
            return results
        for part in tree_iter(results):
            if isinstance(part, Tensor) and _key(part) not in given:
                self.live.enter(part)
        return results


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # weights in a layout of oneDNN's own
        return id(tensor)


def most_allocated(work: Callable[[], Any]) -> int:
    """Peak bytes of the tensors and arrays that a piece of work allocates, except cache tables."""
    tracemalloc.start()
    try:
        mode = _AllocationMode()
        with mode:
            work()
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return mode.live.peak + arrays


def needed(engine: Engine, request: Request, rows: int) -> int:
    """Memory that an engine counts for ``rows`` rows of one request when nothing else runs."""
    scheduler = engine._scheduler
    room = min(engine._runner.prompt_room(request).values())
    answer = SequenceState(request, 0, min(request.params.max_tokens, room))
    return scheduler.budget.total(scheduler._needs([answer], [answer]), rows=rows)


def step_bytes(engine: Engine, positions: int | None = None) -> int:
    """What an engine counts for the tensors of a step of its rows, which decides so many positions
    of each, or as many as it may.
    """
    scheduler = engine._scheduler
    needs = scheduler._needs(engine._batch.rows, scheduler._next_samples(), scheduler._text())
    return scheduler.budget.step(needs, needs.rows, positions or scheduler.max_positions)


def record_positions(engine: Engine) -> list[int]:
    """What an engine decides from now on: the most positions of a row, step by step."""
    counts: list[int] = []
    propose = engine._proposer.propose

    def drafted(most: int) -> Any:
        draft = propose(most)
        counts.append(draft.positions.most)
        return draft

    engine._proposer.propose = drafted  # type: ignore[method-assign, assignment]
    return counts
