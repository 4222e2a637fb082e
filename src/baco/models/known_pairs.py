"""Pairs by short name: the table in ``pairs.toml``. Nothing here loads a model."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self

from baco.errors import BacoError
from baco.models.files import read_json_object
from baco.sampling.params import SamplingParams
from baco.source import MODELS, Source

DEMO = "demo"


@dataclass(frozen=True, slots=True)
class KnownPair:
    """Where the two models of a pair are, and the settings that its makers chose.

    Attributes:
        name: short name, or the folder's path.
        base, aligned: hub ids or folders.
        chat_options: variables for the aligned model's chat template.
        sampling: the pair's own sampling parameters, in place of the general ones.
        dtype: of its weights where the caller names none; None for what suits the device.
        untested: its ids are published, but it has not been tried with BACo.
    """

    name: str
    base: str
    aligned: str
    chat_options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    untested: bool = False

    @classmethod
    def in_folder(cls, folder: Path, name: str | None = None) -> Self:
        """A pair kept in one folder: ``base/`` and ``aligned/``, or ``base.gguf`` and
        ``aligned.gguf``, and, if there, ``baco.json``.

        Raises:
            BacoError: ``baco.json`` cannot be read, or has a value that is not allowed.
        """
        about = folder / "baco.json"
        settings = read_json_object(about) if about.is_file() else {}
        for key, kind, expected in (
            ("name", str, "a text"),
            ("chat_options", dict, "an object"),
            ("sampling", dict, "an object"),
            ("dtype", str, "a text"),
        ):
            if not isinstance(settings.get(key), kind | None):
                raise BacoError(
                    f"{about}: {key} is {settings[key]!r}: give {expected} or leave it out"
                )
        sampling = settings.get("sampling") or {}
        try:
            SamplingParams().updated(sampling)
        except BacoError as error:
            raise BacoError(f"{about}, sampling: {error}") from error
        return cls(
            name or settings.get("name") or str(folder),
            str(folder / _model_in(folder, "base")),
            str(folder / _model_in(folder, "aligned")),
            settings.get("chat_options") or {},
            sampling,
            settings.get("dtype"),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The content of its ``baco.json``."""
        settings = {
            "name": self.name,
            "chat_options": dict(self.chat_options),
            "sampling": dict(self.sampling),
            "dtype": self.dtype,
        }
        return {key: value for key, value in settings.items() if value}


@cache
def known_pairs() -> tuple[KnownPair, ...]:
    """Every pair that has a short name."""
    text = resources.files("baco").joinpath("models", "pairs.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)
    return tuple(
        KnownPair.in_folder(demo_folder(), DEMO)
        if name == DEMO
        else KnownPair(
            name,
            row["base"],
            row["aligned"],
            row.get("chat_options", {}),
            untested=row.get("untested", False),
        )
        for name, row in rows.items()
    )


def demo_folder() -> Path:
    """The folder of the embedded pair: ``base/``, ``aligned/`` and ``baco.json``."""
    return Path(str(resources.files("baco").joinpath("demo", "weights")))


def find_pair(name: str) -> KnownPair:
    """The pair in a folder, or of a short name in any case.

    Raises:
        BacoError: there is neither; the message has the nearest short names.
    """
    folder = Path(name)
    if all((folder / _model_in(folder, source)).exists() for source in MODELS):
        return KnownPair.in_folder(folder)
    by_name = {pair.name: pair for pair in known_pairs()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4) or [DEMO]
    raise BacoError(
        f"unknown pair {name!r}: no folder with base/ and aligned/ and no short name; nearest are "
        f"{', '.join(near)} (see 'baco pairs'), or give a base and an aligned model"
    )


def _model_in(folder: Path, source: Source) -> str:
    """The name of a model in the folder of a pair."""
    return source if (folder / source).is_dir() else f"{source}.gguf"


def choose_pair(name: str | None, base: str | None, aligned: str | None) -> KnownPair:
    """The pair of a name, or of two models; the demo pair where nothing is named.

    Raises:
        BacoError: an unknown name, one model without the other, or a name beside models.
    """
    if (base is None) != (aligned is None):
        raise BacoError("give both base and aligned, or neither and the name of a pair")
    if base is None or aligned is None:
        return find_pair(name if name is not None else DEMO)
    if name is not None:
        raise BacoError(f"give the pair {name!r} or base and aligned, not both")
    return KnownPair(f"{base} + {aligned}", base, aligned)
