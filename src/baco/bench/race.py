"""Contestants take turns, repeat by repeat, so that a busy moment of the machine hurts all alike.

Every repeat has a prompt and a seed of its own; every figure is a median over repeats.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

from baco.bench.contestants import Contestant, Run, Task

# Tokens that are decoded before anything is timed.
WARM_UP = 8


@dataclass(slots=True)
class Entry:
    """A contestant at one number of answers.

    Attributes:
        name: of the contestant.
        n: answers to each prompt.
        contestant: decodes.
        runs: one for every repeat.
    """

    name: str
    n: int
    contestant: Contestant
    runs: list[Run] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Name of the ratio with this entry; n = 1 is left out, except for ``generate``."""
        single = self.n == 1 and not self.name.startswith("generate")
        return self.name if single else f"{self.name}_n{self.n}"

    @property
    def speed(self) -> float:
        """Tokens or characters per second of all answers together, median."""
        return median(run.speed for run in self.runs)

    @property
    def first(self) -> float:
        """Seconds until the first token, median."""
        return median(run.first for run in self.runs)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed of one entry over another's, compared repeat by repeat.

    Attributes:
        middle, low, high: median, least and greatest over the repeats; above 1 is faster.
    """

    middle: float
    low: float
    high: float


def race(entries: Sequence[Entry], tasks: Sequence[Task], advance: Callable[[str], None]) -> None:
    """Let every entry decode every task once; every other repeat reverses the order.

    Args:
        entries: receive their runs.
        tasks: one for every repeat.
        advance: called with an entry's name before it runs.
    """
    for entry in entries:
        advance(f"warming up: {entry.name}")
        entry.contestant.decode(tasks[0].of(entry.n, min(WARM_UP, tasks[0].params.max_tokens)))
    for repeat, task in enumerate(tasks):
        for entry in entries if repeat % 2 == 0 else reversed(entries):
            advance(f"{entry.name}, n = {entry.n}")
            entry.runs.append(entry.contestant.decode(task.of(entry.n)))


def ratios(entries: Sequence[Entry]) -> dict[str, Ratio]:
    """Speed of paired decoding over each contestant's at the same n."""
    result = {}
    for paired, entry in _against_paired(entries):
        runs = zip(paired.runs, entry.runs, strict=True)
        speeds = [own.speed / other.speed for own, other in runs]
        result[entry.key] = Ratio(median(speeds), min(speeds), max(speeds))
    return result


def same_answers(entries: Sequence[Entry]) -> dict[str, float]:
    """Share of answers in which the naive loop has the same tokens and the same sources."""
    shares = {}
    for paired, entry in _against_paired(entries):
        if entry.name == "naive":
            same = [
                left == right
                for own, other in zip(paired.runs, entry.runs, strict=True)
                for left, right in zip(
                    zip(own.answers, own.sources, strict=True),
                    zip(other.answers, other.sources, strict=True),
                    strict=True,
                )
            ]
            shares[entry.key] = sum(same) / len(same)
    return shares


def _against_paired(entries: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """Each contestant beside paired decoding at the same n."""
    paired = {entry.n: entry for entry in entries if entry.name == "paired"}
    return ((paired[entry.n], entry) for entry in entries if entry.name != "paired")
