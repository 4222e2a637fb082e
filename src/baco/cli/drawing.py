"""What the terminal shows, as an SVG file for a page: no script, no font from elsewhere."""

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from baco import BacoError

WIDTH = 96

# Dark on white: both of the sources' colours can be read on it, on a light page and on a dark one.
PAPER = TerminalTheme(
    background=(255, 255, 255),
    foreground=(36, 41, 46),
    normal=[
        (36, 41, 46), (190, 30, 45), (0, 120, 70), (150, 110, 0),
        (0, 114, 178), (130, 60, 140), (0, 120, 130), (110, 118, 125),
    ],
)  # fmt: skip


def command_line(
    prompt: str, router: str, settings: dict[str, Any], *, compare: bool = False
) -> str:
    """The command that gives these answers again."""
    escaped = re.sub(r'([\\"$`])', r"\\\1", prompt)
    parts = ["baco generate", f'"{escaped}"', f"-n {settings['n']}", f"--router {router}"]
    parts += ["--compare"] if compare else []
    return " ".join([*parts, f"--seed {settings['seed']}"])


def draw_svg(path: Path, command: str, view: RenderableType) -> None:
    """Draw ``view`` under the command it came from (written whole or not at all).

    Raises:
        BacoError: a file that cannot be written.
    """
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        highlight=False,
        color_system="truecolor",
        no_color=False,
    )
    console.print(Text(f"$ {command}\n", style="bold"))
    console.print(view)
    drawing = console.export_svg(title="BACo", theme=PAPER)
    drawing = re.sub(r"@font-face \{.*?\}\s*", "", drawing, flags=re.DOTALL)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(drawing, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise BacoError(f"cannot write {path}: {error.strerror}") from error
