"""How many prompts are answered: a bar on a terminal, a line per minute in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from baco.cli.console import err, note

# Between two lines where there is no terminal, in seconds.
LINE_EVERY = 60.0
# Progress may come in large steps, minutes apart: the pace is a mean over many of them.
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
    """One bar, or lines in its place where there is no terminal.

    Args:
        progress: shows the bar.
        name: of what is counted.
        total: the count at the end.
    """

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._before = self._done = 0.0
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._bar = progress.add_task(name, total=total, rate="")

    def skip(self, there: int) -> None:
        """Begin after the part that an earlier run did; it does not count for the pace."""
        if there:
            note(f"{there} of {self._total} {self._name} were done before: going on")
        self._before = self._done = float(there)
        self._progress.reset(self._bar, completed=there, rate="")

    def advance(self, done: float, tokens: int) -> None:
        """Show more progress."""
        self._done += done
        self._tokens += tokens
        now = time.monotonic()
        rate = f"{self._tokens / max(now - self._started, 1e-9):.0f} tokens/s"
        self._progress.update(self._bar, completed=self._done, rate=rate)
        if self._progress.disable and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (self._total - self._done) * (now - self._started)
            seconds = round(left / max(self._done - self._before, 1e-9))
            note(
                f"{self._done:.0f} of {self._total} {self._name}, {rate}, "
                f"{timedelta(seconds=seconds)} to go"
            )


@contextmanager
def counting(name: str) -> Iterator[Callable[[int], None]]:
    """A count whose end is not known; the function takes how many more there are."""
    with bars() as progress:
        bar = progress.add_task(name, total=None, rate="")
        yield lambda more: progress.advance(bar, more)


@contextmanager
def steps(name: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar without lines for a log; what it yields counts a step, under a new name if given."""
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=total)

        def advance(name: str | None = None) -> None:
            progress.update(bar, description=name, advance=1)

        yield advance


@contextmanager
def answering(name: str, total: int) -> Iterator[Answering]:
    """A single bar."""
    with bars() as progress:
        yield Answering(progress, name, total)
