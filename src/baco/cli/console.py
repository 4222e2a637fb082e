r"""Terminal output: the two colours, errors in one line, progress on standard error.

Prompts, answers, file names and servers' messages may contain control characters. A terminal gets
none of them: answers have U+FFFD in their place, messages an escape such as ``\x1b``. Pipes and
files get them unchanged, as data.
"""

import io
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn, Self

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment
from rich.text import Text

from baco.errors import BacoError
from baco.text.invalid_characters import CONTROL, escaped, json_line

if TYPE_CHECKING:
    from baco.text.answer_text import Piece

# Vermilion and blue of a colour-blind-safe palette (Okabe and Ito 2008), readable on white and on
# black. Base words are underlined too, so that colour is not the only sign.
STYLES: dict[str | None, str] = {"base": "underline #D55E00", "aligned": "#0072B2"}

_REPLACED = dict.fromkeys(CONTROL, "\ufffd") | {ord("\r"): ""}
# Names and answers may contain rich's markup.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


class Debug:
    """Whether ``--debug`` or BACO_DEBUG asks for tracebacks and the messages of libraries."""

    on = False


class OutputError(BacoError):
    """Standard output cannot be written."""


class StandardOutput(io.TextIOWrapper):
    """Standard output that raises `OutputError`, except for a broken pipe."""

    @classmethod
    def over(cls, stream: io.TextIOWrapper) -> Self:
        """Wrap a stream, which cannot be used any more afterwards."""
        encoding, errors, by_line = stream.encoding, stream.errors, stream.line_buffering
        return cls(stream.detach(), encoding, errors, line_buffering=by_line)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refused(error) from error
        except UnicodeEncodeError as error:
            raise OutputError(
                f"standard output is in {self.encoding}, which has no {error.object[error.start]!r}"
                ": set PYTHONIOENCODING=utf-8"
            ) from error

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _refused(error) from error


def _refused(error: OSError) -> OutputError:
    return OutputError(f"cannot write to standard output: {error.strerror}")


class _WithoutControlCharacters:
    """Renders something without control characters except those of styles and the cursor."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            text, style, control = segment
            yield segment if control else Segment(text.translate(_REPLACED), style)


class _RemoveControlCharacters(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_WithoutControlCharacters(renderable) for renderable in renderables]


class _Output(Console):
    def on_broken_pipe(self) -> None:
        reader_left()


def reader_left() -> NoReturn:
    """End quietly when the reader of standard output has ended, as in ``baco … | head``."""
    give_up_output()
    raise typer.Exit


def give_up_output() -> None:
    """Discard buffered standard output, so that Python reports no error at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out() -> Console:
    """Standard output: colours on a terminal, none in a pipe; follows NO_COLOR and FORCE_COLOR.

    Every print is flushed.
    """
    return _guarded(_Output(**_PLAIN, soft_wrap=not sys.stdout.isatty()))


def err() -> Console:
    """Standard error, for progress and notes."""
    return _guarded(Console(**_PLAIN, stderr=True, soft_wrap=not sys.stderr.isatty()))


def _guarded(console: Console) -> Console:
    if console.is_terminal:
        console.push_render_hook(_RemoveControlCharacters())
    return console


def write(text: str) -> None:
    """Write text on standard output unchanged, for a pipe.

    A terminal gets :func:`coloured` text through :func:`out`.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()


def complain(message: str, error: BaseException | None = None) -> None:
    """Print one line on standard error; with ``--debug`` the traceback of ``error`` before it."""
    line = " ".join(message.split())
    with suppress(OSError):  # standard error is closed or full
        if Debug.on and error is not None:
            err().print(Text(escaped("".join(traceback.format_exception(error)))), end="")
        err().print(Text("baco: ", style="bold red") + Text(escaped(line)))


def note(message: str) -> None:
    """Print a remark on standard error."""
    err().print(Text(escaped(message), style="dim"))


def print_json(value: Any) -> None:
    """Print one JSON value on standard output."""
    write(json_line(value) + "\n")


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of equal length on standard output, the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        out().print("  " + "  ".join(cells).rstrip())


def coloured(pieces: "Iterable[Piece]") -> Text:
    """Text in the colours of its sources, for a terminal or a picture.

    The gaps between words are not underlined.
    """
    text = Text()
    for source, same in groupby(pieces, key=lambda piece: piece.source):
        words = "".join(piece.text for piece in same).translate(_REPLACED)
        for part in re.split(r"(\s+)", words):
            text.append(part, style=STYLES.get(source) if part.strip() else None)
    return text


def dimmed(text: str) -> Text:
    """Text of no source, for a terminal or a picture."""
    return Text(text.translate(_REPLACED), style="dim")


def show(console: Console, pieces: "Iterable[Piece]") -> None:
    """Print text on standard output, :func:`out`: coloured on a terminal, else unchanged."""
    if console.is_terminal:
        console.print(coloured(pieces), end="")
    else:
        write("".join(piece.text for piece in pieces))


def legend() -> Text:
    """The key to the two styles."""
    return Text.assemble(
        ("words from ", "dim"),
        ("base", STYLES["base"]),
        (" and ", "dim"),
        ("aligned", STYLES["aligned"]),
    )
