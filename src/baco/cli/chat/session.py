"""The loop of a chat: read a line, run the command or answer the message, show the answers."""

from typing import Any

from rich.text import Text

from baco.cli.answers import Show
from baco.cli.chat.commands import COMMANDS, LeaveError, obey, router_words
from baco.cli.chat.conversation import Conversation, Turn
from baco.cli.chat.lines import Lines, Piped, Typed, hidden_keys
from baco.cli.comparison import show_comparison
from baco.cli.console import complain, err, legend, note, out
from baco.errors import BacoError
from baco.models.known_pairs import DEMO
from baco.version import __version__

# Stands for the context window of a model that has no limit.
_ENDLESS = 2**30


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
            self.lines = Typed(sentences, {"router": router_words}, self._foot, self._hint)

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
        used, window = conversation.room(conversation.messages("?"))
        if window < _ENDLESS:
            parts.append(f"{min(used, window)} of {window} tokens")
        return " · ".join(parts)
