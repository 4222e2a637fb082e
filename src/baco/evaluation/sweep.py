"""The sweep: every method on every task with every pair, into a run directory.

A sweep continues an earlier one of the same plan after its last whole job. So every prompt is
decoded in the same batch as without the interruption, and the samples are the same, byte for byte.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import psutil
import torch
from transformers.utils import logging as transformers_logging

from baco.api import Baco
from baco.batch.job import (
    Advance,
    Executor,
    LocalExecutor,
    Progress,
    append,
    carry_out,
    count_matching,
    cut_back,
    line,
)
from baco.device import cores, keep_memory
from baco.evaluation.methods import Answer, answer
from baco.evaluation.plan import ANSWERS_A_JOB, Job, PairSpec, Plan
from baco.evaluation.records import Sample
from baco.evaluation.store import Run, sample_line
from baco.files import locked

# Share of free memory that the weights of all workers' pairs can take.
WEIGHTS_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Done:
    """A job's samples, prompt by prompt, and the seconds they took."""

    job: Job
    rows: list[list[Answer]]
    seconds: float

    @property
    def prompts(self) -> int:
        """Prompts that were answered."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.tokens for row in self.rows for answer in row)


def sweep(
    run: Run, plan: Plan, executor: Executor | None = None, progress: Progress | None = None
) -> None:
    """Draw the samples of the plan that the run does not have yet.

    Args:
        run: from :func:`baco.evaluation.store.begin`, with the configuration of this plan.
        plan: all samples of the run.
        executor: carries out the jobs; None: this process. Every process has its own copy of the
            pair.
        progress: receives the prompts of an earlier sweep, then those of this one.

    Raises:
        BacoError: a pair that cannot be loaded, a prompt that does not fit, a judge that fails;
            the samples before it are kept.
    """
    with locked(run.path):
        for _ in carry_out(_Samples(run, plan), Drawer, executor or LocalExecutor(), progress):
            pass


@dataclass(frozen=True, slots=True)
class _Samples:
    """The samples of a run, as the output of a job."""

    run: Run
    plan: Plan
    ordered = True

    def missing(self) -> tuple[list[Job], int]:
        """See `baco.batch.job.Output`."""
        jobs = resume(self.run, self.plan)
        prompts = sum(len(task.prompts) for task in self.plan.tasks)
        total = len(self.plan.pairs) * len(self.plan.settings) * prompts
        return jobs, total - sum(len(job.prompts) for job in jobs)

    def keep(self, result: Done) -> None:
        """See `baco.batch.job.Output`."""
        _write(self.run, result)


def resume(run: Run, plan: Plan) -> list[Job]:
    """The jobs that are left.

    Rows are checked, not counted. Rows that do not match the plan, and those of an unfinished job,
    are cut off and drawn again.
    """
    samples, speed = run.path / "samples.jsonl", run.path / "speed.jsonl"
    jobs = list(plan.jobs())
    present = count_matching(samples, _expected(jobs, plan.n))
    whole, prompts, done = 0, 0, 0
    for job in jobs:
        if whole + len(job.prompts) * plan.n > present:
            break
        whole += len(job.prompts) * plan.n
        prompts += len(job.prompts)
        done += 1
    cut_back(samples, whole)
    cut_back(speed, count_matching(speed, islice(_groups(jobs), prompts)))
    # Templates that read the clock get the day on which the run began.
    day = {"date": run.config["made"]["date"]} if "date" in run.config["made"] else {}
    return [
        replace(job, pair=replace(job.pair, options={**day, **job.pair.options}))
        for job in islice(jobs, done, None)
    ]


def _groups(jobs: Iterable[Job]) -> Iterator[dict[str, Any]]:
    """The fields that identify each prompt's rows, in the order of the plan."""
    for job in jobs:
        for prompt in job.prompts:
            yield _of(job) | {"prompt": prompt.id}


def _expected(jobs: Iterable[Job], n: int) -> Iterator[dict[str, Any]]:
    """The fields that identify each sample, in the order of the plan."""
    for group in _groups(jobs):
        for sample in range(n):
            yield group | {"sample": sample}


def _of(job: Job) -> dict[str, Any]:
    return {
        "pair": job.pair.name,
        "task": job.task,
        "method": job.setting.method,
        "setting": job.setting.label,
    }


def _write(run: Run, done: Done) -> None:
    """Append a job. Speed goes first: after a kill in between, `resume` cuts it back."""
    job = done.job
    # Prompts are answered together, so each has an equal share of the time.
    seconds = round(done.seconds / len(done.rows), 6)
    append(
        run.path / "speed.jsonl",
        (
            line(
                {
                    **_of(job),
                    "prompt": prompt.id,
                    "seconds": seconds,
                    "tokens": sum(answer.tokens for answer in row),
                }
            )
            for prompt, row in zip(job.prompts, done.rows, strict=True)
        ),
    )
    append(run.path / "samples.jsonl", map(sample_line, samples_of(done)))


def samples_of(done: Done) -> Iterator[Sample]:
    """The answers of a job as records."""
    job = done.job
    for prompt, row in zip(job.prompts, done.rows, strict=True):
        for index, sample in enumerate(row):
            yield Sample(
                pair=job.pair.name,
                task=job.task,
                prompt=prompt.id,
                method=job.setting.method,
                setting=job.setting.label,
                value=job.setting.value,
                sample=index,
                text=sample.text,
                pieces=sample.pieces,
                tokens=sample.tokens,
                base_share=None if sample.base_share is None else round(sample.base_share, 6),
                switches=sample.switches,
                finish_reason=sample.finish_reason,
                seed=job.draw.seed,
            )


class Drawer:
    """Answers the prompts of jobs in one process, with the pair of the last job loaded.

    Args:
        advance: receives the prompts and tokens of every job; None in a worker process.

    Attributes:
        advance: as given.
    """

    def __init__(self, advance: Advance | None = None) -> None:
        self.advance = advance
        self._loaded: tuple[PairSpec, Baco] | None = None
        if advance is None:
            torch.set_num_threads(1)
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()

    def __call__(self, job: Job) -> Done:
        """Answer a job's prompts."""
        baco = self._pair(job.pair)
        started = time.perf_counter()
        rows = answer(baco, job.setting, job.prompts, job.draw)
        done = Done(job, rows, time.perf_counter() - started)
        if self.advance is not None:
            self.advance(done.prompts, done.tokens)
        return done

    def _pair(self, pair: PairSpec) -> Baco:
        if self._loaded is None or self._loaded[0] != pair:
            keep_memory()
            self._loaded = None  # the memory of the last pair is free before the next is loaded
            self._loaded = pair, Baco.load(**pair.where, **pair.options, max_rows=ANSWERS_A_JOB)
        return self._loaded[1]


class LoadedExecutor(LocalExecutor):
    """Carries out jobs in this process with a drawer that may have its pair loaded."""

    def __init__(self, drawer: Drawer) -> None:
        self._drawer = drawer

    @contextmanager
    def workers(
        self,
        worker: Any,  # noqa: ARG002 (the drawer is the worker)
        advance: Advance | None = None,
        *,
        ordered: bool = True,  # noqa: ARG002 (there is one order)
    ) -> Iterator[Any]:
        """See `Executor`."""
        self._drawer.advance = advance
        yield partial(map, self._drawer)


def default_workers(pairs: Sequence[PairSpec]) -> int:
    """One worker per core where each can hold its own pair on the CPU; else one."""
    sizes = [pair.bytes() for pair in pairs]
    on_cpu = all(str(pair.options.get("device", "cpu")) == "cpu" for pair in pairs)
    if torch.accelerator.is_available() or not on_cpu or None in sizes:
        return 1
    room = int(psutil.virtual_memory().available * WEIGHTS_SHARE)
    # Weights kept in half precision are float32 when a CPU runs them.
    largest = max(2 * size for size in sizes if size is not None)
    return max(1, min(cores(), room // max(1, largest)))
