"""The text of an answer while it grows: its sources, stop strings, and what may be handed out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baco.source import Source
from baco.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer's text and the model it came from."""

    text: str
    source: Source


def name_of(spelled: bytes) -> str:
    """A token's text; one that is no whole text by its bytes, as OpenAI names those."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


@dataclass
class AnswerText:
    """The text of one growing answer.

    Text and tokens are handed out once they are certain to stay: whole characters, nothing that may
    turn out to be the beginning of a stop string, and no white space that a turn of the base model
    may follow. A token is part of the answer if its text begins in what is left of the text.

    Attributes:
        tokenizer: of the aligned half.
        stops: strings that end the answer; what follows from there on is cut off.
        opening: how the base model opens a next turn. The answer also ends at an opening that is
            first on its line and whose first character one of the openers wrote; white space
            before it is cut off too.
        openers: the sources that may open a turn.
        starts_line: the answer begins where a line begins, so that a turn may be opened there.
        joining_space: a space that the answer begins with joins it to its prompt and is removed.
        pieces: what has been handed out, each stretch with its source.
        texts: of each token, as far as they are known; the end of the last may be cut off.
        offsets: where these begin.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    opening: str | None = None
    openers: Sequence[Source] = ("base",)
    starts_line: bool = True
    joining_space: bool = False
    pieces: list[Piece] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    _sources: list[Source] = field(default_factory=list)
    _held: list[Piece] = field(default_factory=list)
    _length: int = 0  # of all text, held or handed out
    _given: int = 0  # of what has been handed out
    _tokens: int = 0

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)
        if not self.openers:
            self.opening = None

    @property
    def text(self) -> str:
        """What has been handed out so far."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> int:
        """How many tokens are certain to stay; once the answer has ended, how many it has."""
        while self._tokens < len(self.offsets) and self.offsets[self._tokens] < self._given:
            self._tokens += 1
        return self._tokens

    def push(self, token: int, source: Source) -> tuple[list[Piece], bool]:
        """Take a token in; the pieces that are now certain, and whether the answer ends here."""
        self._sources.append(source)
        return self._take(self._detokenizer.push(token))

    def close(self) -> tuple[list[Piece], bool]:
        """The tokens have ended: what was still held back, and whether a stop string was in it."""
        pieces, stopped = self._take(self._detokenizer.close())
        if not stopped:
            pieces += self._release(self._length - self._given)
            self._tokens = len(self.offsets)
        return pieces, stopped

    def _take(self, texts: Iterable[str]) -> tuple[list[Piece], bool]:
        for spelled in texts:
            source = self._sources[len(self.offsets)]
            self.offsets.append(self._length)
            text = spelled
            if spelled and self.joining_space:
                self.joining_space = False
                text = spelled.removeprefix(" ")
            self.texts.append(text)
            if text:
                self._length += len(text)
                self._held.append(Piece(text, source))
        if not self._held:
            return [], False
        if not self.stops and self.opening is None:
            return self._release(self._length - self._given), False
        held = "".join(piece.text for piece in self._held)
        cut = self._find_stop(held)
        if cut is not None:
            return self._release(cut), True
        return self._release(self._certain(held)), False

    def _find_stop(self, held: str) -> int | None:
        """Where the held text is to be cut: in front of the stop that is complete first."""
        found = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
        if self.opening is not None:
            at = held.find(self.opening)
            while at >= 0:
                if self._opens_turn(held, at):
                    found.append((at + len(self.opening), len(held[:at].rstrip())))
                    break
                at = held.find(self.opening, at + 1)
        return min(found)[1] if found else None

    def _certain(self, held: str) -> int:
        """How much of the held text no later token can cut off."""
        certain = len(held)
        for stop in self.stops:
            certain = min(certain, len(held) - _overlap(held, stop))
        if self.opening is not None:
            certain = min(certain, len(held.rstrip()))
            for length in range(1, min(len(held) + 1, len(self.opening))):
                at = len(held) - length
                if held.endswith(self.opening[:length]) and self._opens_turn(held, at):
                    certain = min(certain, len(held[:at].rstrip()))
        return certain

    def _opens_turn(self, held: str, at: int) -> bool:
        """Is a character of the held text first on its line, and written by an opener?

        White space that ends the text is always held, so that a line's start is in the held text.
        """
        before = held[:at].rstrip(" \t")
        first = before.endswith("\n") if before else self.starts_line and not self.pieces
        return first and self._source_at(at) in self.openers

    def _source_at(self, at: int) -> Source:
        for piece in self._held:
            if at < len(piece.text):
                return piece.source
            at -= len(piece.text)
        raise IndexError(at)

    def _release(self, length: int) -> list[Piece]:
        """Hand out the first ``length`` characters of the held text."""
        released: list[Piece] = []
        while length > 0 and self._held:
            piece = self._held.pop(0)
            now, later = piece.text[:length], piece.text[length:]
            length -= len(now)
            released.append(Piece(now, piece.source))
            if later:
                self._held.insert(0, Piece(later, piece.source))
            self._given += len(now)
        self.pieces += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
