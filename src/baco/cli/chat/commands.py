"""Commands of the chat: lines that begin with a slash."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from baco.cli.chat.transcript import save
from baco.cli.console import err, note
from baco.cli.options import RouterOptions
from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.cli.chat.session import Session


class LeaveError(Exception):
    """The user leaves the chat."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        act: runs it, with the text after its name.
        sentence: what it does, for the list of commands.
        argument: what may follow its name.
    """

    act: "Callable[[Session, str], None]"
    sentence: str
    argument: str = ""


def obey(session: "Session", line: str) -> None:
    """Run the command of a line such as ``/n 4``.

    Raises:
        BacoError: no such command, or an invalid argument.
        LeaveError: ``/quit``.
    """
    name, *rest = re.split(r"\s+", line[1:].strip(), maxsplit=1)
    argument = rest[0] if rest else ""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise BacoError(
            f"unknown command /{name}: "
            + (f"did you mean /{near[0]}? " if near else "")
            + "/help lists them; a message may begin with / behind a space"
        )
    command = COMMANDS[name]
    if argument and not command.argument:
        raise BacoError(f"/{name} takes nothing after it, not {argument!r}")
    command.act(session, argument)


def _help(_: "Session", __: str) -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"/{name} {command.argument}", style="bold"), command.sentence)
    err().print(table)
    note("Alt-Enter begins a new line. Ctrl-C stops an answer. Ctrl-D leaves.")


def _router(session: "Session", argument: str) -> None:
    conversation = session.conversation
    if argument:
        conversation.router = conversation.baco.router(argument)
    note(f"router {conversation.router.spelling}")


def _diversity(session: "Session", argument: str) -> None:
    from baco.routing.parser import router_name

    conversation = session.conversation
    value = _number(argument)
    if not isinstance(value, int | float):
        raise BacoError(f"diversity is {argument!r}: give a number from 0 to 1")
    spelling = router_name(conversation.router.spelling)
    conversation.router = RouterOptions(spelling, value).choose(conversation.baco)
    note(f"router {conversation.router.spelling}")


def _sampling(name: str) -> "Callable[[Session, str], None]":
    from baco.outputs import params
    from baco.sampling.params import SamplingParams

    def act(session: "Session", argument: str) -> None:
        settings = session.conversation.settings
        if argument:
            change = {name: _number(argument)}
            SamplingParams().updated(change)
            settings |= change

        values = settings | params(session.conversation.baco.pair, settings)
        note(f"{name.replace('_', '-')} {values[name]}")

    return act


def _number(argument: str) -> Any:
    """A number where the text is one; else the text, for the check to refuse."""
    for kind in (int, float):
        try:
            return kind(argument)
        except ValueError:
            continue
    return argument


def _system(session: "Session", argument: str) -> None:
    settings = session.conversation.settings
    if argument:
        settings["system"] = None if argument == "-" else argument
    note("no system message" if settings["system"] is None else f"system: {settings['system']}")


def _pick(session: "Session", argument: str) -> None:
    value = _number(argument)
    if not isinstance(value, int):
        raise BacoError(f"/pick {argument}: give the number of an answer, such as /pick 2")
    session.conversation.pick(value)
    note(f"answer {value} goes on")


def _compare(session: "Session", argument: str) -> None:
    session.compare(argument or None)


def _retry(session: "Session", _: str) -> None:
    session.retry()


def _undo(session: "Session", _: str) -> None:
    turn = session.conversation.undo()
    note(f"taken back: {' '.join(turn.question.split())}")


def _new(session: "Session", _: str) -> None:
    session.conversation.turns.clear()
    note("a new conversation")


def _save(session: "Session", argument: str) -> None:
    if not argument:
        raise BacoError("/save needs a file: .json keeps every word's source, .md is for reading")
    path = Path(argument).expanduser()
    session.conversation.last()
    save(session.conversation, path)
    note(f"saved in {path}")


def _quit(_: "Session", __: str) -> None:
    raise LeaveError


COMMANDS: dict[str, Command] = {
    "router": Command(_router, "set the router, such as P-Punc:0.4", "[SPELLING]"),
    "diversity": Command(
        _diversity, "set the router's threshold by diversity, from 0 to 1", "NUMBER"
    ),
    "compare": Command(
        _compare, "base, aligned and BACo on the last message, or on another, one seed", "[MESSAGE]"
    ),
    "n": Command(_sampling("n"), "answers to draw from now on", "[NUMBER]"),
    "pick": Command(_pick, "continue with this answer instead of the first", "NUMBER"),
    "retry": Command(_retry, "draw other answers to the last message"),
    "undo": Command(_undo, "remove the last message and its answers"),
    "new": Command(_new, "start over, with the same settings"),
    "seed": Command(_sampling("seed"), "seed of the next answer; later ones count up", "[NUMBER]"),
    "temperature": Command(_sampling("temperature"), "0 takes the most likely token", "[NUMBER]"),
    "min-p": Command(
        _sampling("min_p"), "keep tokens with this fraction of the top probability", "[NUMBER]"
    ),
    "max-tokens": Command(_sampling("max_tokens"), "longest answer, in tokens", "[NUMBER]"),
    "system": Command(_system, "system message from now on; - for none", "[TEXT]"),
    "save": Command(_save, "the conversation, as .json with all sources or as text", "FILE"),
    "help": Command(_help, "this list"),
    "quit": Command(_quit, "leave"),
}


def router_words() -> Iterable[tuple[str, str]]:
    """What may follow ``/router``."""
    from baco.routing.parser import catalogue

    return [(entry.example, entry.sentence) for entry in catalogue()]
