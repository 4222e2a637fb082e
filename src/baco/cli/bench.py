"""``baco bench``: the speed of paired decoding next to other ways, in one run on this machine."""

import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from baco.cli import options as opt
from baco.cli.bench_table import show
from baco.cli.console import print_json
from baco.cli.progress import steps
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.bench.measure import Settings

_SAMPLES = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Which pair is timed."""

    pair: Annotated[
        str | None, typer.Argument(metavar="[PAIR]", help="Short name or folder of a pair.")
    ] = None
    base: opt.BaseName = None
    aligned: opt.AlignedName = None


@dataclass(frozen=True, slots=True)
class RaceOptions:
    """What is timed."""

    router: Annotated[str, typer.Option("--router", "-r", help="Router of paired decoding.")] = (
        "P-Punc:0.4"
    )
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
        int, typer.Option("--tokens", min=1, help="Length of every answer: no end is drawn.")
    ] = 64
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Repeats, each with its own prompt and seed.")
    ] = 5
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="undrafted, generate, naive, bound; several times for more."),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="At most 3 repeats.")] = False

    def settings(self) -> "Settings":
        """The settings of the race.

        Raises:
            BacoError: an unknown part or router.
        """
        from baco.bench.measure import PARTS, Settings
        from baco.routing.parser import router
        from baco.routing.router import further_reads

        chosen = router(self.router)
        if (more := further_reads(chosen)) is not None:
            raise BacoError(
                f"--router {self.router} reads {more}, which the naive loop does not supply: give "
                "a router such as P-Punc:0.4"
            )
        for part in self.only or ():
            if part not in PARTS:
                raise BacoError(f"--only {part}: use some of {', '.join(PARTS)}")
        return Settings(
            router=chosen,
            tokens=self.tokens,
            samples=tuple(sorted(set(self.n or _SAMPLES))),
            repeats=min(self.repeats, 3) if self.quick else self.repeats,
            parts=frozenset(self.only or PARTS),
        )


@opt.grouped(without=["quantize", "draft", "memory", "enable_prefix_caching"])
def bench(
    *,
    pair: PairOptions,
    race: RaceOptions,
    weights: opt.WeightOptions,
    as_json: opt.AsJson = False,
) -> None:
    """Time paired decoding next to other ways, on the same weights, prompts and machine.

    The other ways are generate on the aligned model alone and a loop that runs both models at every
    token. A ratio above 1 means that paired decoding is faster. Models with different tokenizers
    are timed by the characters that they write, next to generate alone.
    """
    from baco.bench.measure import load, measure, prompts_for
    from baco.models.known_pairs import choose_pair

    settings = race.settings()
    known = choose_pair(pair.pair, pair.base, pair.aligned)
    opt.quiet_libraries()
    with steps("", settings.steps + 1) as begin:
        begin("loading the pair")
        loaded = load(known, weights.dtype, weights.device, compile=bool(weights.compile))
        report = measure(loaded, prompts_for(known), settings, begin)
    report["command"] = shlex.join(["baco", *sys.argv[1:]])
    if as_json:
        print_json(report)
    else:
        show(report)
