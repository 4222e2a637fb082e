"""The loop of a chat: read a line, run the command or answer the message, show the answers.

Commands are lines that begin with a slash.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from baco.cli.answers import Show
from baco.cli.chat.conversation import Conversation, Turn
from baco.cli.chat.lines import Lines, Piped, Typed, hidden_keys
from baco.cli.chat.transcript import save
from baco.cli.comparison import show_comparison
from baco.cli.console import complain, err, legend, note, out
from baco.cli.options import RouterOptions
from baco.errors import BacoError
from baco.files import user_path
from baco.models.known_pairs import DEMO
from baco.version import __version__

# Stands for the context window of a model that has no limit.
_ENDLESS = 2**30


class LeaveError(Exception):
    """The user leaves the chat."""


class Session:
    """One user's chat.

    Attributes:
        conversation: the turns and settings.
        interactive: whether a person types: an error is then shown and the chat continues, and an
            interrupt stops an answer. In a pipe both end the program.
    """

    def __init__(self, conversation: Conversation, *, interactive: bool) -> None:
        self.conversation, self.interactive = conversation, interactive
        self.lines: Lines = Piped()
        self._answered = False
        if interactive:
            sentences = {name: command.sentence for name, command in COMMANDS.items()}
            self.lines = Typed(sentences, {"router": self._router_words}, self._foot, self._hint)

    def _router_words(self) -> Iterable[tuple[str, str]]:
        """What may follow ``/router``."""
        from baco.routing.two_vocabularies import catalogue_for

        entries = catalogue_for(one_tokenizer=self.conversation.baco.pair.own_vocabularies is None)
        return [(entry.example, entry.sentence) for entry in entries]

    def run(self) -> None:
        """Chat until the input ends or the user leaves.

        Raises:
            BacoError, KeyboardInterrupt: in a pipe.
        """
        if self.interactive:
            self._greet()
        while True:
            try:
                line = self.lines.read()
                if line.startswith("/"):
                    obey(self, line)
                elif line.strip():
                    self.answer(line.strip())
            except (EOFError, LeaveError):
                return
            except BacoError as error:
                if not self.interactive:
                    raise
                complain(str(error), error)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise

    def answer(self, question: str) -> None:
        """Draw the answers to a message and add the turn, with stopped answers as they are.

        Raises:
            BacoError: the conversation does not fit.
        """
        conversation = self.conversation
        messages = conversation.messages(question)
        conversation.check_fits(messages)
        settings = conversation.settings | {"seed": conversation.take_seed()}
        if not self.interactive:
            if self._answered:
                out().print()
            self._answered = True
        show = Show(conversation.baco, messages, conversation.router, settings, legend=False)
        stopped = False
        try:
            with hidden_keys():
                show.run()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = True
        turn = conversation.add(question, show.growing, show.done, settings)
        if self.interactive:
            self._remark(turn, stopped, messages)

    def retry(self) -> None:
        """Draw the last turn's answers again, with the present settings.

        Raises:
            BacoError: there is no turn yet.
        """
        conversation = self.conversation
        turn = conversation.undo()
        count = len(conversation.turns)
        try:
            self.answer(turn.question)
        finally:
            if len(conversation.turns) == count:
                conversation.turns.append(turn)

    def compare(self, question: str | None) -> None:
        """Show base, aligned and BACo on one seed; the conversation stays as it is.

        Args:
            question: takes the place of the last turn's question and seed.

        Raises:
            BacoError: there is no turn yet, or the conversation does not fit.
        """
        from baco.routing.parser import router as parse

        conversation = self.conversation
        if question is None:
            turn = conversation.last()
            messages = conversation.messages(turn.question, before=-1)
            seed = turn.settings["seed"]
        else:
            messages = conversation.messages(question)
            seed = conversation.take_seed()
        conversation.check_fits(messages)
        routers = {router.spelling: router for router in (parse("Base"), parse("Aligned"))}
        routers |= {conversation.router.spelling: conversation.router}
        settings = conversation.settings | {"seed": seed}
        with hidden_keys():
            show_comparison(conversation.baco, messages, list(routers.values()), settings, None)

    def _greet(self) -> None:
        pair = self.conversation.baco.pair
        err().print(Text(f"BACo {__version__} · {pair.name} · ", style="dim") + legend())
        if pair.name == DEMO:
            note("a toy that knows ten kinds of questions, one at a time; /new before another")
        note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")

    def _remark(self, turn: Turn | None, stopped: bool, messages: list[dict[str, str]]) -> None:
        """Show notes about a turn below its answers."""
        if stopped:
            kept = "; what was said stays: /retry draws anew, /undo takes it back"
            note("stopped" + (kept if turn is not None else ""))
        elif turn is not None and turn.answer.finish_reason == "length":
            used, window = self.conversation.room(messages)
            asked = self.conversation.baco.pair.defaults.updated(
                {k: v for k, v in turn.settings.items() if k == "max_tokens"}
            ).max_tokens
            if window - used <= asked:
                note(f"cut off: the context window of {window} tokens is full; /undo, /new")
            else:
                note(f"cut off after {asked} tokens; /max-tokens {2 * asked} allows more")
        if turn is not None and len(turn.answers) > 1:
            note(f"answer {turn.chosen + 1} goes on; /pick takes another")

    def _hint(self) -> str:
        if self.conversation.turns or self.conversation.baco.pair.name != DEMO:
            return ""
        return "Recommend a summer destination"

    def _foot(self) -> str:
        conversation = self.conversation
        settings: dict[str, Any] = conversation.settings
        parts = [
            conversation.router.spelling,
            f"n {settings['n']}",
            f"next seed {settings['seed']}",
        ]
        # A template may refuse the conversation; the answer to the next message reports it.
        with suppress(BacoError):
            used, window = conversation.room(conversation.messages("?"))
            if window < _ENDLESS:
                parts.append(f"{min(used, window)} of {window} tokens")
        return " · ".join(parts)


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        act: runs it, with the text after its name.
        sentence: what it does, for the list of commands.
        argument: what may follow its name.
    """

    act: Callable[[Session, str], None]
    sentence: str
    argument: str = ""


def obey(session: Session, line: str) -> None:
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


def _help(_: Session, __: str) -> None:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"/{name} {command.argument}", style="bold"), command.sentence)
    err().print(table)
    note("Alt-Enter begins a new line. Ctrl-C stops an answer. Ctrl-D leaves.")


def _router(session: Session, argument: str) -> None:
    conversation = session.conversation
    if argument:
        conversation.router = conversation.baco.router(argument)
    note(f"router {conversation.router.spelling}")


def _diversity(session: Session, argument: str) -> None:
    from baco.routing.parser import router_name

    conversation = session.conversation
    value = _number(argument)
    if not isinstance(value, int | float):
        raise BacoError(f"diversity is {argument!r}: give a number from 0 to 1")
    spelling = router_name(conversation.router.spelling)
    conversation.router = RouterOptions(spelling, value).choose(conversation.baco)
    note(f"router {conversation.router.spelling}")


def _sampling(name: str) -> Callable[[Session, str], None]:
    from baco.outputs import params
    from baco.sampling.params import SamplingParams

    def act(session: Session, argument: str) -> None:
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


def _system(session: Session, argument: str) -> None:
    settings = session.conversation.settings
    if argument:
        settings["system"] = None if argument == "-" else argument
    note("no system message" if settings["system"] is None else f"system: {settings['system']}")


def _pick(session: Session, argument: str) -> None:
    value = _number(argument)
    if not isinstance(value, int):
        raise BacoError(f"/pick {argument}: give the number of an answer, such as /pick 2")
    session.conversation.pick(value)
    note(f"answer {value} goes on")


def _compare(session: Session, argument: str) -> None:
    session.compare(argument or None)


def _retry(session: Session, _: str) -> None:
    session.retry()


def _undo(session: Session, _: str) -> None:
    turn = session.conversation.undo()
    note(f"removed: {' '.join(turn.question.split())}")


def _new(session: Session, _: str) -> None:
    session.conversation.turns.clear()
    note("a new conversation")


def _save(session: Session, argument: str) -> None:
    if not argument:
        raise BacoError("/save needs a file: .json keeps every word's source, .md is for reading")
    path = user_path(argument)
    session.conversation.last()
    save(session.conversation, path)
    note(f"saved in {path}")


def _quit(_: Session, __: str) -> None:
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
