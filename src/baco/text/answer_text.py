"""The text of a growing answer: sources, stop strings, and which part of it is final."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from baco.source import Source
from baco.text.detokenizer import Detokenizer
from baco.text.shared_text import SharedDetokenizer, TextTokenizer

# What can open the base model's next turn: its own text, and text from both models.
OPENERS: tuple[Source | None, ...] = ("base", None)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer's text and the model it came from; None where both were mixed."""

    text: str
    source: Source | None


def merge_pieces(pieces: Iterable[Piece]) -> list[tuple[str, Source | None]]:
    """The (text, source) of pieces; neighbouring pieces of one source are joined."""
    return [
        ("".join(piece.text for piece in same), source)
        for source, same in groupby(pieces, key=lambda piece: piece.source)
    ]


def name_of(data: bytes) -> str:
    """A token's text, or its bytes in OpenAI's notation where they are not valid UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass
class AnswerText:
    """The text of one growing answer.

    Text and tokens are released once they are final: whole characters, nothing that could become a
    stop string, and no white space that a next turn could follow. A token belongs to the answer if
    its text begins before the place where the answer is cut.

    Attributes:
        tokenizer: the aligned model's.
        stops: strings that end the answer; the text is cut there.
        opening: how the base model opens a next turn. The answer also ends at an opening that is
            first on its line and whose first character comes from one of ``openers``. White space
            before it is cut off too.
        openers: the sources that can open a turn; None for text from both models.
        starts_line: whether the answer begins at the start of a line, where a turn can open.
        joining_space: whether a space at the answer's start only joins it to the prompt. It is
            removed.
        tokenizers: of both models, where they differ; then each token is an id of its source.
        pieces: the released text, each piece with its source.
        texts: the text of each token so far. The end of the last one may be cut off.
        offsets: where these begin, in characters.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    opening: str | None = None
    openers: Sequence[Source | None] = OPENERS
    starts_line: bool = True
    joining_space: bool = False
    tokenizers: Mapping[Source, TextTokenizer] | None = None
    pieces: list[Piece] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    _sources: list[Source | None] = field(default_factory=list)
    _held: list[Piece] = field(default_factory=list)
    _length: int = 0  # characters of all text, held or released
    _released: int = 0  # characters of released text
    _tokens: int = 0

    def __post_init__(self) -> None:
        self._detokenizer: Detokenizer | SharedDetokenizer
        if self.tokenizers is None:
            self._detokenizer = Detokenizer(self.tokenizer)
        else:
            self._detokenizer = SharedDetokenizer(self.tokenizers)
        if not self.openers:
            self.opening = None

    @property
    def text(self) -> str:
        """The released text."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """How many tokens are final; once the answer has ended, how many it has."""
        while self._tokens < len(self.offsets) and self.offsets[self._tokens] < self._released:
            self._tokens += 1
        return self._tokens

    def push(self, token: int, source: Source | None) -> tuple[list[Piece], bool]:
        """Add a token; returns the newly released pieces, and whether the answer ends here."""
        self._sources.append(source)
        if isinstance(self._detokenizer, SharedDetokenizer):
            assert source is not None  # no combiner mixes models of different tokenizers
            return self._add(self._detokenizer.push(token, source))
        return self._add(self._detokenizer.push(token))

    def close(self) -> tuple[list[Piece], bool]:
        """End the text; returns the last pieces, and whether a stop string was in them."""
        pieces, stopped = self._add(self._detokenizer.close())
        if not stopped:
            pieces += self._release(self._length - self._released)
            self._tokens = len(self.offsets)
        return pieces, stopped

    def _add(self, texts: Iterable[str]) -> tuple[list[Piece], bool]:
        for decoded in texts:
            source, text = self._sources[len(self.offsets)], decoded
            self.offsets.append(self._length)
            if decoded and self.joining_space:
                self.joining_space = False
                text = decoded.removeprefix(" ")
            self.texts.append(text)
            if text:
                self._length += len(text)
                self._held.append(Piece(text, source))
        if not self._held:
            return [], False
        if not self.stops and self.opening is None:
            return self._release(self._length - self._released), False
        held = "".join(piece.text for piece in self._held)
        cut = self._find_stop(held)
        if cut is not None:
            return self._release(cut), True
        return self._release(self._final(held)), False

    def _find_stop(self, held: str) -> int | None:
        """Where to cut the held text: before the stop string that is complete first."""
        # (end of the stop, where to cut)
        cuts = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
        if self.opening is not None:
            at = held.find(self.opening)
            while at >= 0:
                if self._opens_turn(held, at):
                    cuts.append((at + len(self.opening), len(held[:at].rstrip())))
                    break
                at = held.find(self.opening, at + 1)
        return min(cuts)[1] if cuts else None

    def _final(self, held: str) -> int:
        """How many characters of the held text no later token can cut off."""
        final = len(held)
        for stop in self.stops:
            final = min(final, len(held) - _overlap(held, stop))
        if self.opening is not None:
            final = min(final, len(held.rstrip()))
            for length in range(1, min(len(held) + 1, len(self.opening))):
                at = len(held) - length
                if held.endswith(self.opening[:length]) and self._opens_turn(held, at):
                    final = min(final, len(held[:at].rstrip()))
        return final

    def _opens_turn(self, held: str, at: int) -> bool:
        """Whether a character of the held text is first on its line and comes from an opener.

        White space at the end of the text is always held, so the line's start is in the held text.
        """
        before = held[:at].rstrip(" \t")
        first = before.endswith("\n") if before else self.starts_line and not self.pieces
        return first and self._source_at(at) in self.openers

    def _source_at(self, at: int) -> Source | None:
        for piece in self._held:
            if at < len(piece.text):
                return piece.source
            at -= len(piece.text)
        raise IndexError(at)

    def _release(self, length: int) -> list[Piece]:
        """Release the first ``length`` characters of the held text."""
        released: list[Piece] = []
        if length == self._length - self._released:  # all of it
            released, self._held, self._released = self._held, [], self._length
        while length > 0 and self._held:
            piece = self._held.pop(0)
            now, later = piece.text[:length], piece.text[length:]
            length -= len(now)
            released.append(Piece(now, piece.source))
            if later:
                self._held.insert(0, Piece(later, piece.source))
            self._released += len(now)
        self.pieces += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
