"""``baco bench``: how fast paired decoding is, next to other ways, in one run on this machine."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baco.cli import options as opt
from baco.cli.bench_table import show
from baco.cli.console import err, print_json
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.bench.settings import Settings
    from baco.models.known_pairs import KnownPair

_GAMMAS = (0.2, 0.4, 0.6)
_SAMPLES = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Which pair is timed."""

    pair: Annotated[
        str | None, typer.Argument(metavar="[PAIR]", help="Short name or folder of a pair.")
    ] = None
    base: opt.BaseName = None
    aligned: opt.AlignedName = None
    body: Annotated[
        str | None,
        typer.Option("--body", help="The demo pair in a larger model: 50m, 0.2b, 0.5b, 1b or 8b."),
    ] = None
    random: Annotated[
        str | None,
        typer.Option("--random", help="A pair of random weights of such a size, tuned to agree."),
    ] = None

    def known(self, dtype: str | None) -> "KnownPair":
        """The pair; one of ``--body`` and ``--random`` is made where it is not there yet.

        Raises:
            BacoError: more than one pair, no such pair, size or dtype.
        """
        from baco.bench.weights import made
        from baco.models.known_pairs import choose_pair

        named = [self.pair, self.body, self.random, self.base or self.aligned]
        if sum(name is not None for name in named) > 1:
            raise BacoError("give one pair: PAIR, --body, --random, or --base with --aligned")
        if self.body is not None:
            return made("body", self.body, dtype or "float32")
        if self.random is not None:
            return made("random", self.random, dtype or "float32")
        return choose_pair(self.pair, self.base, self.aligned)


@dataclass(frozen=True, slots=True)
class RaceOptions:
    """What is timed."""

    router: Annotated[str, typer.Option("--router", "-r", help="Router of the race.")] = (
        "P-Punc:0.4"
    )
    gamma: Annotated[
        list[float] | None,
        typer.Option("--gamma", help="Thresholds of the sweep; may be given several times."),
    ] = None
    n: Annotated[
        list[int] | None,
        typer.Option(
            "--n",
            "-n",
            min=1,
            help="Answers to a prompt; may be given several times.  [default: 1, 8, 32]",
        ),
    ] = None
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Of every answer; no end of text is drawn.")
    ] = 64
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Each with a prompt and a seed of its own.")
    ] = 5
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Parts to measure; may be given several times."),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute on the demo pair.")] = False
    most_asked: Annotated[
        int | None,
        typer.Option(
            "--most-asked",
            min=1,
            help="Answers up to which the servers take part.  [default: 8, with --quick 1]",
        ),
    ] = None

    def settings(self) -> "Settings":
        """The settings of the race.

        Raises:
            BacoError: an unknown part or router, or a threshold for a router without one.
        """
        from baco.bench.settings import ASKED_FOR, PARTS, Settings
        from baco.routing.parser import needs_threshold, router, router_name

        for part in self.only or ():
            if part not in PARTS + ASKED_FOR:
                raise BacoError(f"--only {part}: use some of {', '.join(PARTS + ASKED_FOR)}")
        chosen = router(self.router)
        name = router_name(self.router)
        if self.gamma and not needs_threshold(name):
            raise BacoError(
                f"--gamma goes with a router that has a threshold, not with {self.router}"
            )
        gammas = (self.gamma or _GAMMAS) if needs_threshold(name) else ()
        return Settings(
            router=chosen,
            gammas=tuple(router(f"{name}:{gamma:g}") for gamma in gammas),
            tokens=self.tokens,
            samples=tuple(sorted(set(self.n or _SAMPLES))),
            repeats=min(self.repeats, 3) if self.quick else self.repeats,
            parts=frozenset(self.only or PARTS),
            most_asked=self.most_asked or (1 if self.quick else 8),
        )


@opt.grouped(without=["quantize", "draft", "memory"])
def bench(
    *,
    pair: PairOptions,
    race: RaceOptions,
    weights: opt.WeightOptions,
    as_json: opt.AsJson = False,
) -> None:
    """Time paired decoding next to other ways, on the same weights, prompts and machine.

    Other ways are generate on the aligned model alone and a loop that runs both models at every
    token. A ratio above 1 says that paired decoding is the faster.
    """
    from baco.bench.measure import measure, steps
    from baco.bench.weights import load

    settings = race.settings()
    opt.quiet_libraries()
    with _progress(steps(settings) + 1) as say:
        say("making and loading the pair")
        known = pair.known(weights.dtype)
        loaded = load(known, weights.dtype, weights.device, compile=bool(weights.compile))
        report = measure(loaded, _prompts(known), settings, say)
    report["command"] = shlex.join(["baco", *sys.argv[1:]])
    if as_json:
        print_json(report)
    else:
        show(report)


def _prompts(known: "KnownPair") -> list[str]:
    """Prompts with long answers: on them the demo pair's halves agree as published pairs do."""
    from baco.bench.weights import speaks_demo
    from baco.calibration.measure import open_prompts
    from baco.demo.world import questions

    if not speaks_demo(known):
        return open_prompts()
    return [q.text for q in questions("dev", 60, 0) if q.family in ("story", "poem")]


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Shows what is being done; the step that is said last is under way."""
    console = err()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=steps)

        def say(doing: str) -> None:
            progress.update(bar, description=doing, advance=1)

        yield say
