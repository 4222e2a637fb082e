"""The one thread that owns the decoder: it admits, steps and cancels what other threads ask for.

Prompts are rendered and tokenised in threads of their own. Between two steps it takes up a bounded
number of requests, so that neither many of them nor long ones keep running answers waiting.

It knows nothing of HTTP. A prompt that breaks a step ends alone: the decoder's engine sees to that.
Where the decoder itself fails, all its jobs end, and the next one gets another decoder.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from baco.decoder import Decoder, Scored
from baco.outputs import Chunk
from baco.serve.job import Job

log = logging.getLogger("baco.serve")

# Answers that are taken up, or given up, between two steps; one request may be of more.
MOST_TAKEN = 64
# Characters of a prompt that counts as long: these are prepared one after the other, apart from
# the others.
_LONG = 2**16


class QueueFullError(Exception):
    """More prompts are open than the driver was told to hold."""


class GivenUpError(Exception):
    """A job was given up while it was prepared."""


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
class EngineThread:
    """Steps a decoder for as long as there is work.

    Attributes:
        make: builds an empty decoder; called in the thread that owns it.
        most: how many jobs may be open at once, waiting ones included.
        load: how it was after the latest step.
    """

    make: Callable[[], Decoder]
    most: int
    load: Load = field(default_factory=Load, init=False)
    # What is to be done in the decoder's thread, and how many answers it is about.
    _asked: SimpleQueue[tuple[int, Callable[[], None]]] = field(
        default_factory=SimpleQueue, init=False
    )
    _open: set[Job] = field(default_factory=set, init=False)
    _closing: bool = field(default=False, init=False)
    _decoder: Decoder | None = field(default=None, init=False)
    _jobs: dict[int, Job] = field(default_factory=dict, init=False)
    _past: Load = field(default_factory=Load, init=False)
    _stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._short, self._long = (
            ThreadPoolExecutor(1, f"baco-{name}-prompts") for name in ("short", "long")
        )
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
            if job.prepare is None:
                self._ask(job, self._take)
            else:
                lane = self._long if job.size > _LONG else self._short
                lane.submit(self._prepare, job)

    def cancel(self, job: Job) -> None:
        """Give a job up from any thread; its rows leave the batch before the next step."""
        if job in self._open:
            self._ask(job, self._give_up)

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
        self._asked.put((0, self._stop))
        self._thread.join()
        for lane in (self._short, self._long):
            lane.shutdown(wait=False, cancel_futures=True)

    @property
    def open(self) -> int:
        """Jobs that have not ended."""
        return len(self._open)

    @property
    def closing(self) -> bool:
        """Has it been told to take no more jobs?"""
        return self._closing

    def _ask(self, job: Job, work: Callable[[Job], None]) -> None:
        """Have something done for a job in the decoder's thread."""
        self._asked.put((job.answers, partial(work, job)))

    def _prepare(self, job: Job) -> None:
        """Prepare a job, in a thread for that, and have it taken; what goes wrong ends it."""

        def going_on() -> None:
            if job not in self._open:
                raise GivenUpError

        assert job.prepare is not None
        try:
            going_on()
            job.prepare(going_on)
        except GivenUpError:
            return
        except Exception as error:
            self._ask(job, partial(self._end, error=error))
            return
        self._ask(job, self._take)

    def _run(self) -> None:
        while not self._stopped:
            self._take_up()
            if self._busy:
                self._step()
            self._measure()

    def _take_up(self) -> None:
        """Do what was asked, in order, but no more than a bounded amount; wait for something to do
        where there is nothing.
        """
        taken = 0
        while taken < MOST_TAKEN and not self._stopped:
            try:
                answers, work = self._asked.get(block=not self._busy and not taken)
            except Empty:
                return
            work()
            taken += max(1, answers)

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
        told: list[Chunk | Scored] = [*chunks, *self._decoder.scored()]
        for chunk in told:
            self._tell(chunk)
        # Only now: several answers to a prompt may end in one step.
        for ticket in {chunk.prompt for chunk in told} & self._jobs.keys():
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

    def _give_up(self, job: Job) -> None:
        if job in self._open:
            self._forget(job)

    def _tell(self, chunk: Chunk | Scored) -> None:
        job = self._jobs.get(chunk.prompt)
        if job is None:
            return
        try:
            job.deliver(chunk)
        except Exception:
            log.exception("nobody takes an answer any more")
            self._give_up(job)

    def _end(self, job: Job, error: Exception) -> None:
        if job not in self._open:
            return
        self._forget(job)
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
