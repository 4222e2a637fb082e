"""What each optimisation of the engine gives, alone, with all others on.

    python -m benchmarks.ablation [demo | smollm2 | FOLDER] [--n 1 8 32] [--repeats 5] [--json]

The engine decodes the same tasks with everything on and with one optimisation off; they take turns
in one run. Each figure is the median over the repeats of speed with it ÷ speed without it: 1.05
means that it makes decoding 5% faster. Answers are the same.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils.logging import disable_progress_bar

from baco.bench.contestants import Contestant, Paired, Run, Task
from baco.bench.measure import machine, prompts_for, repeated_tasks
from baco.bench.race import Entry, race
from baco.engine.speculative import proposer
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.engine.speculative.cost_model import NO_DRAFT, DraftPlanner
from baco.models.forward import packed_linear
from baco.models.known_pairs import DEMO
from baco.models.pair import load_pair
from baco.routing.parser import router
from baco.sampling import sampler
from benchmarks import launch
from benchmarks.real_weights import named


def _mean_rate(stats: AcceptanceStats, drafter: str, _: float) -> float:
    return stats.by_drafter[drafter]


# Each optimisation, and what turns it off.
OFF: dict[str, Callable[[], Any]] = {
    "drafts": lambda: patch.object(DraftPlanner, "plan", lambda *_: NO_DRAFT),
    "bonus token": lambda: patch.object(DraftPlanner, "bonus_pays", lambda *_: False),
    "confidence buckets": lambda: patch.object(AcceptanceStats, "probability", _mean_rate),
    "pauses of the planner": lambda: patch.object(proposer, "_ROWS_PER_PAUSED_STEP", 10**9),
    "noise for tokens that can win": lambda: patch.object(
        sampler, "_draw_on_cpu", sampler.draw_with_all_noise
    ),
}
# It changes how weights are loaded, so it is measured on a pair of its own.
EMBEDDING = "packed embedding"


@dataclass(frozen=True, slots=True)
class Without:
    """The engine without one optimisation."""

    paired: Paired
    name: str

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        with OFF[self.name]():
            return self.paired.decode(task)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", nargs="?", default=DEMO)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--router", default="P-Punc:0.3")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*OFF, EMBEDDING], default=[*OFF, EMBEDDING])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    disable_progress_bar()
    known = named(given.pair)
    dtype = None if known.name == DEMO else "bfloat16"
    pair = load_pair(known, dtype=dtype, device="cpu")
    with patch.object(packed_linear, "_packed_embedding", lambda *_: None):
        plain_head = load_pair(known, dtype=dtype, device="cpu")
    tasks = repeated_tasks(
        pair, prompts_for(known), router(given.router), given.tokens, given.repeats
    )
    gains: dict[str, dict[int, float]] = {}
    for n in given.n:
        everything = Entry("all", n, Paired(pair))
        contestants: dict[str, Contestant] = {name: Without(Paired(pair), name) for name in OFF}
        contestants[EMBEDDING] = Paired(plain_head)
        others = [Entry(name, n, contestants[name]) for name in given.only]
        race([everything, *others], tasks, lambda _: None)
        for entry in others:
            runs = zip(everything.runs, entry.runs, strict=True)
            ratio = median(whole.speed / part.speed for whole, part in runs)
            gains.setdefault(entry.name, {})[n] = ratio
    about = machine(torch.device("cpu"))
    if given.json:
        print(json.dumps({"pair": known.name, "machine": about, "gains": gains}))
        return
    print(f"{known.name}, {given.router}, {about['cpu']}, {about['threads']} threads")
    print(f"{'':32}" + "".join(f"{f'n = {n}':>9}" for n in given.n))
    for name, by_n in gains.items():
        print(f"{name:32}" + "".join(f"{by_n[n]:9.2f}" for n in given.n))


if __name__ == "__main__":
    launch(main)
