"""What is measured, and who takes part."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from baco.bench.contestants import Contestant, Generate, Naive, Paired
from baco.bench.race import Entry
from baco.bench.weights import Weights
from baco.errors import BacoError
from baco.routing.router import Router

# Measured unless some are named.
PARTS = (
    "undrafted",
    "generate",
    "naive",
    "http",
    "http_concurrent",
    "bound",
    "gammas",
    "memory",
    "prompt",
)
# Servers that read every request whole take long; they are timed when asked for.
ASKED_FOR = ("http_rereads",)
_SERVERS = ("http", "http_concurrent", "http_rereads")


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
        most_asked: answers that servers are asked for; more would only take longer in proportion.
    """

    router: Router
    gammas: tuple[Router, ...]
    tokens: int
    samples: tuple[int, ...]
    repeats: int
    parts: frozenset[str]
    most_asked: int = 8


def line_up(settings: Settings) -> list[tuple[str, int]]:
    """Who races at which n.

    The engine also races without drafts: what it is ahead of itself by is speculation, the rest is
    how it reads.
    """
    others = [name for name in ("undrafted", "generate", "naive") if name in settings.parts]
    names = ["paired", *others]
    found = [(name, n) for n in settings.samples for name in names]
    asked = [name for name in _SERVERS if name in settings.parts]
    few = [n for n in settings.samples if n <= settings.most_asked]
    beside = [("paired", 1)] if asked and not few else []
    return found + beside + [(name, n) for n in few or (1,) for name in asked]


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
        name: _servers(weights, name, settings.most_asked, servers)
        for name in _SERVERS
        if name in settings.parts
    }
    return [Entry(name, n, {**there, **started}[name]) for name, n in line_up(settings)]


def _servers(weights: Weights, name: str, answers: int, servers: ExitStack) -> Contestant:
    try:
        from baco.bench.servers import two_servers
    except ImportError as error:
        raise BacoError(
            f"two servers need {error.name}: install it with pip install 'baco[bench]', or name "
            "other parts with --only"
        ) from error
    concurrent = answers if name == "http_concurrent" else 0
    rereads = name == "http_rereads"
    return servers.enter_context(two_servers(weights.plain, concurrent=concurrent, rereads=rereads))
