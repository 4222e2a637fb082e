"""The thread that owns the decoder. Other threads submit and cancel jobs, which it decodes.

Prompts are rendered and tokenised in threads of their own. Between two steps the engine thread
starts and cancels a bounded number of answers, so that running answers are not delayed.

This module knows nothing of HTTP. A prompt that breaks a step fails alone (`IsolatingEngine`). If
the decoder itself fails, all its jobs end and the next job gets a new decoder.
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

log = logging.getLogger("baco.serve")

# Answers that are started or cancelled between two steps. A single request may have more.
MAX_ANSWERS_PER_STEP = 64
# Prompts of more characters are prepared in a thread of their own, so that they do not delay short
# ones.
_LONG = 2**16


Submit = Callable[[Decoder], int]
Deliver = Callable[[Chunk | Scored | Exception], None]
# Gets a function to call between pieces of work, which raises if the job was cancelled.
Prepare = Callable[[Callable[[], None]], None]


@dataclass(eq=False, slots=True)
class Job:
    """A prompt, and where its results go.

    Attributes:
        submit: gives the prompt to a decoder and returns its ticket.
        deliver: called in the engine thread with every result. An exception is the last one.
        prepare: called before, in another thread.
        size: characters to prepare; long prompts do not delay short ones.
        compiles: preparing it compiles a structure, which delays no other prompts.
        answers: how many are asked for.
        ticket: in the decoder; None before it is submitted.
    """

    submit: Submit
    deliver: Deliver
    prepare: Prepare | None = None
    size: int = 0
    answers: int = 1
    compiles: bool = False
    ticket: int | None = None


class QueueFullError(Exception):
    """The limit on open prompts is reached."""


class JobCancelledError(Exception):
    """A job was cancelled while its prompt was prepared."""


class ClosedError(Exception):
    """The engine thread is closing and accepts no jobs."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine thread is, and how many draft tokens were accepted.

    Attributes:
        waiting: answers that have no row in the batch yet.
        running: answers in the batch.
        drafted: draft tokens since the start.
        accepted: accepted ones.
    """

    waiting: int = 0
    running: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class EngineThread:
    """Steps a decoder while there is work.

    Attributes:
        make: builds a decoder; called in the engine thread.
        max_open: limit on open jobs, waiting ones included.
        load: after the latest step.
    """

    make: Callable[[], Decoder]
    max_open: int
    load: Load = field(default_factory=Load, init=False)
    # Functions to call in the engine thread, each with the number of answers it concerns.
    _work: SimpleQueue[tuple[int, Callable[[], None]]] = field(
        default_factory=SimpleQueue, init=False
    )
    _open: set[Job] = field(default_factory=set, init=False)
    _closing: bool = field(default=False, init=False)
    _decoder: Decoder | None = field(default=None, init=False)
    _jobs: dict[int, Job] = field(default_factory=dict, init=False)
    _previous: Load = field(default_factory=Load, init=False)
    _stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._short, self._long, self._structured = (
            ThreadPoolExecutor(1, f"baco-{name}-prompts")
            for name in ("short", "long", "structured")
        )
        self._thread = threading.Thread(target=self._run, name="baco-decoder", daemon=True)
        self._thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs from any thread, all or none. Later errors are delivered to the jobs.

        Raises:
            QueueFullError: more than ``max_open`` jobs would be open.
            ClosedError: the engine thread is closing.
        """
        new = list(jobs)
        with self._changed:
            if self._closing:
                raise ClosedError
            if self.open + len(new) > self.max_open:
                raise QueueFullError
            self._open.update(new)
        for job in new:
            if job.prepare is None:
                self._enqueue(job, self._start)
            else:
                executor = self._long if job.size > _LONG else self._short
                if job.compiles:
                    executor = self._structured
                executor.submit(self._prepare, job)

    def cancel(self, job: Job) -> None:
        """Cancel a job from any thread. Its rows leave the batch before the next step."""
        if job in self._open:
            self._enqueue(job, self._cancel_job)

    def drain(self) -> None:
        """Accept no more jobs; open jobs continue."""
        with self._changed:
            self._closing = True

    def close(self, grace: float = 0) -> None:
        """Accept no more jobs. Stop once all have ended, or after ``grace`` seconds.

        Jobs that are still open then end with a `ClosedError`.
        """
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: not self.open, grace)
        self._work.put((0, self._stop))
        self._thread.join()
        for executor in (self._short, self._long, self._structured):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def open(self) -> int:
        """Jobs that have not ended."""
        return len(self._open)

    @property
    def closing(self) -> bool:
        """Whether it accepts no more jobs."""
        return self._closing

    def _enqueue(self, job: Job, work: Callable[[Job], None]) -> None:
        """Call ``work`` with a job in the engine thread."""
        self._work.put((job.answers, partial(work, job)))

    def _prepare(self, job: Job) -> None:
        """Prepare a job in a thread for prompts, then start it; an error ends it."""

        def check_open() -> None:
            if job not in self._open:
                raise JobCancelledError

        assert job.prepare is not None
        try:
            check_open()
            job.prepare(check_open)
        except JobCancelledError:
            return
        except Exception as error:
            self._enqueue(job, partial(self._fail, error=error))
            return
        self._enqueue(job, self._start)

    def _run(self) -> None:
        while not self._stopped:
            self._run_queued()
            if self._busy:
                self._step()
            self._update_load()

    def _run_queued(self) -> None:
        """Do queued work for a bounded number of answers; wait for work when idle."""
        done = 0
        while done < MAX_ANSWERS_PER_STEP and not self._stopped:
            try:
                answers, work = self._work.get(block=not self._busy and not done)
            except Empty:
                return
            work()
            done += max(1, answers)

    @property
    def _busy(self) -> bool:
        return self._decoder is not None and self._decoder.busy

    def _step(self) -> None:
        assert self._decoder is not None
        try:
            chunks = self._decoder.step()
        except Exception as error:
            self._discard_decoder(error)
            return
        results: list[Chunk | Scored] = [*chunks, *self._decoder.scored()]
        for result in results:
            self._deliver(result)
        # After all are delivered: several answers to a prompt may end in one step.
        for ticket in {result.prompt for result in results} & self._jobs.keys():
            if not self._decoder.holds(ticket):
                self._remove(self._jobs[ticket])

    def _discard_decoder(self, error: Exception) -> None:
        """End all jobs of a failed decoder."""
        log.error("the decoder failed", exc_info=error)
        jobs = list(self._jobs.values())
        self._update_load()
        self._previous = Load(drafted=self.load.drafted, accepted=self.load.accepted)
        assert self._decoder is not None
        try:
            self._decoder.close()  # an engine elsewhere would keep running beside the next decoder
        except Exception:
            log.exception("the failed decoder could not be closed")
        self._decoder = None
        self._jobs.clear()
        for job in jobs:
            job.ticket = None
            self._fail(job, error)

    def _start(self, job: Job) -> None:
        if job not in self._open:
            return
        try:
            if self._decoder is None:
                self._decoder = self.make()
            job.ticket = job.submit(self._decoder)
        except Exception as error:
            self._fail(job, error)
            return
        self._jobs[job.ticket] = job

    def _cancel_job(self, job: Job) -> None:
        if job in self._open:
            self._remove(job)

    def _deliver(self, result: Chunk | Scored) -> None:
        job = self._jobs.get(result.prompt)
        if job is None:
            return
        try:
            job.deliver(result)
        except Exception:
            log.exception("an answer could not be delivered")
            self._cancel_job(job)

    def _fail(self, job: Job, error: Exception) -> None:
        if job not in self._open:
            return
        self._remove(job)
        try:
            job.deliver(error)
        except Exception:
            log.exception("an error could not be delivered")

    def _remove(self, job: Job) -> None:
        if job.ticket is not None and self._jobs.pop(job.ticket, None) is not None:
            assert self._decoder is not None
            self._decoder.cancel(job.ticket)
        with self._changed:
            self._open.discard(job)
            self._changed.notify_all()

    def _stop(self) -> None:
        for job in list(self._open):
            self._fail(job, ClosedError())
        self._stopped = True

    def _update_load(self) -> None:
        if self._decoder is None:
            self.load = Load(0, 0, self._previous.drafted, self._previous.accepted)
            return
        stats = self._decoder.engine.stats
        self.load = Load(
            self._decoder.waiting,
            self._decoder.running,
            self._previous.drafted + stats.drafted,
            self._previous.accepted + stats.accepted,
        )
