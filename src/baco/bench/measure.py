"""The whole measurement: one pair, every contestant, one report."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baco.bench.bound import bound
from baco.bench.contestants import Contestant, Generate, Naive, Paired, Task, never_ending
from baco.bench.gammas import Work, agreement, work
from baco.bench.machine import machine
from baco.bench.race import Entry, Ratio, race
from baco.bench.weights import Weights
from baco.errors import BacoError
from baco.pair import Pair
from baco.routing.routers import Router

PARTS = ("generate", "naive", "bound", "gammas")
# Naive and generate are also timed on packed weights, to tell what packing does and what the
# engine does.
_PACKED = "_packed"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        router: of the race.
        gammas: routers of the sweep, one for each γ.
        tokens: of every answer.
        samples: numbers of answers to a prompt, n.
        repeats: of every contestant, each with a prompt and seed of its own.
        parts: some of PARTS.
    """

    router: Router
    gammas: tuple[Router, ...]
    tokens: int
    samples: tuple[int, ...]
    repeats: int
    parts: frozenset[str]


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
    tasks = _tasks(weights.packed, prompts, settings)
    entries = _entries(weights, settings)
    race(entries, tasks, advance)
    ratios = _ratios(entries)
    report: dict[str, Any] = {name: round(ratio.middle, 3) for name, ratio in ratios.items()}
    report |= _told(weights.packed, settings)
    report["ratios"] = {name: asdict(ratio) for name, ratio in ratios.items()}
    report["contestants"] = [_timed(entry) for entry in entries]
    report["same_answers"] = _same(entries)
    first = next(entry for entry in entries if entry.name == "paired")
    report["agreement"] = agreement(weights.plain, tasks, first.runs)
    if "bound" in settings.parts:
        advance("the machine's bound")
        limit = bound(weights.packed)
        report["bound"] = asdict(limit) | {"few": limit.few, "many": limit.many}
    if "gammas" in settings.parts:
        report["gammas"] = [_worked(w) for w in _sweep(weights.packed, tasks, settings, advance)]
    return report


def steps(settings: Settings, weights: Weights) -> int:
    """How often :func:`measure` advances."""
    races = len(_entries(weights, settings)) * (settings.repeats + 1)
    sweep = len(settings.gammas) * len(_sweep_samples(settings))
    parts = settings.parts
    return races + ("bound" in parts) + ("gammas" in parts) * sweep


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


def _entries(weights: Weights, settings: Settings) -> list[Entry]:
    contestants: dict[str, Contestant] = {"paired": Paired(weights.packed)}
    for name, kind in (("generate", Generate), ("naive", Naive)):
        if name in settings.parts:
            contestants[name] = kind(weights.plain)
            if not weights.alike:
                contestants[name + _PACKED] = kind(weights.packed)
    return [Entry(name, n, one) for n in settings.samples for name, one in contestants.items()]


def _ratios(entries: Sequence[Entry]) -> dict[str, Ratio]:
    """Speed of paired decoding over each contestant's at the same n."""
    paired = {entry.n: entry for entry in entries if entry.name == "paired"}
    return {
        _key(entry): Ratio.of(paired[entry.n], entry) for entry in entries if entry.name != "paired"
    }


def _key(entry: Entry) -> str:
    """What a ratio is called; the loop and the servers are compared at n = 1 unless said."""
    single = entry.n == 1 and not entry.name.startswith("generate")
    return entry.name if single else f"{entry.name}_n{entry.n}"


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


def _same(entries: Sequence[Entry]) -> dict[str, float]:
    """Share of answers that the naive loop gives token for token, source for source."""
    paired = {entry.n: entry for entry in entries if entry.name == "paired"}
    shares = {}
    for entry in entries:
        if entry.name.startswith("naive"):
            each = [
                (mine, theirs, mine_by, theirs_by)
                for ours, run in zip(paired[entry.n].runs, entry.runs, strict=True)
                for mine, theirs, mine_by, theirs_by in zip(
                    ours.answers, run.answers, ours.sources, run.sources, strict=True
                )
            ]
            same = sum(a == b and by_a == by_b for a, b, by_a, by_b in each)
            shares[_key(entry)] = same / len(each)
    return shares


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
