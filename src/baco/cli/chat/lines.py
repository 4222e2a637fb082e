"""Input of the chat: a terminal with line editing, or a pipe with one turn per line."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import platformdirs

from baco.cli.console import note
from baco.cli.options import check_text
from baco.errors import BacoError

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

MENU_LINES = 6

# Words that may follow a command, each with its meaning.
Arguments = dict[str, Callable[[], Iterable[tuple[str, str]]]]


class Lines(Protocol):
    """Reads messages and commands."""

    def read(self) -> str:
        """The next line; EOFError after the last, KeyboardInterrupt where the user drops a line."""
        ...


class Piped:
    """Standard input that is not a terminal: one turn per line; empty lines are skipped."""

    def read(self) -> str:
        try:
            lines = (line.removeprefix("\ufeff") for line in sys.stdin)
            line = next((line for line in lines if line.strip()), None)
        except UnicodeDecodeError as error:
            raise BacoError(f"standard input is not valid UTF-8: {error}") from error
        if line is None:
            raise EOFError
        check_text(line)
        return line.rstrip("\r\n")


class Typed:
    """A terminal with line editing, completion, and a saved history.

    Args:
        commands: name → what it does.
        arguments: command → words that may follow it.
        foot: the line under the input.
        hint: the text in the empty input.
    """

    def __init__(
        self,
        commands: dict[str, str],
        arguments: Arguments,
        foot: Callable[[], str],
        hint: Callable[[], str],
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.formatted_text import FormattedText
        from prompt_toolkit.styles import Style

        self._hint = hint
        self._text = FormattedText
        self._session: PromptSession[str] = PromptSession(
            [("class:mark", "› ")],
            history=_history(),
            completer=_completer(commands, arguments),
            key_bindings=_bindings(),
            prompt_continuation="  ",
            bottom_toolbar=lambda: [("class:foot", foot())],
            style=Style.from_dict(
                {
                    "mark": "bold",
                    "bottom-toolbar": "noreverse",
                    "foot": "#808080",
                    "hint": "#808080",
                }
            ),
        )

    def read(self) -> str:
        hint = self._text([("class:hint", self._hint())])
        # Room for completions, where the screen is high enough.
        room = shutil.get_terminal_size().lines - 6
        self._session.reserve_space_for_menu = min(max(room, 0), MENU_LINES)
        return self._session.prompt(placeholder=hint)


def _bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _completer(commands: dict[str, str], arguments: Arguments) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        """Completes commands, not messages."""

        def get_completions(
            self, document: "Document", event: "CompleteEvent"
        ) -> "Iterable[Completion]":
            typed = document.text_before_cursor
            name, space, argument = typed.removeprefix("/").partition(" ")
            if not typed.startswith("/"):
                return
            if space and name == "save":
                yield from PathCompleter(expanduser=True).get_completions(Document(argument), event)
                return
            written, words = (
                (argument, arguments.get(name, tuple)())
                if space
                else (typed, (("/" + command, sentence) for command, sentence in commands.items()))
            )
            for word, sentence in words:
                if word.lower().startswith(written.lower()):
                    yield Completion(word, -len(written), display_meta=sentence)

    return Commands()


def _history() -> "History":
    """The messages of earlier chats; only this chat's where the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only the user may read the history.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        note(f"the history is not saved: cannot write {path} ({error.strerror})")
        return InMemoryHistory()
    return FileHistory(path)


def history_path() -> Path:
    """The file of messages of all chats, in BACO_HOME or the user's state folder."""
    return Path(os.environ.get("BACO_HOME") or platformdirs.user_state_dir("baco")) / "chat_history"


@contextlib.contextmanager
def hidden_keys() -> Iterator[None]:
    """Do not show keys that are pressed while an answer grows. Ctrl-C stops the answer, and not the
    program, also while it imports a module.
    """
    try:
        import termios
    except ImportError:  # no such terminals on this system
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
