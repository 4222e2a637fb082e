"""Checks and measures on a GPU what the project could not run on one, into one file to send in.

    bash benchmarks/gpu.sh                       # checks PyTorch, installs, runs all of this
    python -m benchmarks.gpu [--small NAME] [--large NAME] [--only WAY …] [--out FILE]

First the exactness of every way to decode: with weights in float32 the tokens and sources must be
those of the naive two-model loop; in bfloat16, float16 and int8 the share of equal answers is
written down, since rounding may decide a tie. The ways are: no drafts, drafts, CUDA graphs and two
streams (`--compile`), two devices where there are two, one model under two prompts, a memory limit,
and many rows at once. Then the table of `benchmarks.real_weights` for a pair of about 1B and one of
about 7B parameters, with and without CUDA graphs.

A way that fails is written down with its error, and the others still run. The file is JSON and
holds the machine, versions, every check and every row; nothing else is collected, and nothing is
sent. Attach it to an issue of the project.
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from baco.bench.contestants import Contestant, Naive, Paired, Run, Task, never_ending
from baco.bench.measure import machine, prompts_for
from baco.files import write_atomic
from baco.models.known_pairs import DEMO, KnownPair, find_pair
from baco.models.model import compile_models
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router
from baco.sampling.noise import noise_keys, uniform
from benchmarks import launch

ROUTERS = ("P-Punc:0.3", "H:2", "Rand:0.5", "Aligned")
SHAPES = ((1, 0.0), (1, 1.0), (8, 1.0), (64, 1.0))
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Way:
    """A way to decode.

    Attributes:
        name: in the file.
        options: of `baco.models.pair.load_pair`.
        speculate: drafts tokens.
        compiled: records CUDA graphs.
        exact: its answers must equal the naive loop's.
        memory: limit of the caches, or None.
        one_model: the aligned model under both prompts.
    """

    name: str
    options: dict[str, Any]
    speculate: bool = True
    compiled: bool = False
    exact: bool = True
    memory: str | None = None
    one_model: bool = False


def ways(device: str) -> list[Way]:
    """All that this machine can run."""
    single = {"device": device, "dtype": "float32"}
    all_ways = [
        Way("no drafts", single, speculate=False),
        Way("drafts", single),
        Way("CUDA graphs and two streams", single, compiled=True),
        Way("CUDA graphs, no drafts", single, compiled=True, speculate=False),
        Way("one model under two prompts", single, one_model=True),
        Way("memory limit of 256 MiB", single, memory="256MiB"),
    ]
    if device == "cuda" and torch.cuda.device_count() > 1:
        devices = {"base": "cuda:0", "aligned": "cuda:1"}
        all_ways.append(Way("two devices", {"device": devices, "dtype": "float32"}))
    for dtype in ("bfloat16", "float16"):
        options = {"device": device, "dtype": dtype}
        all_ways.append(Way(dtype, options, exact=False))
        all_ways.append(Way(f"{dtype}, CUDA graphs", options, compiled=True, exact=False))
    quantized = {"device": device, "dtype": "bfloat16", "quantize": "int8"}
    return [*all_ways, Way("int8", quantized, exact=False)]


def check_noise(device: str) -> dict[str, Any]:
    """Whether the random numbers of this device are those of the CPU, bit for bit."""
    position, token = torch.arange(64), torch.arange(50_000)
    seed, sample = torch.full_like(position, 2**40 + 7), position % 5
    expected = uniform(noise_keys(seed, sample, position)[:, None], token)
    keys = noise_keys(seed.to(device), sample.to(device), position.to(device))
    same = bool((uniform(keys[:, None], token.to(device)).cpu() == expected).all())
    return {"way": "random numbers", "exact": True, "equal": float(same), "passed": same}


def check(way: Way, known: KnownPair) -> dict[str, Any]:
    """Decode in one way and by the naive loop, and compare tokens and sources."""
    if way.one_model:
        known = replace(known, base=known.aligned)
    pair = load_pair(known, **way.options)
    if way.compiled:
        compile_models((pair.base, pair.aligned))
    naive = Naive(load_pair(known, **way.options | {"packed": False}))
    engine = Paired(pair, speculate=way.speculate, memory=way.memory)
    shares, first = {}, None
    for spelling in ROUTERS:
        for n, temperature in SHAPES:
            task = _task(pair, known, spelling, n, temperature)
            share, difference = _compare(engine, naive, task)
            shares[f"{spelling}, n = {n}, temperature {temperature:g}"] = share
            first = first or difference
    equal = sum(shares.values()) / len(shares)
    return {
        "way": way.name,
        "forward": pair.aligned.path,
        "exact": way.exact,
        "equal": equal,
        "passed": equal == 1.0 or not way.exact,
        "first_difference": first,
        "shares": shares,
    }


def _task(pair: Pair, known: KnownPair, spelling: str, n: int, temperature: float) -> Task:
    prompt = pair.renderer.render(prompts_for(known)[0])
    params = never_ending(pair, TOKENS, n=n, seed=n, temperature=temperature)
    return Task(prompt, router(spelling), params)


def _compare(engine: Contestant, naive: Contestant, task: Task) -> tuple[float, Any]:
    """The share of equal answers, and where the first other one differs."""
    mine, expected = engine.decode(task), naive.decode(task)
    pairs = list(zip(_answers(mine), _answers(expected), strict=True))
    differing = [(sample, *both) for sample, both in enumerate(pairs) if both[0] != both[1]]
    if not differing:
        return 1.0, None
    sample, own, other = differing[0]
    position = next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
    where = {"task": task.router.spelling, "sample": sample, "position": position}
    return 1 - len(differing) / len(pairs), where | {
        "engine": own[position],
        "naive": other[position],
    }


def _answers(run: Run) -> list[list[tuple[int, str]]]:
    pairs = zip(run.answers, run.sources, strict=True)
    return [list(zip(tokens, sources, strict=True)) for tokens, sources in pairs]


def table(name: str, given: argparse.Namespace, *, compiled: bool) -> Any:
    """The rows of `benchmarks.real_weights`, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.real_weights", name, "--json"]
    command += ["--device", given.device, "--tokens", "128", "--repeats", str(given.repeats)]
    command += ["--compile"] if compiled else []
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(finished.stderr[-2000:])
    return json.loads(finished.stdout.splitlines()[-1])


def attempt(name: str, work: Callable[[], Any], report: list[dict[str, Any]]) -> None:
    """Run a part and note its result or its error, so that the next one still runs."""
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        report.append({"name": name, "result": work()})
    except Exception as error:
        report.append({"name": name, "error": str(error), "trace": traceback.format_exc()})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Check, measure, write the file; 1 where an exact way differs or anything fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", default=DEMO, help="pair of the checks; demo needs no network")
    parser.add_argument("--small", default="llama-3.2-1b", help="pair of about 1B, '' for none")
    parser.add_argument("--large", default="qwen2.5-7b", help="pair of about 7B, '' for none")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="check these ways alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("baco-gpu.json"))
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device: install a build of torch for your GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    disable_progress_bar()
    known, checks, tables = find_pair(given.check), list[dict[str, Any]](), list[dict[str, Any]]()
    attempt("random numbers", partial(check_noise, given.device), checks)
    for way in ways(given.device):
        if given.only and way.name not in given.only:
            continue
        attempt(way.name, partial(check, way, known), checks)
    for name in filter(None, (given.small, given.large)):
        for compiled in (False, True):
            title = f"{name}, CUDA graphs" if compiled else name
            attempt(title, partial(table, name, given, compiled=compiled), tables)
    report = {"machine": machine(torch.device(given.device)), "checks": checks, "tables": tables}
    write_atomic(given.out, json.dumps(report, indent=1))
    failed = [part["name"] for part in [*checks, *tables] if "error" in part]
    failed += [part["name"] for part in checks if not part.get("result", {}).get("passed", True)]
    for part in checks:
        result = part.get("result")
        verdict = (
            f"failed: {part['error'].splitlines()[0]}"
            if result is None
            else (f"{result['equal']:.0%} of the answers equal the naive loop's")
        )
        print(f"{part['name']:32}{verdict}")
    print(
        f"written to {given.out}; " + (f"failed: {', '.join(failed)}" if failed else "all passed")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    launch(main)
