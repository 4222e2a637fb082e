"""What the terminal shows: the two colours, errors in one line, progress on standard error."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from baco.text import Piece

# Orange and blue of a colour-blind-safe palette (Okabe and Ito 2008); base words are underlined
# too, so that nothing hangs on colour alone.
STYLES = {"base": "underline #E69F00", "aligned": "#56B4E9"}


def out() -> Console:
    """Standard output: colours in a terminal, none in a pipe, NO_COLOR and FORCE_COLOR heeded."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


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
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def coloured(pieces: "Iterable[Piece]") -> Text:
    """Text in the colours of its sources."""
    text = Text()
    for piece in pieces:
        # Spaces are not underlined: a word is, not the gap before it.
        bare = piece.text.lstrip(" ")
        text.append(piece.text[: len(piece.text) - len(bare)])
        text.append(bare, style=STYLES[piece.source])
    return text


def legend() -> Text:
    """Which style is which model."""
    return Text.assemble(("base", STYLES["base"]), " ", ("aligned", STYLES["aligned"]))
