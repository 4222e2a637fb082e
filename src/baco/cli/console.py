"""What the terminal shows: the two colours, errors in one line, progress on standard error."""

import json
import os
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from baco.text import Piece

# Vermilion and blue of a colour-blind-safe palette (Okabe and Ito 2008), dark enough for a white
# screen and light enough for a black one; base words are underlined too, so that nothing hangs on
# colour alone.
STYLES = {"base": "underline #D55E00", "aligned": "#0072B2"}

# Models may say anything: what would steer the terminal is shown as U+FFFD.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_HARMLESS[ord("\r")] = ""


class _Output(Console):
    def on_broken_pipe(self) -> None:
        reader_left()


def reader_left() -> NoReturn:
    """End quietly: whoever reads standard output has seen enough, as in ``baco … | head``."""
    # What Python still holds must not complain when it is flushed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit


def out() -> Console:
    """Standard output: colours in a terminal, none in a pipe, NO_COLOR and FORCE_COLOR heeded.

    Every print is flushed.
    """
    return _Output(highlight=False, soft_wrap=not sys.stdout.isatty())


def err() -> Console:
    """Standard error, for progress and notes."""
    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def complain(message: str) -> None:
    """One line to standard error."""
    line = " ".join(message.split())
    err().print(Text("baco: ", style="bold red") + Text(line))


def note(message: str) -> None:
    """A remark on standard error that is no error."""
    err().print(Text(message, style="dim"))


def print_json(value: Any) -> None:
    """One JSON value on standard output, nothing else."""
    try:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()


def coloured(pieces: "Iterable[Piece]") -> Text:
    """Text in the colours of its sources; the gaps between words are not underlined."""
    text = Text()
    for source, same in groupby(pieces, key=lambda piece: piece.source):
        said = "".join(piece.text for piece in same).translate(_HARMLESS)
        for part in re.split(r"(\s+)", said):
            text.append(part, style=None if not part or part.isspace() else STYLES[source])
    return text


def legend() -> Text:
    """Which style is which model."""
    return Text.assemble(
        ("words from ", "dim"),
        ("base", STYLES["base"]),
        (" and ", "dim"),
        ("aligned", STYLES["aligned"]),
    )
