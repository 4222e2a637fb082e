"""The one thread that owns the decoder: it admits, steps and cancels what other threads ask for.

It knows nothing of HTTP. A prompt that breaks a step ends alone: the decoder's engine sees to that.
Where the decoder itself fails, all its jobs end, and the next one gets another decoder.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from baco.completion import Chunk
from baco.decoder import Decoder
from baco.serve.job import Job

log = logging.getLogger("baco.serve")

T = TypeVar("T")


class QueueFullError(Exception):
    """More prompts are open than the driver was told to hold."""


class ClosedError(Exception):
    """The driver takes no more jobs."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a driver is, and what its drafts came to.

    Attributes:
        waiting, running: answers without and with a row in the batch.
        drafted, accepted: tokens since the start.
    """

    waiting: int = 0
    running: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class Driver:
    """Steps a decoder for as long as there is work.

    Attributes:
        make: builds an empty decoder; called in the thread that owns it.
        most: how many jobs may be open at once, waiting ones included.
        load: how it was after the latest step.
    """

    make: Callable[[], Decoder]
    most: int
    load: Load = field(default_factory=Load, init=False)
    _asked: SimpleQueue[Callable[[], None]] = field(default_factory=SimpleQueue, init=False)
    _open: set[Job] = field(default_factory=set, init=False)
    _closing: bool = field(default=False, init=False)
    _decoder: Decoder | None = field(default=None, init=False)
    _jobs: dict[int, Job] = field(default_factory=dict, init=False)
    _past: Load = field(default_factory=Load, init=False)
    _stopped: bool = field(default=False, init=False)
    _calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="baco-decoder", daemon=True)
        self._thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs from any thread, all or none; what goes wrong later is delivered.

        Raises:
            QueueFullError: more would be open than may be.
            ClosedError: the driver is being closed.
        """
        new = list(jobs)
        with self._changed:
            if self._closing:
                raise ClosedError
            if self.open + len(new) > self.most:
                raise QueueFullError
            self._open.update(new)
        for job in new:
            self._asked.put(lambda job=job: self._take(job))  # type: ignore[misc]

    def call(self, work: Callable[[], T]) -> "Future[T]":
        """Have something done in the decoder's thread, between two of its steps.

        Raises:
            QueueFullError: more would be open than may be.
            ClosedError: the driver is being closed.
        """
        with self._changed:
            if self._closing:
                raise ClosedError
            if self.open >= self.most:
                raise QueueFullError
            self._calls += 1
        told: Future[T] = Future()
        self._asked.put(lambda: self._do(work, told))
        return told

    def cancel(self, job: Job) -> None:
        """Give a job up from any thread; its rows leave the batch before the next step."""
        if job in self._open:
            self._asked.put(lambda: self._give_up(job))

    def drain(self) -> None:
        """Take no more jobs; the open ones go on."""
        with self._changed:
            self._closing = True

    def close(self, grace: float = 0) -> None:
        """Take no more jobs and stop the thread once all are ended, or after ``grace`` seconds.

        A job that is still open then is told so with a `ClosedError`.
        """
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: not self.open, grace)
        self._asked.put(self._stop)
        self._thread.join()

    @property
    def open(self) -> int:
        """Jobs and calls that have not ended."""
        return len(self._open) + self._calls

    @property
    def closing(self) -> bool:
        """Has it been told to take no more jobs?"""
        return self._closing

    def _run(self) -> None:
        while not self._stopped:
            if not self._asked.empty() or not self._busy:
                self._asked.get()()
            else:
                self._step()
            self._measure()

    @property
    def _busy(self) -> bool:
        return self._decoder is not None and self._decoder.busy

    def _step(self) -> None:
        assert self._decoder is not None
        try:
            chunks = self._decoder.step()
        except Exception as error:
            self._give_up_decoder(error)
            return
        for chunk in chunks:
            self._tell(chunk)
        # Only now: several answers to a prompt may end in one step.
        for ticket in {chunk.prompt for chunk in chunks} & self._jobs.keys():
            if not self._decoder.holds(ticket):
                self._forget(self._jobs[ticket])

    def _give_up_decoder(self, error: Exception) -> None:
        """End all jobs of a decoder that failed."""
        log.error("the decoder failed", exc_info=error)
        jobs = list(self._jobs.values())
        self._measure()
        self._past = Load(drafted=self.load.drafted, accepted=self.load.accepted)
        assert self._decoder is not None
        try:
            self._decoder.close()  # an engine elsewhere would go on beside the next decoder
        except Exception:
            log.exception("the failed decoder could not be closed")
        self._decoder = None
        self._jobs.clear()
        for job in jobs:
            job.ticket = None
            self._end(job, error)

    def _take(self, job: Job) -> None:
        if job not in self._open:
            return
        try:
            if self._decoder is None:
                self._decoder = self.make()
            job.ticket = job.submit(self._decoder)
        except Exception as error:
            self._end(job, error)
            return
        self._jobs[job.ticket] = job

    def _do(self, work: Callable[[], T], told: "Future[T]") -> None:
        if told.set_running_or_notify_cancel():
            try:
                told.set_result(work())
            except Exception as error:
                told.set_exception(error)
        with self._changed:
            self._calls -= 1
            self._changed.notify_all()

    def _give_up(self, job: Job) -> None:
        if job in self._open:
            self._forget(job)

    def _tell(self, chunk: Chunk) -> None:
        job = self._jobs.get(chunk.prompt)
        if job is None:
            return
        try:
            job.deliver(chunk)
        except Exception:
            log.exception("nobody takes an answer any more")
            self._give_up(job)

    def _end(self, job: Job, error: Exception) -> None:
        self._give_up(job)
        try:
            job.deliver(error)
        except Exception:
            log.exception("nobody takes an error any more")

    def _forget(self, job: Job) -> None:
        if job.ticket is not None and self._jobs.pop(job.ticket, None) is not None:
            assert self._decoder is not None
            self._decoder.cancel(job.ticket)
        with self._changed:
            self._open.discard(job)
            self._changed.notify_all()

    def _stop(self) -> None:
        for job in list(self._open):
            self._end(job, ClosedError())
        self._stopped = True

    def _measure(self) -> None:
        if self._decoder is None:
            self.load = Load(0, 0, self._past.drafted, self._past.accepted)
            return
        stats = self._decoder.engine.stats
        self.load = Load(
            self._decoder.waiting,
            self._decoder.running,
            self._past.drafted + stats.drafted,
            self._past.accepted + stats.accepted,
        )
