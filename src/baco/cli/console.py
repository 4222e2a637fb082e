r"""What the terminal shows: the two colours, errors in one line, progress on standard error.

Prompts, answers, file names and servers' messages may hold control characters, which would steer a
terminal. None reaches one: in answers U+FFFD takes their place, in messages an escape such as
``\x1b``. What goes into a pipe or a file keeps them, since it is data there.
"""

import io
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn, Self

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment
from rich.text import Text

from baco.errors import BacoError
from baco.text.control_characters import CONTROL, escaped, json_line

if TYPE_CHECKING:
    from baco.text.answer_text import Piece

# Vermilion and blue of a colour-blind-safe palette (Okabe and Ito 2008), dark enough for a white
# screen and light enough for a black one; base words are underlined too, so that nothing hangs on
# colour alone.
STYLES = {"base": "underline #D55E00", "aligned": "#0072B2"}

_REPLACED = dict.fromkeys(CONTROL, "\ufffd") | {ord("\r"): ""}
# Names and answers may look like rich's own marks.
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


class Debug:
    """Whether ``--debug`` or BACO_DEBUG asks for tracebacks and the messages of libraries."""

    on = False


class OutputError(BacoError):
    """Standard output takes no more."""


class StandardOutput(io.TextIOWrapper):
    """Standard output whose errors say that they are its own; a broken pipe stays one."""

    @classmethod
    def over(cls, stream: io.TextIOWrapper) -> Self:
        """The same stream; the one that is given cannot be used any more."""
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


class _Harmless:
    """What something renders to, without control characters but those of styles and the cursor."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._renderable, options):
            text, style, control = segment
            yield segment if control else Segment(text.translate(_REPLACED), style)


class _Harmful(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Harmless(renderable) for renderable in renderables]


class _Output(Console):
    def on_broken_pipe(self) -> None:
        reader_left()


def reader_left() -> NoReturn:
    """End quietly: whoever reads standard output has seen enough, as in ``baco … | head``."""
    give_up_output()
    raise typer.Exit


def give_up_output() -> None:
    """Throw away what Python still holds of standard output: it must not complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out() -> Console:
    """Standard output: colours in a terminal, none in a pipe, NO_COLOR and FORCE_COLOR heeded.

    Every print is flushed.
    """
    return _guarded(_Output(**_PLAIN, soft_wrap=not sys.stdout.isatty()))


def err() -> Console:
    """Standard error, for progress and notes."""
    return _guarded(Console(**_PLAIN, stderr=True, soft_wrap=not sys.stderr.isatty()))


def _guarded(console: Console) -> Console:
    if console.is_terminal:
        console.push_render_hook(_Harmful())
    return console


def write(text: str) -> None:
    """Text on standard output as it is: for a pipe.

    A terminal gets :func:`coloured` text through :func:`out`.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        reader_left()


def complain(message: str, error: BaseException | None = None) -> None:
    """One line to standard error; before it, with ``--debug``, the traceback of ``error``."""
    line = " ".join(message.split())
    with suppress(OSError):  # standard error is closed or full
        if Debug.on and error is not None:
            err().print(Text(escaped("".join(traceback.format_exception(error)))), end="")
        err().print(Text("baco: ", style="bold red") + Text(escaped(line)))


def note(message: str) -> None:
    """A remark on standard error that is no error."""
    err().print(Text(escaped(message), style="dim"))


def print_json(value: Any) -> None:
    """One JSON value on standard output, nothing else."""
    write(json_line(value) + "\n")


def coloured(pieces: "Iterable[Piece]") -> Text:
    """Text in the colours of its sources, for a terminal or a picture.

    The gaps between words are not underlined.
    """
    text = Text()
    for source, same in groupby(pieces, key=lambda piece: piece.source):
        said = "".join(piece.text for piece in same).translate(_REPLACED)
        for part in re.split(r"(\s+)", said):
            text.append(part, style=None if not part or part.isspace() else STYLES[source])
    return text


def show(console: Console, pieces: "Iterable[Piece]") -> None:
    """Text on standard output, :func:`out`: coloured where it is a terminal, else as it is."""
    if console.is_terminal:
        console.print(coloured(pieces), end="")
    else:
        write("".join(piece.text for piece in pieces))


def legend() -> Text:
    """Which style is which model."""
    return Text.assemble(
        ("words from ", "dim"),
        ("base", STYLES["base"]),
        (" and ", "dim"),
        ("aligned", STYLES["aligned"]),
    )
