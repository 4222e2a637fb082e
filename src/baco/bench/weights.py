"""The pair that is measured, and the folder where pairs made for measuring lie."""

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch

from baco.bench.bodies import make
from baco.errors import BacoError
from baco.models.known_pairs import DEMO, KnownPair
from baco.models.model import compile_models
from baco.models.pair import Pair, load_pair


@dataclass(frozen=True, slots=True)
class Weights:
    """The same weights twice.

    Attributes:
        ours: laid out as a pair is by default, for the engine.
        plain: as ``transformers`` loads them, for all others.
    """

    ours: Pair
    plain: Pair


def load(
    known: KnownPair, dtype: str | None, device: str | None, *, compile: bool = False
) -> Weights:
    """Load a pair for measuring, the engine's forwards compiled or not.

    Raises:
        BacoError: a pair that cannot be found or loaded, or halves that do not fit.
    """
    ours = load_pair(known, dtype=dtype, device=device)
    if compile:
        compile_models((ours.base, ours.aligned))
    return Weights(ours, load_pair(known, dtype=dtype, device=device, packed=False))


def made(kind: str, size: str, dtype: str) -> KnownPair:
    """A pair of :mod:`baco.bench.bodies`, made where it is not there yet.

    Raises:
        BacoError: no such size or dtype.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise BacoError(f"dtype {dtype!r}: a pair is made in float32, bfloat16 or float16")
    home = Path(os.environ.get("BACO_HOME") or platformdirs.user_cache_dir("baco"))
    folder = home / "bench" / f"{kind}-{size}-{dtype}"
    # What says which pair it is is written last: without it the pair is not whole.
    if not (folder / "baco.json").is_file():
        make(kind, size, folder, getattr(torch, dtype))
    return KnownPair.in_folder(folder)


def speaks_demo(known: KnownPair) -> bool:
    """Does a pair say what the demo pair says, so that it can be asked what that can?"""
    return known.name == DEMO or known.name.startswith("body:")
