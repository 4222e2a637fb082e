"""A conversation with a pair: its turns, and the settings of the next answer.

It knows nothing of terminals and commands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baco.errors import BacoError
from baco.text.answer_text import Piece

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Completion


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample of an answer.

    Attributes:
        pieces: its text, each piece with its source.
        finish_reason: ``stop``, ``length``, or ``interrupted`` where the user stopped it.
    """

    pieces: tuple[Piece, ...]
    finish_reason: str

    @property
    def text(self) -> str:
        """The answer as the models read it in later turns."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(slots=True)
class Turn:
    """A question and the answers drawn to it.

    Attributes:
        question: what the user wrote.
        answers: the n samples.
        router: spelling of the answers' router.
        settings: keywords of ``Baco.stream`` that gave the answers, with ``seed``.
        chosen: number of the sample that the conversation continues with.
        date: the day that a template wrote into the prompt, if any.
    """

    question: str
    answers: Sequence[Answer]
    router: str
    settings: Mapping[str, Any]
    chosen: int = 0
    date: str | None = None

    @property
    def answer(self) -> Answer:
        """The sample that the conversation continues with."""
        return self.answers[self.chosen]


@dataclass
class Conversation:
    """Turns with one pair.

    Every draw has its own seed, one more than the last: the first seed repeats the conversation,
    and a question asked twice gets two answers.

    Attributes:
        baco: the pair.
        router: the next answer's router.
        settings: keywords of ``Baco.stream`` for the next answer, always with ``n`` and ``seed``.
        turns: questions and answers so far.
    """

    baco: "Baco"
    router: Any
    settings: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str, before: int | None = None) -> list[dict[str, str]]:
        """The turns, up to number ``before`` if it is given, and then a question."""
        messages = []
        for turn in self.turns[:before]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer.text})
        return [*messages, {"role": "user", "content": question}]

    def check_fits(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Check that the context windows have room for an answer.

        Raises:
            BacoError: one is full.
        """
        used, window = self.room(messages)
        if used >= window:
            alone = len(messages) == 1
            raise BacoError(
                f"the {'message' if alone else 'conversation'} takes {used} tokens and the pair's "
                f"context window is {window}: "
                + ("shorten it" if alone else "/undo takes the last turn back, /new starts over")
            )

    def room(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, int]:
        """Tokens of the messages and of the context window, for the model with less room left."""
        pair = self.baco.pair
        prompt = pair.renderer.render(messages, self.settings["system"])
        models = {
            "base": (len(prompt.base_ids), pair.base.context),
            "aligned": (len(prompt.aligned_ids), pair.aligned.context),
        }
        only = self.router.only
        lengths = [models[only]] if only is not None else list(models.values())
        return min(lengths, key=lambda pair: pair[1] - pair[0])

    def take_seed(self) -> int:
        """The seed of the next draw; the one after it gets another."""
        seed: int = self.settings["seed"]
        self.settings["seed"] = seed + 1
        return seed

    def add(
        self,
        question: str,
        growing: Sequence[Sequence[Piece]],
        done: "Mapping[int, Completion]",
        settings: Mapping[str, Any],
    ) -> Turn | None:
        """Add a turn with its answers so far; None where all of them are empty.

        Args:
            question: what the user wrote.
            growing: the pieces of each sample.
            done: the samples that are complete.
            settings: keywords of ``Baco.stream`` that gave them.
        """
        answers = [
            Answer(tuple(pieces), done[i].finish_reason if i in done else "interrupted")
            for i, pieces in enumerate(growing)
        ]
        begun = [i for i, answer in enumerate(answers) if i in done or answer.pieces]
        if not begun:
            return None
        date = next((completion.date for completion in done.values()), None)
        turn = Turn(question, answers, self.router.spelling, dict(settings), begun[0], date)
        self.turns.append(turn)
        return turn

    def undo(self) -> Turn:
        """Remove the last turn and return it.

        Raises:
            BacoError: there are no turns.
        """
        self.last()
        return self.turns.pop()

    def last(self) -> Turn:
        """The last turn.

        Raises:
            BacoError: there are no turns.
        """
        if not self.turns:
            raise BacoError("the conversation is empty: write a message first")
        return self.turns[-1]

    def pick(self, number: int) -> None:
        """Continue with the last turn's sample of this number, counted from 1.

        Raises:
            BacoError: there is no such sample.
        """
        turn = self.last()
        if not 1 <= number <= len(turn.answers):
            raise BacoError(
                f"there is no answer {number}: the last turn has {len(turn.answers)}"
                + ("; /n 4 draws more of the next" if len(turn.answers) == 1 else "")
            )
        turn.chosen = number - 1
