"""The terminal's picture as an SVG file, without scripts and external fonts."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from baco.files import write_output
from baco.models.known_pairs import DEMO
from baco.text.invalid_characters import well_formed

WIDTH = 96
# The options of settings whose names are plural: each value has an option of its own.
_SINGULAR = {"dry_breakers": "dry_breaker", "samplers": "sampler"}

# Dark on white: the colours of both sources are readable, on a light page and on a dark one.
PAPER = TerminalTheme(
    background=(255, 255, 255),
    foreground=(36, 41, 46),
    normal=[
        (36, 41, 46), (190, 30, 45), (0, 120, 70), (150, 110, 0),
        (0, 114, 178), (130, 60, 140), (0, 120, 130), (110, 118, 125),
    ],
)  # fmt: skip


def command_line(
    prompt: str, pair: str, router: str, settings: Mapping[str, Any], *, compare: bool = False
) -> str:
    """The command that gives the same answers; FILE stands for a schema or a grammar."""
    parts = ["baco generate", _quoted(prompt), f"-n {settings['n']}", f"--router {router}"]
    parts += ["--compare"] if compare else []
    parts += [f"--seed {settings['seed']}", *_pair_options(pair)]
    for name, value in settings.items():
        if name in ("n", "seed") or value is None or (name, value) == ("switch", "word"):
            continue
        option = "--" + _SINGULAR.get(name, name).replace("_", "-")
        if name in ("schema", "grammar"):
            parts.append(f"{option} FILE")
            continue
        for item in value if isinstance(value, list | tuple) else (value,):
            parts.append(f"{option} {_quoted(item) if isinstance(item, str) else item}")
    return " ".join(parts)


def _pair_options(pair: str) -> list[str]:
    """The options that name a pair; two models have the name ``BASE + ALIGNED``."""
    base, both, aligned = pair.partition(" + ")
    if both:
        return [f"--base {_quoted(base)}", f"--aligned {_quoted(aligned)}"]
    return [] if pair == DEMO else [f"--pair {_quoted(pair)}"]


def _quoted(text: str) -> str:
    return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def draw_svg(path: Path, command: str, view: RenderableType) -> None:
    """Draw ``view`` under its command; the file is written whole or not at all.

    Raises:
        BacoError: the file cannot be written.
    """
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        highlight=False,
        markup=False,
        emoji=False,
        color_system="truecolor",
        no_color=False,
    )
    console.print(Text(f"$ {command}\n", style="bold"))
    console.print(view)
    drawing = well_formed(console.export_svg(title="BACo", theme=PAPER))
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)
    write_output(path, drawing)
