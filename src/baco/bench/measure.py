"""The whole measurement: one pair, every contestant, one report."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from baco.bench.bound import bound
from baco.bench.contestants import Task, never_ending
from baco.bench.gammas import Work, agreement, work
from baco.bench.long_prompt import long_prompt
from baco.bench.machine import machine
from baco.bench.memory import memory
from baco.bench.race import Entry, race, ratios, same_answers
from baco.bench.settings import Settings, entries, line_up
from baco.bench.weights import Weights
from baco.errors import BacoError
from baco.models.pair import Pair


def measure(
    weights: Weights,
    prompts: Sequence[str],
    settings: Settings,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a pair; the report as it is printed with ``--json``.

    Args:
        weights: of the pair.
        prompts: asked in turn.
        settings: what is measured.
        advance: called with what is being done, :func:`steps` times.

    Raises:
        BacoError: a prompt and answers that do not fit a context window.
    """
    tasks, pair = _tasks(weights.ours, prompts, settings), weights.ours
    with contextlib.ExitStack() as servers:
        raced = entries(settings, weights, servers)
        race(raced, tasks, advance)
    found = ratios(raced)
    report: dict[str, Any] = {name: round(ratio.middle, 3) for name, ratio in found.items()}
    report |= _told(pair, settings)
    report["ratios"] = {name: asdict(ratio) for name, ratio in found.items()}
    report["contestants"] = [_timed(entry) for entry in raced]
    report["same_answers"] = same_answers(raced)
    report["agreement"] = agreement(weights.plain, tasks, raced[0].runs)
    if "bound" in settings.parts:
        advance("what the machine allows")
        limit = bound(pair)
        report["bound"] = asdict(limit) | {"few": limit.few, "many": limit.many}
    if "gammas" in settings.parts:
        report["gammas"] = [_worked(one) for one in _sweep(pair, tasks, settings, advance)]
    if "memory" in settings.parts:
        advance("memory, in a process of its own")
        report["memory"] = asdict(memory(pair, tasks[0].of(max(settings.samples))))
    if "prompt" in settings.parts:
        advance("a long prompt")
        report["long_prompt"] = asdict(long_prompt(pair, tasks[0]))
    return report


def steps(settings: Settings) -> int:
    """How often :func:`measure` advances."""
    races = len(line_up(settings)) * (settings.repeats + 1)
    sweep = len(settings.gammas) * len(_sweep_samples(settings))
    single = len({"bound", "memory", "prompt"} & settings.parts)
    return races + single + ("gammas" in settings.parts) * sweep


def _tasks(pair: Pair, prompts: Sequence[str], settings: Settings) -> list[Task]:
    """A prompt and a seed for every repeat."""
    rendered = [pair.renderer.render(prompt) for prompt in prompts]
    for prompt in rendered:
        longest = max(len(prompt.base_ids), len(prompt.aligned_ids))
        window = min(pair.base.context, pair.aligned.context)
        if longest + settings.tokens > window:
            raise BacoError(
                f"a prompt of {longest} tokens and answers of {settings.tokens} do not fit the "
                f"context window of {window}: lower --tokens"
            )
    return [
        Task(
            rendered[repeat % len(rendered)],
            settings.router,
            never_ending(pair, settings.tokens, seed=repeat),
        )
        for repeat in range(settings.repeats)
    ]


def _timed(entry: Entry) -> dict[str, Any]:
    speeds = [run.speed for run in entry.runs]
    return {
        "name": entry.name,
        "n": entry.n,
        "tokens_per_second": entry.speed,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "first_token_seconds": entry.first,
        "milliseconds_per_token": 1000 / entry.speed,
    }


def _sweep_samples(settings: Settings) -> list[int]:
    """Of the numbers of answers, the least and the next: a sweep of them all would be long."""
    return sorted(settings.samples)[:2]


def _sweep(
    pair: Pair, tasks: Sequence[Task], settings: Settings, advance: Callable[[str], None]
) -> list[Work]:
    found = []
    for router in settings.gammas:
        for n in _sweep_samples(settings):
            advance(f"{router.spelling}, n = {n}")
            routed = [Task(task.prompt, router, task.of(n).params) for task in tasks]
            found.append(work(pair, routed))
    return found


def _worked(one: Work) -> dict[str, Any]:
    return asdict(one) | {"acceptance": one.acceptance}


def _told(pair: Pair, settings: Settings) -> dict[str, Any]:
    model = pair.aligned.model
    sizes = {"base": pair.base.size, "aligned": pair.aligned.size}
    return {
        "pair": pair.name,
        "router": settings.router.spelling,
        "tokens": settings.tokens,
        "samples": list(settings.samples),
        "repeats": settings.repeats,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "parameters": {name: size.parameters for name, size in sizes.items()},
        "weights_bytes": {name: size.bytes for name, size in sizes.items()},
        "machine": machine(model.device),
    }
