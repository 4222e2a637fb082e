"""How many prompts are answered: a bar in a terminal, a line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from baco.cli.console import err, note

# Between two lines where there is no terminal, in seconds.
LINE_EVERY = 60.0
# What is told may come in large pieces, minutes apart: the pace is taken over many of them.
PACE_SECONDS = 1800.0


@contextmanager
def bars() -> Iterator[Progress]:
    """Bars on standard error, where that is a terminal."""
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=PACE_SECONDS,
        redirect_stdout=False,
    ) as progress:
        yield progress


class Answering:
    """One bar, and the lines that stand for it.

    Args:
        progress: where the bar goes.
        name: of what is counted.
        total: of them.
    """

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._there = self._done = 0.0
        self._tokens = 0
        self._started = self._said = time.monotonic()
        self._bar = progress.add_task(name, total=total, rate="")

    def skip(self, there: int) -> None:
        """Begin behind what an earlier run did, which says nothing of this one's pace."""
        if there:
            note(f"{there} of {self._total} {self._name} were done before: going on")
        self._there = self._done = float(there)
        self._progress.reset(self._bar, completed=there, rate="")

    def advance(self, done: float, tokens: int) -> None:
        """Tell of more that is done."""
        self._done += done
        self._tokens += tokens
        now = time.monotonic()
        rate = f"{self._tokens / max(now - self._started, 1e-9):.0f} tokens/s"
        self._progress.update(self._bar, completed=self._done, rate=rate)
        if self._progress.disable and now - self._said >= LINE_EVERY:
            self._said = now
            left = (self._total - self._done) * (now - self._started)
            seconds = round(left / max(self._done - self._there, 1e-9))
            note(
                f"{self._done:.0f} of {self._total} {self._name}, {rate}, "
                f"{timedelta(seconds=seconds)} to go"
            )


@contextmanager
def answering(name: str, total: int) -> Iterator[Answering]:
    """A bar alone."""
    with bars() as progress:
        yield Answering(progress, name, total)
