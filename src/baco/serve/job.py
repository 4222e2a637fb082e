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
    """What the caller has of one sample, and how much of that a replay has come by so far.

    Text comes in the same pieces whenever the tokens are the same.
    """

    tokens: list[int] = field(default_factory=list)
    pieces: int = 0
    ended: bool = False
    tokens_again: int = 0
    pieces_again: int = 0

    def rewind(self) -> None:
        self.tokens_again = self.pieces_again = 0

    def new_tokens(self, tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        ids = [token.id for token in tokens]
        known = self.tokens[self.tokens_again : self.tokens_again + len(ids)]
        if ids[: len(known)] != known:
            raise ReplayError("the answer could not be taken up again where it broke off")
        self.tokens += ids[len(known) :]
        self.tokens_again += len(ids)
        return tokens[len(known) :]

    def new_pieces(self, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
        known = self.pieces - self.pieces_again
        self.pieces_again += len(pieces)
        self.pieces = max(self.pieces, self.pieces_again)
        return pieces[known:]


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
        if told.ended:
            return
        told.ended = chunk.finish_reason is not None
        if tokens or pieces or told.ended:
            self.deliver(replace(chunk, tokens=tokens, pieces=pieces))
