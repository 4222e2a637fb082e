"""What is alive: bytes of tensors that a piece of work makes, and the most there ever were."""

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
class AccessLog:
    """Bytes of some storages that are alive, and the most there ever were."""

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
def cache_tables() -> Iterator[AccessLog]:
    """Inside, every table of a cache is entered: they are made by ``new_zeros``, and what has four
    dimensions is one.
    """
    found, make = AccessLog(), Tensor.new_zeros

    def new_zeros(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = make(self, *size, **options)
        if made.dim() == 4:
            found.enter(made)
        return made

    Tensor.new_zeros = new_zeros  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        Tensor.new_zeros = make  # type: ignore[method-assign]


class _Made(TorchDispatchMode):
    """Enters what operations make, but for cache tables and views of what was there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = AccessLog()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(part) for part in tree_iter((args, kwargs)) if isinstance(part, Tensor)}
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_zeros.default and made.dim() == 4:
            return made
        for part in tree_iter(made):
            if isinstance(part, Tensor) and _key(part) not in given:
                self.ledger.enter(part)
        return made


def _key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # weights in a layout of oneDNN's own
        return id(tensor)


def most_made(work: Callable[[], Any]) -> int:
    """The most bytes of tensors and arrays that were alive at a time of those that some work made,
    but for tables of caches.
    """
    tracemalloc.start()
    try:
        made = _Made()
        with made:
            work()
        arrays = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return made.ledger.peak + arrays


def needed(engine: Engine, asked: Request, rows: int) -> int:
    """Memory that an engine counts for so many rows of a request, and nothing else."""
    scheduler = engine._scheduler
    answer = SequenceState(
        asked, 0, min(asked.params.max_tokens, engine._runner.prompt_room(asked))
    )
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
    found: list[int] = []
    propose = engine._proposer.propose

    def drafted(most: int) -> Any:
        draft = propose(most)
        found.append(draft.positions.most)
        return draft

    engine._proposer.propose = drafted  # type: ignore[method-assign, assignment]
    return found
