"""Contestants in turn, again and again, so that a machine that is busy for a while hurts all alike.

Each repeat has a prompt and a seed of its own; every figure is a median over repeats.
"""

from collections.abc import Callable, Sequence
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
        n: answers it draws of every prompt.
        contestant: decodes.
        runs: one for every repeat.
    """

    name: str
    n: int
    contestant: Contestant
    runs: list[Run] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per second of all answers together, median."""
        return median(run.speed for run in self.runs)

    @property
    def first(self) -> float:
        """Seconds until the first token, median."""
        return median(run.first for run in self.runs)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast, repeat by repeat.

    Attributes:
        middle, low, high: median, least and greatest over the repeats; above 1 is faster.
    """

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, faster: Entry, slower: Entry) -> "Ratio":
        """Speed of one entry over another's."""
        each = zip(faster.runs, slower.runs, strict=True)
        ratios = [mine.speed / theirs.speed for mine, theirs in each]
        return cls(median(ratios), min(ratios), max(ratios))


def race(entries: Sequence[Entry], tasks: Sequence[Task], advance: Callable[[str], None]) -> None:
    """Let every entry decode every task once; the order turns round from repeat to repeat.

    Args:
        entries: take up their runs.
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
    paired = {entry.n: entry for entry in entries if entry.name == "paired"}
    return {
        key(entry): Ratio.of(paired[entry.n], entry) for entry in entries if entry.name != "paired"
    }


def key(entry: Entry) -> str:
    """What a ratio is called; the loop and the servers are compared at n = 1 unless said."""
    single = entry.n == 1 and not entry.name.startswith("generate")
    return entry.name if single else f"{entry.name}_n{entry.n}"


def same_answers(entries: Sequence[Entry]) -> dict[str, float]:
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
            shares[key(entry)] = same / len(each)
    return shares
