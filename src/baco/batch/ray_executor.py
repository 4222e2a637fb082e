"""Worker processes on a Ray cluster, as an executor of `concurrent.futures` and of jobs."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, TypeVar

from baco.batch.job import Advance, Map, Piece, Result, Worker, hand_out, start_worker
from baco.batch.ray_cluster import Share, go_to, last_line
from baco.errors import BacoError

R = TypeVar("R")
# Attempts at a call whose process is lost, and at starting a process.
MOST_ATTEMPTS = 5
# Time for threads to end after their processes, in seconds.
END_SECONDS = 10.0


class _Worker:
    """A process of the cluster."""

    def __init__(self, start: Callable[[], None], folder: str) -> None:
        go_to(folder)
        start()

    def ready(self) -> None:
        """Returns when the process has started."""

    def call(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R | BacoError:
        """The function's result, or the BacoError that it raises, to which Ray adds no trace."""
        try:
            return function(*arguments)
        except BacoError as error:
            return error


@dataclass(slots=True)
class _Call:
    number: int
    future: "Future[Any]"
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    attempts: int = 0

    def __lt__(self, other: "_Call") -> bool:
        return self.number < other.number


class ClusterPool(futures.Executor):
    """Calls functions in processes of a cluster, and repeats a call whose process is lost.

    Each free process that has started takes the oldest call. A process that still waits for room,
    for example after its machine was lost, therefore delays no call. Functions must return the same
    result each time.

    Args:
        share: of the cluster.
        start: called once in every process.
    """

    def __init__(self, share: Share, start: Callable[[], None]) -> None:
        import ray

        worker = ray.remote(max_restarts=0, **share.resources)(_Worker)
        self._begin: Callable[[], Any] = lambda: worker.remote(start, str(Path.cwd()))
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []
        self._numbers = itertools.count()
        self._workers: set[Any] = set()
        self._slots = share.workers
        self._ended: BaseException | None = None
        # Daemons: a command that is stopped does not wait for them.
        self._threads = [
            threading.Thread(target=self._serve, daemon=True) for _ in range(share.workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self, function: Callable[..., R], /, *arguments: Any, **keywords: Any
    ) -> "Future[R]":
        """Call a function; the future has its result or error.

        The error is a BacoError where the call's process is lost each time, or none starts.
        """
        if keywords:
            raise TypeError("a call on a cluster takes its arguments by place")
        future: Future[R] = Future()
        with self._changed:
            if self._ended is not None:
                raise self._ended
            heappush(self._waiting, _Call(next(self._numbers), future, function, arguments))
            self._changed.notify()
        return future

    def shutdown(
        self,
        wait: bool = True,  # noqa: ARG002 (as futures.Executor has it)
        *,
        cancel_futures: bool = False,  # noqa: ARG002
    ) -> None:
        """End the processes; calls without a result fail."""
        self._end(RuntimeError("this executor was shut down"))
        until = time.monotonic() + END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _serve(self) -> None:
        """Run one process after the other in one slot, each until it is lost."""
        from ray.exceptions import RayError

        failures = 0
        try:
            while (worker := self._started()) is not None:
                try:
                    _get(worker.ready.remote())
                except RayError as error:
                    failures += 1
                    if failures == MOST_ATTEMPTS:
                        self._give_up(error)
                        return
                else:
                    failures = 0
                    while (call := self._next_call()) is not None and self._run(call, worker):
                        pass
                self._drop(worker)
        except BaseException as error:
            self._end(error)
            raise

    def _started(self) -> Any:
        """A new process, which may have to wait for room; None at the end."""
        with self._changed:
            if self._ended is not None:
                return None
            worker = self._begin()
            self._workers.add(worker)
            return worker

    def _next_call(self) -> _Call | None:
        """The oldest call that is not cancelled; None at the end."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended is not None:
                    return None
                call = heappop(self._waiting)
                if call.future.running() or call.future.set_running_or_notify_cancel():
                    return call

    def _run(self, call: _Call, worker: Any) -> bool:
        """Make a call; False where its process is lost."""
        from ray.exceptions import RayError, RayTaskError

        try:
            # A process that was lost before the call counts for no attempt.
            _get(worker.ready.remote())
            call.attempts += 1
            result = _get(worker.call.remote(call.function, call.arguments))
        except RayError as error:
            if isinstance(error, RayTaskError):
                call.future.set_exception(error)
                return True
            self._retry(call)
            return False
        except Exception as error:  # arguments that cannot be sent
            call.future.set_exception(error)
            return True
        if isinstance(result, BacoError):
            call.future.set_exception(result)
        else:
            call.future.set_result(result)
        return True

    def _retry(self, call: _Call) -> None:
        with self._changed:
            if self._ended is not None:
                call.future.set_exception(self._ended)
            elif call.attempts < MOST_ATTEMPTS:
                heappush(self._waiting, call)
                self._changed.notify()
            else:
                call.future.set_exception(
                    BacoError(
                        f"{MOST_ATTEMPTS} processes were lost at the same work: out of memory? "
                        "Lower --max-rows or --memory; the same command continues the work"
                    )
                )

    def _drop(self, worker: Any) -> None:
        with self._changed:
            self._workers.discard(worker)
        _kill(worker)

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self._slots -= 1
        if not self._slots:
            self._end(BacoError(f"no process of the cluster starts: {last_line(error)}"))

    def _end(self, why: BaseException) -> None:
        """Wake all waiting threads, fail the waiting calls, and end the processes."""
        with self._changed:
            self._ended = self._ended or why
            waiting, self._waiting = self._waiting, []
            workers, self._workers = self._workers, set()
            self._changed.notify_all()
        for call in waiting:
            if call.future.running() or call.future.set_running_or_notify_cancel():
                call.future.set_exception(why)
        for worker in workers:
            _kill(worker)


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def _kill(worker: Any) -> None:
    import ray

    # The process or the cluster may be gone already.
    with suppress(Exception):
        ray.kill(worker)


class RayExecutor:
    """Carries out pieces of a job in processes of a cluster.

    Attributes:
        share: of the cluster.
    """

    def __init__(self, share: Share) -> None:
        self.share = share

    def call(self, function: Callable[[], R]) -> R:
        """The result of a function that is called in a process of the cluster.

        Raises:
            BacoError: as the function raises it, or the process is lost.
        """
        import ray

        try:
            result: R | BacoError = ray.get(
                ray.remote(**self.share.resources)(_call).remote(function, str(Path.cwd()))
            )
        except ray.exceptions.RayError as error:
            raise BacoError(
                f"a process of the cluster ended before its first answer: {last_line(error)}"
            ) from error
        if isinstance(result, BacoError):
            raise result
        return result

    @contextmanager
    def workers(
        self,
        worker: Worker[Piece, Result],
        advance: Advance | None = None,  # noqa: ARG002 (the caller counts results)
        *,
        ordered: bool = True,
    ) -> Iterator[Map[Piece, Result]]:
        """See `baco.batch.job.Executor`."""
        with cluster_pool(self.share, partial(start_worker, worker)) as executor:
            yield partial(hand_out, executor, self.share.workers, ordered)


def _call(function: Callable[[], R], folder: str) -> R | BacoError:
    go_to(folder)
    try:
        return function()
    except BacoError as error:
        return error


@contextmanager
def cluster_pool(share: Share, start: Callable[[], None]) -> Iterator[futures.Executor]:
    """Processes of a cluster that have called a function, ended with the block."""
    executor = ClusterPool(share, start)
    try:
        yield executor
    finally:
        executor.shutdown()
