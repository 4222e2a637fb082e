"""``baco bench``: how fast paired decoding is, next to other ways, in one run on this machine."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

_ROUTER = "P-Punc:0.4"
_GAMMAS = (0.2, 0.4, 0.6)
_SAMPLES = (1, 8, 32)


def bench(
    pair: Annotated[
        str | None, typer.Argument(metavar="[PAIR]", help="Short name or folder of a pair.")
    ] = None,
    base: opt.BaseName = None,
    aligned: opt.AlignedName = None,
    body: Annotated[
        str | None,
        typer.Option("--body", help="The demo pair in a larger model: 50m, 0.2b, 0.5b, 1b or 8b."),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option("--random", help="A pair of random weights of such a size, tuned to agree."),
    ] = None,
    router: Annotated[str, typer.Option("--router", "-r", help="Router of the race.")] = _ROUTER,
    gamma: Annotated[
        list[float] | None,
        typer.Option("--gamma", help="Thresholds of the sweep; may be given several times."),
    ] = None,
    n: Annotated[
        list[int] | None,
        typer.Option(
            "--n",
            "-n",
            min=1,
            help="Answers to a prompt; may be given several times.  [default: 1, 8, 32]",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Of every answer; no end of text is drawn.")
    ] = 64,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Each with a prompt and a seed of its own.")
    ] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Parts to measure; may be given several times."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under a minute on the demo pair.")
    ] = False,
    most_asked: Annotated[
        int | None,
        typer.Option(
            "--most-asked",
            min=1,
            help="Answers up to which the servers take part.  [default: 8, with --quick 1]",
        ),
    ] = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    compile: opt.Compile = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time paired decoding next to other ways, on the same weights, prompts and machine.

    Other ways are generate on the aligned model alone and a loop that runs both models at every
    token. A ratio above 1 says that paired decoding is the faster.
    """
    from baco.bench.measure import measure, steps
    from baco.bench.weights import load

    settings = _settings(router, gamma, n, tokens, repeats, only, quick, most_asked)
    opt.hush()
    with _progress(steps(settings) + 1) as say:
        say("making and loading the pair")
        known = _pair(pair, base, aligned, body, random, dtype)
        weights = load(known, dtype, device, compile=bool(compile))
        report = measure(weights, _prompts(known), settings, say)
    report["command"] = shlex.join(["baco", *sys.argv[1:]])
    if as_json:
        print_json(report)
    else:
        show(report)


def _settings(
    router: str,
    gammas: list[float] | None,
    samples: list[int] | None,
    tokens: int,
    repeats: int,
    only: list[str] | None,
    quick: bool,
    most_asked: int | None,
) -> "Settings":
    from baco.bench.settings import ASKED_FOR, PARTS, Settings
    from baco.routing.parser import needs_threshold, router_name
    from baco.routing.parser import router as parse

    for part in only or ():
        if part not in PARTS + ASKED_FOR:
            raise BacoError(f"--only {part}: use some of {', '.join(PARTS + ASKED_FOR)}")
    chosen = parse(router)
    name = router_name(router)
    swept = tuple(gammas or _GAMMAS) if needs_threshold(name) else ()
    if gammas and not swept:
        raise BacoError(f"--gamma goes with a router that has a threshold, not with {router}")
    return Settings(
        router=chosen,
        gammas=tuple(parse(f"{name}:{gamma:g}") for gamma in swept),
        tokens=tokens,
        samples=tuple(sorted(set(samples or _SAMPLES))),
        repeats=min(repeats, 3) if quick else repeats,
        parts=frozenset(only or PARTS),
        most_asked=most_asked or (1 if quick else 8),
    )


def _pair(
    pair: str | None,
    base: str | None,
    aligned: str | None,
    body: str | None,
    random: str | None,
    dtype: str | None,
) -> "KnownPair":
    from baco.bench.weights import made
    from baco.models.known_pairs import DEMO, KnownPair, find_pair

    named = [pair, body, random, base or aligned]
    if sum(name is not None for name in named) > 1:
        raise BacoError("give one pair: PAIR, --body, --random, or --base with --aligned")
    if body is not None or random is not None:
        return made("random" if body is None else "body", body or random or "", dtype or "float32")
    if base is not None and aligned is not None:
        return KnownPair(f"{base} + {aligned}", base, aligned)
    if base is not None or aligned is not None:
        raise BacoError("give both --base and --aligned, or neither and the name of a pair")
    return find_pair(pair if pair is not None else DEMO)


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
