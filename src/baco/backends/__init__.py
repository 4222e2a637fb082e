"""Where a pair is decoded: in this process, or by an engine outside of it.

A backend provides an engine for `baco.decoder.Decoder` and a pair without weights. Text, stop
strings, routers, the server and its page use the same code with all backends.
"""

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from baco.errors import BacoError
from baco.models.llama_cpp.library import ENGINE
from baco.plugins import plugins

if TYPE_CHECKING:
    from collections.abc import Mapping

    from baco.backends.base import Backend
    from baco.models.known_pairs import KnownPair
    from baco.models.pair import Pair

LOCAL, LLAMA_CPP = "local", "llamacpp"
# The backends of this process; they have the same engine.
HERE = (LOCAL, LLAMA_CPP)
# Each module has ``connect(known, **options) -> (Pair, Backend)``; an entry point names such a
# function.
_HOMES = {"remote": "baco.backends.remote", "vllm": "baco.backends.vllm"}
# Of commands of many prompts: a cluster (`baco.batch`) of replicas with backends of their own.
RAY = "ray"


def names() -> tuple[str, ...]:
    """The backends of one pair, those of installed packages (``baco.backends``) included.

    Raises:
        BacoError: an installed package's backend cannot be loaded.
    """
    return (*HERE, *_HOMES, *plugins("backends"))


def backend_of(weights: "Mapping[str, str]") -> str:
    """The backend of this process that holds weights.

    Args:
        weights: their formats, as `baco.models.pair.Pair.weights_formats` has them.
    """
    return LLAMA_CPP if any(ENGINE in form for form in weights.values()) else LOCAL


def check_name(name: str) -> None:
    """Raise BacoError if no backend of one pair has this name."""
    if name == RAY:
        raise BacoError(
            "backend ray is a whole cluster of pairs: give it to 'baco batch' or 'baco sweep'; "
            f"here use one of {', '.join(names())}"
        )
    if name not in names():
        raise BacoError(f"unknown backend {name!r}: use one of {', '.join(names())}")


def connect(
    name: str, known: "KnownPair", max_rows: int, options: dict[str, Any]
) -> "tuple[Pair, Backend]":
    """Connect to a backend outside of this process.

    Args:
        name: one of :func:`names`, but not of this process.
        known: where the pair's tokenizers and configurations are.
        max_rows: answers decoded at once, for backends that take this option.
        options: the backend's own.

    Raises:
        BacoError: an unknown option, a missing package, or the backend's own error.
    """
    try:
        reach = import_module(_HOMES[name]).connect if name in _HOMES else plugins("backends")[name]
    except ImportError as error:
        raise BacoError(
            f"the {name} backend needs {error.name}: install it with pip install 'baco[{name}]'"
        ) from error
    takes = [option for option in inspect.signature(reach).parameters if option != "known"]
    for option in options:
        if option not in takes:
            raise BacoError(
                f"the {name} backend takes no {option}; its options are {', '.join(takes)}"
            )
    if "max_rows" in takes:
        options = {"max_rows": max_rows, **options}
    pair, backend = reach(known, **options)
    return pair, backend
