"""What is measured, and who takes part."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from baco.bench.contestants import Contestant, Generate, Naive, Paired
from baco.bench.race import Entry
from baco.bench.weights import Weights
from baco.errors import BacoError
from baco.routing.routers import Router

# Measured unless some are named.
PARTS = ("undrafted", "generate", "naive", "http", "bound", "gammas", "memory", "prompt")
# Servers that read every request whole take long; they are timed when asked for.
ASKED_FOR = ("http_rereads",)
_SERVERS = ("http", "http_rereads")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        router: of the race.
        gammas: routers of the sweep, one for each γ.
        tokens: of every answer.
        samples: numbers of answers to a prompt, n.
        repeats: of every contestant, each with a prompt and seed of its own.
        parts: some of PARTS and ASKED_FOR.
    """

    router: Router
    gammas: tuple[Router, ...]
    tokens: int
    samples: tuple[int, ...]
    repeats: int
    parts: frozenset[str]


def line_up(settings: Settings) -> list[tuple[str, int]]:
    """Who races at which n.

    The engine also races without drafts: what it is ahead of itself by is speculation, the rest is
    how it reads. Servers answer one prompt at a time.
    """
    others = [name for name in ("undrafted", "generate", "naive") if name in settings.parts]
    names = ["paired", *others]
    found = [(name, n) for n in settings.samples for name in names]
    single = [(name, 1) for name in _SERVERS if name in settings.parts]
    beside = [("paired", 1)] if single and 1 not in settings.samples else []
    return found + beside + single


def entries(settings: Settings, weights: Weights, servers: ExitStack) -> list[Entry]:
    """The line-up, ready to race; ``servers`` stops what had to be started.

    Raises:
        BacoError: servers cannot be started here.
    """
    there: Mapping[str, Contestant] = {
        "paired": Paired(weights.ours),
        "undrafted": Paired(weights.ours, speculate=False),
        "generate": Generate(weights.plain),
        "naive": Naive(weights.plain),
    }
    started = {
        name: _servers(weights, name, servers) for name in _SERVERS if name in settings.parts
    }
    return [Entry(name, n, {**there, **started}[name]) for name, n in line_up(settings)]


def _servers(weights: Weights, name: str, servers: ExitStack) -> Contestant:
    try:
        from baco.bench.servers import two_servers
    except ImportError as error:
        raise BacoError(
            f"two servers need {error.name}: install it with pip install 'baco[bench]', or name "
            "other parts with --only"
        ) from error
    return servers.enter_context(two_servers(weights.plain, rereads=name == "http_rereads"))
