"""The whole measurement: one pair, every contestant, what the machine allows, one report."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import psutil
import torch

from baco.bench.contestants import Contestant, Generate, Naive, Paired, Run, Task, never_ending
from baco.bench.race import Entry, race, ratios, same_answers
from baco.calibration.agreement import Agreement
from baco.calibration.measure import open_prompts
from baco.calibration.text_agreement import OwnReading, TextAgreement
from baco.demo.world import questions
from baco.device import cores, processor
from baco.errors import BacoError
from baco.models.known_pairs import DEMO, KnownPair
from baco.models.model import compile_models
from baco.models.pair import Pair, load_pair
from baco.routing.router import Router

CONTESTANTS = ("undrafted", "generate", "naive")
PARTS = (*CONTESTANTS, "bound")
# What needs one tokenizer for both models.
_LEFT_OUT = {
    "undrafted": "nothing is drafted for models with different tokenizers",
    "naive": "the loop reads both models' tokens, which are those of one tokenizer",
    "bound": "it is a bound of tokens, and texts of two tokenizers are compared by characters",
}

# How long each figure of the bound is measured; the best pass counts.
_SECONDS = 0.5
_LARGEST = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        router: of paired decoding and of the naive loop.
        tokens: of every answer.
        samples: numbers of answers to a prompt, n.
        repeats: of every contestant, each with a prompt and seed of its own.
        parts: some of PARTS.
    """

    router: Router
    tokens: int
    samples: tuple[int, ...]
    repeats: int
    parts: frozenset[str]

    @property
    def contestants(self) -> list[str]:
        """Who races at every n.

        The engine also races without drafts: the difference is the gain of speculation.
        """
        return ["paired", *(name for name in CONTESTANTS if name in self.parts)]

    @property
    def steps(self) -> int:
        """Number of times that :func:`measure` advances."""
        entries = len(self.contestants) * len(self.samples)
        return entries * (self.repeats + 1) + ("bound" in self.parts)


@dataclass(frozen=True, slots=True)
class Weights:
    """The same weights twice.

    Attributes:
        ours: laid out as a pair is by default, for the engine.
        plain: as ``transformers`` loads them, for all others.
    """

    ours: Pair
    plain: Pair


def load(
    known: KnownPair, dtype: str | None, device: str | None, *, compile: bool = False
) -> Weights:
    """Load a pair for measuring, with the engine's forwards compiled or not.

    Raises:
        BacoError: a pair that cannot be found or loaded, or models that do not fit together.
    """
    ours = load_pair(known, dtype=dtype, device=device)
    if compile:
        compile_models((ours.base, ours.aligned))
    two = ours.own_vocabularies is not None
    plain = load_pair(known, dtype=dtype, device=device, packed=False, separate_tokenizers=two)
    return Weights(ours, plain)


def prompts_for(known: KnownPair) -> list[str]:
    """Prompts with long answers, on which the models of the demo pair agree as published ones do.

    Pairs of ``benchmarks/bodies.py`` are the demo pair in a larger model.
    """
    if known.name != DEMO and not known.name.startswith("body:"):
        return open_prompts()
    return [q.text for q in questions("dev", 60, 0) if q.family in ("story", "poem")]


def measure(
    weights: Weights,
    prompts: Sequence[str],
    settings: Settings,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a pair.

    Args:
        weights: of the pair.
        prompts: used in turn.
        settings: what is measured.
        advance: called with a description of each step, ``settings.steps`` times.

    Returns:
        The report as it is printed with ``--json``. Pairs with two tokenizers are measured in
        characters, without what needs one tokenizer.

    Raises:
        BacoError: a prompt and its answers do not fit a context window.
    """
    pair = weights.ours
    left_out = {} if pair.own_vocabularies is None else _LEFT_OUT
    settings = replace(settings, parts=settings.parts.difference(left_out))
    tasks = repeated_tasks(pair, prompts, settings.router, settings.tokens, settings.repeats)
    contestants: dict[str, Contestant] = {
        "paired": Paired(pair),
        "undrafted": Paired(pair, speculate=False),
        "generate": Generate(weights.plain),
        "naive": Naive(weights.plain),
    }
    entries = [
        Entry(name, n, contestants[name]) for n in settings.samples for name in settings.contestants
    ]
    race(entries, tasks, advance)
    speed_ratios = ratios(entries)
    report: dict[str, Any] = {name: round(ratio.middle, 3) for name, ratio in speed_ratios.items()}
    report |= _description(pair, settings)
    report["ratios"] = {name: asdict(ratio) for name, ratio in speed_ratios.items()}
    unit = report["unit"] = "token" if pair.own_vocabularies is None else "character"
    report["contestants"] = [_figures(entry, unit) for entry in entries]
    report["left_out"] = left_out
    report["same_answers"] = same_answers(entries)
    report["agreement"] = _agreement(weights.plain, tasks, entries[0].runs)
    if "bound" in settings.parts:
        advance("what the machine allows")
        report["bound"] = bound(pair)
    return report


def repeated_tasks(
    pair: Pair, prompts: Sequence[str], router: Router, tokens: int, repeats: int
) -> list[Task]:
    """A task for every repeat, with a prompt and a seed of its own.

    Raises:
        BacoError: a prompt and an answer of ``tokens`` tokens do not fit a context window.
    """
    rendered = [pair.renderer.render(prompt) for prompt in prompts]
    for prompt in rendered:
        longest = max(len(prompt.base_ids), len(prompt.aligned_ids))
        window = min(pair.base.context, pair.aligned.context)
        if longest + tokens > window:
            raise BacoError(
                f"a prompt of {longest} tokens and answers of {tokens} do not fit the "
                f"context window of {window}: lower --tokens"
            )
    return [
        Task(rendered[repeat % len(rendered)], router, never_ending(pair, tokens, seed=repeat))
        for repeat in range(repeats)
    ]


def _agreement(pair: Pair, tasks: Sequence[Task], runs: Sequence[Run]) -> float:
    """Share of the answers' positions where both models have the same most likely token; of their
    words, where the models have different tokenizers.
    """
    by_token, by_word = Agreement(), TextAgreement()
    for task, run in zip(tasks, runs, strict=True):
        if pair.own_vocabularies is None:
            by_token.add(pair, task.prompt, run.answers[0])
        else:
            reading = OwnReading.of(pair, run.answers[0], run.sources[0])
            by_word.add(pair, task.prompt, reading)
    sums = by_token if pair.own_vocabularies is None else by_word
    return sums.agree / max(1, sums.positions)


def _figures(entry: Entry, unit: str) -> dict[str, Any]:
    speeds = [run.speed for run in entry.runs]
    return {
        "name": entry.name,
        "n": entry.n,
        f"{unit}s_per_second": entry.speed,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "first_token_seconds": entry.first,
        f"milliseconds_per_{unit}": 1000 / entry.speed,
    }


def _description(pair: Pair, settings: Settings) -> dict[str, Any]:
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


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, memory, accelerator and versions: what a figure was measured on."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "baco": version("baco"),
    }


def bound(pair: Pair) -> dict[str, Any]:
    """What the machine allows: how fast it reads weights, and how fast it multiplies them.

    Decoding a few rows reads every weight once per forward, so memory bandwidth bounds it; decoding
    many rows multiplies every weight with every row, so operations per second bound it.

    Returns:
        bandwidth: bytes per second of a float32 sum over a buffer as large as both models' weights;
            a cache that holds them all counts as it does in decoding.
        flops: operations per second of a large matrix product in the weights' own dtype.
        bytes: of the weights that one forward of each model reads.
        parameters: the weights of both models that one token is multiplied with.
        few: tokens per second at n = 1 if both models are read at every token and all else is free.
        many: tokens per second at large batches, two operations for each parameter and token.
    """
    sizes = {"base": pair.base.size, "aligned": pair.aligned.size}
    stored = {name: size.bytes for name, size in sizes.items()}
    parameters = sum(size.parameters for size in sizes.values())
    device, dtype = pair.aligned.device, pair.aligned.model.dtype
    buffer = torch.ones(min(sum(stored.values()), _LARGEST) // 4, device=device)
    rows, inner, outer = 1024, 2048, 4096
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, outer, dtype=dtype, device=device)
    bandwidth = buffer.nbytes / _best_seconds(buffer.sum, device)
    flops = 2 * rows * inner * outer / _best_seconds(lambda: left @ right, device)
    return {
        "bandwidth": bandwidth,
        "flops": flops,
        "bytes": stored,
        "parameters": parameters,
        "few": bandwidth / sum(stored.values()),
        "many": flops / (2 * parameters),
    }


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of many passes."""
    began, best = time.perf_counter(), float("inf")
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
