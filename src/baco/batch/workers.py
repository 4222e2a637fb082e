"""Worker processes: work shared out over the cores, results in the order of the work."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Work handed out ahead of the oldest result not yet there, for every worker.
AHEAD = 2


@contextmanager
def pool(workers: int, start: Callable[[], None]) -> Iterator[Executor | None]:
    """So many processes, each of which has called `start`; None for one: this very process."""
    if workers == 1:
        yield None
        return
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _start, (start,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _start(start: Callable[[], None]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def in_order(
    executor: Executor | None, function: Callable[[T], R], work: Iterable[T], workers: int
) -> Iterator[R]:
    """`function` of every piece of work, in order; no more than a few pieces are under way."""
    if executor is None:
        yield from map(function, work)
        return
    under_way: deque[Future[R]] = deque()
    for piece in work:
        under_way.append(executor.submit(function, piece))
        if len(under_way) >= workers * AHEAD:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
