"""Paired decoding at each threshold of a router: base share, accepted drafts, forwards, speed.

python -m benchmarks.thresholds [PAIR | --body SIZE] [--gamma G ...] [--n N ...] [--json]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from baco.bench.contestants import Paired, Run, Task
from baco.bench.measure import machine, prompts_for, repeated_tasks
from baco.engine.engine import Stats
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router as parse
from baco.source import MODELS
from benchmarks import launch
from benchmarks.bodies import add_pair, named_pair


@dataclass(frozen=True, slots=True)
class Work:
    """Figures of paired decoding at one threshold.

    Attributes:
        router: its spelling, with γ.
        n: answers to every prompt.
        tokens_per_second: of all answers together, median over prompts.
        base_share: of all tokens.
        drafted, accepted: draft tokens, and how many of them were accepted.
        steps: of the engine, for every token of an answer.
        forwards: of each model for every token of an answer, those over the prompt included; the
            naive loop's is 1.
    """

    router: str
    n: int
    tokens_per_second: float
    base_share: float
    drafted: int
    accepted: int
    steps: float
    forwards: dict[str, float]

    @property
    def acceptance(self) -> float | None:
        """Share of draft tokens that were accepted; None where none was drafted."""
        return self.accepted / self.drafted if self.drafted else None


def work(pair: Pair, tasks: Sequence[Task]) -> Work:
    """Decode tasks of one router and one n, and sum up."""
    paired = Paired(pair)
    runs: list[Run] = []
    stats: list[Stats] = []
    for task in tasks:
        runs.append(paired.decode(task))
        assert paired.stats is not None
        stats.append(paired.stats)
    tokens = sum(task.params.max_tokens for task in tasks)
    sources = [source for run in runs for row in run.sources for source in row]
    return Work(
        tasks[0].router.spelling,
        tasks[0].params.n,
        median(run.speed for run in runs),
        sources.count("base") / len(sources),
        sum(each.drafted for each in stats),
        sum(each.accepted for each in stats),
        sum(each.steps for each in stats) / tokens,
        {source: sum(each.forwards[source] for each in stats) / tokens for source in MODELS},
    )


def main() -> None:
    """Decode at every threshold and n, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_pair(parser)
    parser.add_argument("--router", default="P-Punc", help="without its threshold")
    parser.add_argument("--gamma", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    known = named_pair(given)
    pair = load_pair(known, dtype=given.dtype, device=given.device)
    rows = []
    for gamma in given.gamma:
        router, prompts = parse(f"{given.router}:{gamma:g}"), prompts_for(known)
        tasks = repeated_tasks(pair, prompts, router, given.tokens, given.repeats)
        rows += [work(pair, [task.of(n) for task in tasks]) for n in given.n]
    if given.json:
        figures = [asdict(row) | {"acceptance": row.acceptance} for row in rows]
        print(json.dumps({"machine": machine(pair.aligned.device), "thresholds": figures}))
        return
    print(f"{'router':16} {'n':>3} {'tokens/s':>9} {'base':>5} {'accepted':>9} {'forwards':>14}")
    for row in rows:
        accepted = "–" if row.acceptance is None else f"{row.acceptance:.0%}"
        forwards = " and ".join(f"{row.forwards[source]:.2f}" for source in MODELS)
        print(
            f"{row.router:16} {row.n:3} {row.tokens_per_second:9.0f} {row.base_share:5.0%} "
            f"{accepted:>9} {forwards:>14}"
        )
    print("forwards per token of the base and of the aligned model; the naive loop's are 1.00")


if __name__ == "__main__":
    launch(main)
