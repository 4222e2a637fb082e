"""How paired decoding goes at each threshold of a router: what was drafted, what it took."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from baco.bench.contestants import Paired, Run, Task
from baco.calibration.agreement import Reading
from baco.engine.metrics import Stats
from baco.models.pair import Pair
from baco.source import MODELS


@dataclass(frozen=True, slots=True)
class Work:
    """What paired decoding took.

    Attributes:
        router: its spelling, with γ.
        n: answers of every prompt.
        tokens_per_second: of all answers together, median over prompts.
        base_share: of all tokens.
        drafted, stood: tokens drafted, and how many of them stood.
        rounds: of the engine, for every token of an answer.
        forwards: of each half for every token of an answer; 1 is the naive loop's. Reading the
            prompt counts.
    """

    router: str
    n: int
    tokens_per_second: float
    base_share: float
    drafted: int
    stood: int
    rounds: float
    forwards: dict[str, float]

    @classmethod
    def of(cls, tasks: Sequence[Task], runs: Sequence[Run], told: Sequence[Stats]) -> "Work":
        """Sum up runs of one router at one n."""
        tokens = sum(task.params.max_tokens for task in tasks)
        spoken = [source for run in runs for row in run.sources for source in row]
        return cls(
            tasks[0].router.spelling,
            tasks[0].params.n,
            median(run.speed for run in runs),
            spoken.count("base") / len(spoken),
            sum(stats.drafted for stats in told),
            sum(stats.accepted for stats in told),
            sum(stats.steps for stats in told) / tokens,
            {half: sum(stats.forwards[half] for stats in told) / tokens for half in MODELS},
        )

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that stood; None where none was drafted."""
        return self.stood / self.drafted if self.drafted else None


def work(pair: Pair, tasks: Sequence[Task]) -> Work:
    """Decode tasks of one router and one n, and tell what it took."""
    paired = Paired(pair)
    runs, told = [], []
    for task in tasks:
        runs.append(paired.decode(task))
        assert paired.stats is not None
        told.append(paired.stats)
    return Work.of(tasks, runs, told)


def agreement(pair: Pair, tasks: Sequence[Task], runs: Sequence[Run]) -> float:
    """Share of the answers' positions where both halves find the same token most likely."""
    reading = Reading()
    for task, run in zip(tasks, runs, strict=True):
        reading.add(pair, task.prompt, run.answers[0])
    return reading.agree / max(1, reading.positions)
