"""A conversation with a pair: what was said, and what the next answer is drawn with.

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
        router: its spelling,
        settings: and the keywords of ``Baco.stream`` that gave the answers; ``seed`` is among them.
        chosen: the sample that the conversation goes on with.
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
        """The sample that the conversation goes on with."""
        return self.answers[self.chosen]


@dataclass
class Conversation:
    """Turns with one pair.

    Every draw takes a seed of its own, one more than the last, so that a conversation can be had
    again from its first seed and a question asked again gets another answer.

    Attributes:
        baco: the pair.
        router: the next answer's router.
        settings: keywords of ``Baco.stream`` for the next answer; ``n`` and ``seed`` are always
            among them.
        turns: what was said.
    """

    baco: "Baco"
    router: Any
    settings: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str, before: int | None = None) -> list[dict[str, str]]:
        """The turns (those before number ``before`` where it is given) and then a question."""
        said = []
        for turn in self.turns[:before]:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer.text})
        return [*said, {"role": "user", "content": question}]

    def check_fits(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Raise where the next answer would have no room.

        Raises:
            BacoError: a context window is full, and what to do.
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
        """Tokens that messages take and those there may be, in the half that is nearer its end."""
        pair = self.baco.pair
        prompt = pair.renderer.render(messages, self.settings["system"])
        halves = {
            "base": (len(prompt.base_ids), pair.base.context),
            "aligned": (len(prompt.aligned_ids), pair.aligned.context),
        }
        only = self.router.only
        read = [halves[only]] if only is not None else list(halves.values())
        return min(read, key=lambda lengths: lengths[1] - lengths[0])

    def take_seed(self) -> int:
        """The seed of the draw that begins now."""
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
        """Take a turn in, as far as its answers got; None where no word of any was said.

        Args:
            question: what the user wrote.
            growing: the pieces of each sample.
            done: the samples that are whole.
            settings: what they were drawn with.
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
        """Take the last turn back.

        Raises:
            BacoError: there is none.
        """
        self.last()
        return self.turns.pop()

    def last(self) -> Turn:
        """The last turn.

        Raises:
            BacoError: there is none.
        """
        if not self.turns:
            raise BacoError("nothing has been said yet: write a message first")
        return self.turns[-1]

    def pick(self, number: int) -> None:
        """Go on with the last turn's sample of this number, from 1.

        Raises:
            BacoError: there is no such sample, or nothing was said in it.
        """
        turn = self.last()
        if not 1 <= number <= len(turn.answers):
            raise BacoError(
                f"there is no answer {number}: the last turn has {len(turn.answers)}"
                + ("; /n 4 draws more of the next" if len(turn.answers) == 1 else "")
            )
        turn.chosen = number - 1
