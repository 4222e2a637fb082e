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
PARTS = ("generate", "naive", "http", "bound", "gammas", "memory", "prompt")
# Servers that read every request whole take long; they are timed when asked for.
ASKED_FOR = ("http_rereads",)
_SERVERS = ("http", "http_rereads")
_PACKED = "_packed"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured.

    Attributes:
        router: of the race.
        gammas: routers of the sweep, one for each γ.
        tokens: of every answer.
        samples: numbers of answers to a prompt, n; 1 is among them.
        repeats: of every contestant, each with a prompt and seed of its own.
        parts: some of PARTS and ASKED_FOR.
    """

    router: Router
    gammas: tuple[Router, ...]
    tokens: int
    samples: tuple[int, ...]
    repeats: int
    parts: frozenset[str]


def line_up(settings: Settings, weights: Weights) -> list[tuple[str, int]]:
    """Who races at which n.

    Generate and the loop also race on packed weights, where they are others: the difference is what
    packing does, the rest is what the engine does. Servers answer one prompt at a time.
    """
    names = ["paired"]
    for name in ("generate", "naive"):
        if name in settings.parts:
            names += [name] if weights.alike else [name, name + _PACKED]
    found = [(name, n) for n in settings.samples for name in names]
    return found + [(name, 1) for name in _SERVERS if name in settings.parts]


def entries(settings: Settings, weights: Weights, servers: ExitStack) -> list[Entry]:
    """The line-up, ready to race; ``servers`` stops what had to be started.

    Raises:
        BacoError: servers cannot be started here.
    """
    there: Mapping[str, Contestant] = {
        "paired": Paired(weights.packed),
        "generate": Generate(weights.plain),
        "naive": Naive(weights.plain),
        "generate_packed": Generate(weights.packed),
        "naive_packed": Naive(weights.packed),
    }
    started = {
        name: _servers(weights, name, servers) for name in _SERVERS if name in settings.parts
    }
    return [Entry(name, n, {**there, **started}[name]) for name, n in line_up(settings, weights)]


def _servers(weights: Weights, name: str, servers: ExitStack) -> Contestant:
    try:
        from baco.bench.servers import two_servers
    except ImportError as error:
        raise BacoError(
            f"two servers need {error.name}: install it with pip install 'baco[bench]', or name "
            "other parts with --only"
        ) from error
    return servers.enter_context(two_servers(weights.plain, rereads=name == "http_rereads"))
