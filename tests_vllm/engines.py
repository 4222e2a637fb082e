"""Engines of vLLM for tests, each in a process of its own.

vLLM 0.32 changes classes of transformers in its process, and a second engine in a process that
drafted n-grams does not start.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

from baco import Baco
from baco.backends.vllm.backend import VllmBackend

P, T = ParamSpec("P"), TypeVar("T")
SMALL = {"cache": "64MiB", "max_rows": 32}


def load(pair: str | None, **options: Any) -> Baco:
    """Load a pair, or the models of the options, into an engine of this process, with the smallest
    blocks.
    """
    engine = {"block_size": 32} | options.pop("engine", {})
    return Baco.load(pair, backend="vllm", engine=engine, **SMALL | options)


def in_vllm(
    work: Callable[Concatenate[Baco, P], T],
    pair: str | None,
    options: dict[str, Any],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """The result of ``work`` on a pair in vLLM, computed in a process of its own."""
    done: T = apart(_do, work, pair, options, args, kwargs)
    return done


def apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``work``, computed in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *args, **kwargs).result()


def _do(work: Any, pair: str, options: dict[str, Any], args: Any, kwargs: Any) -> Any:
    baco = load(pair, **options)
    try:
        return work(baco, *args, **kwargs)
    finally:
        baco.close()


@dataclass
class Watched:
    """Counts of what a scheduler did."""

    preemptions: int = 0
    hits: int = 0


def watch(baco: Baco) -> Watched:
    """Count preemptions and hits in the prefix cache: they show that a mode was really on."""
    assert isinstance(baco.backend, VllmBackend)
    counts = Watched()
    core = getattr(baco.backend.llm.engine_core, "engine_core", None)
    if core is None:
        return counts
    scheduler = core.scheduler
    preempt, compute = scheduler._preempt_request, scheduler.kv_cache_manager.get_computed_blocks

    def preempts(*args: Any, **kwargs: Any) -> Any:
        counts.preemptions += 1
        return preempt(*args, **kwargs)

    def computes(request: Any) -> Any:
        computed = compute(request)
        counts.hits += computed[1] > 0
        return computed

    scheduler._preempt_request = preempts
    scheduler.kv_cache_manager.get_computed_blocks = computes
    return counts
