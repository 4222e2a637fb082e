"""One prompt while it is open: what its caller was told, so that a replay tells only the rest.

Draws are replayable, so a seeded prompt can be decoded again from its start on another decoder and
comes to the same tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from baco.completion import Chunk, Token
from baco.decoder import Decoder
from baco.text import Piece

Submit = Callable[[Decoder], int]
Deliver = Callable[[Chunk | Exception], None]


class ReplayError(RuntimeError):
    """A replay came to other tokens than the first run: floating-point sums fell out otherwise."""


@dataclass(slots=True)
class _Told:
    """What the caller has of one sample, and how much of it a replay has come by so far."""

    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    ended: bool = False
    tokens_again: int = 0
    characters_again: int = 0

    def rewind(self) -> None:
        self.tokens_again = self.characters_again = 0

    def new_tokens(self, tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        at = self.tokens_again
        known = self.tokens[at : at + len(tokens)]
        if [token.id for token in tokens[: len(known)]] != known:
            raise ReplayError("the answer could not be taken up again where it broke off")
        new = tokens[len(known) :]
        self.tokens += [token.id for token in new]
        self.tokens_again += len(tokens)
        return new

    def new_pieces(self, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        new = []
        for piece in pieces:
            known = min(self.characters - self.characters_again, len(piece.text))
            self.characters_again += len(piece.text)
            self.characters += len(piece.text) - known
            if known < len(piece.text):
                new.append(Piece(piece.text[known:], piece.source))
        return tuple(new)


@dataclass(eq=False, slots=True)
class Job:
    """A prompt and who hears of it.

    Attributes:
        submit: hands the prompt, with a seed, to a decoder and returns its ticket.
        deliver: called from the decoder's thread with every chunk; with an exception, then nothing
            more follows.
        ticket: of the decoder that it is in, if it is in one.
    """

    submit: Submit
    deliver: Deliver
    ticket: int | None = None
    _told: dict[int, _Told] = field(default_factory=dict)

    def rewind(self) -> None:
        """It starts again from its first token."""
        for told in self._told.values():
            told.rewind()

    def tell(self, chunk: Chunk) -> None:
        """Deliver what is new in a chunk.

        Raises:
            ReplayError: it is no chunk of the answer that was begun.
        """
        told = self._told.setdefault(chunk.sample, _Told())
        tokens, pieces = told.new_tokens(chunk.tokens), told.new_pieces(chunk.pieces)
        ended_before, told.ended = told.ended, chunk.finish_reason is not None
        told.ended |= ended_before
        if not ended_before and (tokens or pieces or told.ended):
            self.deliver(replace(chunk, tokens=tokens, pieces=pieces))
