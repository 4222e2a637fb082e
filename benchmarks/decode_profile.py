"""Time of paired decoding by part of the engine.

    python -m benchmarks.decode_profile [--body SIZE | PAIR] [--n N] [--tokens T] [--router R]

A timer samples the stack every millisecond and adds the time since the last sample to the innermost
module of this project on the stack; its calls into PyTorch count as its own. Sampling costs a few
per cent of speed, spread evenly over all parts.
"""

import argparse
import json
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import baco
from baco.bench.contestants import Paired, Task, never_ending
from baco.bench.measure import machine, prompts_for
from baco.models.pair import load_pair
from baco.routing.parser import router
from benchmarks import launch
from benchmarks.bodies import add_pair, named_pair

# Modules of each part, by the beginning of their names; the first part that matches counts.
PARTS = {
    "forwards": ("models", "kv_cache.shared_prefix"),
    "cache": ("kv_cache", "engine.runner", "engine.batch"),
    "routing": ("routing",),
    "sampling": ("sampling",),
    "drafting": ("engine.speculative",),
    "verification": ("engine.verify", "engine.commit", "engine.engine"),
}
EVERY = 1e-3  # seconds
PROMPTS = 5


class Sampler:
    """Inside, adds up seconds by module of the project."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._root = str(Path(baco.__file__).parent) + "/"
        self._last = 0.0

    def __enter__(self) -> "Sampler":
        self._last = time.perf_counter()
        signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, EVERY, EVERY)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _look(self, _: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        while frame is not None and not frame.f_code.co_filename.startswith(self._root):
            frame = frame.f_back
        if frame is not None:
            path = frame.f_code.co_filename.removeprefix(self._root)
            self.seconds[path.removesuffix(".py").replace("/", ".")] += now - self._last
        self._last = now


def parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by part; modules of no part count as ``other``."""
    sums = dict.fromkeys([*PARTS, "other"], 0.0)
    for module, taken in seconds.items():
        part = next((p for p, starts in PARTS.items() if module.startswith(starts)), "other")
        sums[part] += taken
    return sums


def main() -> None:
    """Decode with the sampler and print the shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_pair(parser)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--router", default="P-Punc:0.4")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    known = named_pair(given)
    pair = load_pair(known, dtype=given.dtype, device=given.device)
    prompts = prompts_for(known)
    paired, sampler, tokens = Paired(pair), Sampler(), 0
    for seed, prompt in enumerate([prompts[0], *prompts[:PROMPTS]]):
        params = never_ending(pair, given.tokens, n=given.n, seed=seed)
        task = Task(pair.renderer.render(prompt), router(given.router), params)
        if seed == 0:
            paired.decode(task)  # warms up
            continue
        with sampler:
            paired.decode(task)
        tokens += given.n * given.tokens
    milliseconds = {part: 1000 * taken / tokens for part, taken in parts(sampler.seconds).items()}
    report = {
        "pair": pair.name,
        "dtype": str(pair.aligned.model.dtype).removeprefix("torch."),
        "router": given.router,
        "n": given.n,
        "tokens": given.tokens,
        "machine": machine(pair.aligned.device),
        "milliseconds_per_token": milliseconds,
    }
    if given.json:
        print(json.dumps(report))
        return
    print(f"{report['pair']}, {report['dtype']}, {given.router}, n = {given.n}")
    whole = sum(milliseconds.values())
    for part, taken in sorted(milliseconds.items(), key=lambda entry: -entry[1]):
        print(f"{part:13}{taken:8.3f} ms/token{taken / whole:7.0%}")
    print(f"{'all':13}{whole:8.3f} ms/token")


if __name__ == "__main__":
    launch(main)
