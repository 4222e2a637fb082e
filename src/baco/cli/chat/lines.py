"""Where a user's messages come from: a terminal with an editor, or a pipe with a turn a line."""

import contextlib
import os
import shutil
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

# What completes an argument: the words it may be, each with what it means.
Arguments = dict[str, Callable[[], Iterable[tuple[str, str]]]]


class Lines(Protocol):
    """Messages and commands, one by one."""

    def read(self) -> str:
        """The next one; EOFError after the last, KeyboardInterrupt where one is given up."""
        ...


class Piped:
    """Standard input that is no terminal: a line is a turn; empty lines are passed over."""

    def read(self) -> str:
        try:
            line = next((line for line in sys.stdin if line.strip()), None)
        except UnicodeDecodeError as error:
            raise BacoError(f"standard input is not valid UTF-8: {error}") from error
        if line is None:
            raise EOFError
        check_text(line)
        return line.rstrip("\r\n")


class Typed:
    """A terminal: line editing, completion, and a history that is kept.

    Args:
        commands: name → its sentence.
        arguments: command → the words it may be followed by.
        foot: what stands under the input.
        hint: what stands in the empty input.
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
        # Room for completions, where the screen is high enough for it.
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
        """Completes what begins with a slash and leaves messages alone."""

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
    """The messages of earlier chats; kept only as long as this one where they cannot be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What people ask is theirs alone to read.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        note(f"the history is not kept: cannot write {path} ({error.strerror})")
        return InMemoryHistory()
    return FileHistory(path)


def history_path() -> Path:
    """Where messages are kept from one chat to the next: the user's state, or BACO_HOME."""
    return Path(os.environ.get("BACO_HOME") or platformdirs.user_state_dir("baco")) / "chat_history"


@contextlib.contextmanager
def unheard_keys() -> Iterator[None]:
    """Keys pressed while an answer grows are not shown in the middle of it; Ctrl-C still works."""
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
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
