"""Worker processes on a Ray cluster behind the standard library's `Executor`."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from baco.cluster.connection import Share, go_to
from baco.errors import BacoError

R = TypeVar("R")
# So often may a piece of work take its process or machine down before it is given up; while a
# machine is being missed, every try to reach it counts.
MOST_RETRIES = 100


class _Worker:
    """A process of the cluster."""

    def __init__(self, start: Callable[[], None], folder: str) -> None:
        go_to(folder)
        start()

    def call(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R | BacoError:
        """What the function gives; what it refuses comes back as it is, not as a failure."""
        try:
            return function(*arguments)
        except BacoError as error:
            return error


class ClusterExecutor(Executor):
    """Calls functions in the processes of a cluster; a call whose process is lost is made again.

    So functions must give the same however often they are called.
    """

    def __init__(self, share: Share, start: Callable[[], None]) -> None:
        """Args:
        share: of the cluster.
        start: called once in every process.
        """
        import ray

        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": MOST_RETRIES}
        worker = ray.remote(**options, **share.resources)(_Worker)
        self._workers = [worker.remote(start, str(Path.cwd())) for _ in range(share.workers)]
        self._busy = [0] * share.workers
        self._lock = threading.Lock()

    def submit(
        self, function: Callable[..., R], /, *arguments: Any, **keywords: Any
    ) -> "Future[R]":
        """Hand a call to the worker with the least to do."""
        if keywords:
            raise TypeError("a call on a cluster takes its arguments by place")
        with self._lock:
            place = self._busy.index(min(self._busy))
            self._busy[place] += 1
        future: Future[R] = Future()
        asked = self._workers[place].call.remote(function, arguments).future()
        asked.add_done_callback(lambda done: self._settle(done, future, place))
        return future

    def _settle(self, done: "Future[Any]", future: "Future[R]", place: int) -> None:
        with self._lock:
            self._busy[place] -= 1
        if not future.set_running_or_notify_cancel():
            return
        error = done.exception()
        if error is not None:
            future.set_exception(error)
        elif isinstance(done.result(), BacoError):
            future.set_exception(done.result())
        else:
            future.set_result(done.result())

    def shutdown(
        self,
        wait: bool = True,  # noqa: ARG002 (as Executor has it)
        *,
        cancel_futures: bool = False,  # noqa: ARG002
    ) -> None:
        """End the processes; whoever wants results has waited for them."""
        import ray

        for worker in self._workers:
            ray.kill(worker)


@contextmanager
def cluster_pool(share: Share, start: Callable[[], None]) -> Iterator[Executor]:
    """Processes of a cluster, as :func:`baco.evaluation.workers.pool` has them on this machine."""
    executor = ClusterExecutor(share, start)
    try:
        yield executor
    finally:
        executor.shutdown()
