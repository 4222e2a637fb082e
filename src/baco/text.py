"""From token ids to text, one token at a time: no character is cut, stop strings are found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

from baco.routing.rules import Source


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

    Text is handed out once it is certain to stay: whole characters, nothing that may turn out to be
    the beginning of a stop string, and no white space that a turn of the base model may follow.

    Attributes:
        tokenizer: of the aligned half.
        stops: strings that end the answer; what follows from there on is cut off.
        opening: how the base model opens a next turn. The answer also ends at an opening that is
            first on its line and whose first character one of the openers wrote; white space
            before it is cut off too.
        openers: the sources that may open a turn.
        starts_line: the answer begins where a line begins, so that a turn may be opened there.
        joining_space: a space that the answer begins with joins it to its prompt and is removed.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    opening: str | None = None
    openers: Sequence[Source] = ("base",)
    starts_line: bool = True
    joining_space: bool = False
    pieces: list[Piece] = field(default_factory=list)
    _starts: list[int] = field(default_factory=list)
    _length: int = 0
    _held: list[Piece] = field(default_factory=list)
    _started: bool = False

    def __post_init__(self) -> None:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        self._stream: _Decoder = _Fast(backend) if backend is not None else _Slow(self.tokenizer)
        self._last_source: Source = "aligned"

    @property
    def text(self) -> str:
        """What has been handed out so far."""
        return "".join(piece.text for piece in self.pieces)

    def push(self, token: int, source: Source) -> tuple[list[Piece], bool]:
        """Take a token in; the pieces that are now certain, and whether a stop string was met."""
        self._starts.append(self._length)
        return self._take(self._stream.step(token), source)

    @property
    def tokens(self) -> int:
        """How many of the tokens reach into the text: fewer than were pushed where it was cut."""
        length = len(self.text)
        return sum(start < length for start in self._starts)

    def close(self) -> list[Piece]:
        """The answer has ended by itself: the pieces that were still held back."""
        rest = self._stream.rest()
        if rest and self._starts:
            pieces, stopped = self._take(rest, self._last_source)
            if stopped:
                return pieces
        else:
            pieces = []
        return pieces + self._release(len(self._held_text()))

    def _take(self, new: str, source: Source) -> tuple[list[Piece], bool]:
        self._last_source = source
        if new and not self._started:
            self._started = True
            new = new.removeprefix(" ") if self.joining_space else new
        if not new:
            return [], False
        self._length += len(new)
        self._held.append(Piece(new, source))
        held = self._held_text()
        cut = self._find_stop(held)
        if cut is not None:
            pieces = self._release(cut)
            self._held.clear()
            return pieces, True
        return self._release(self._certain(held)), False

    def _held_text(self) -> str:
        return "".join(piece.text for piece in self._held)

    def _find_stop(self, held: str) -> int | None:
        cuts = [at for stop in self.stops if (at := held.find(stop)) >= 0]
        if self.opening is not None and self.openers:
            at = held.find(self.opening)
            while at >= 0:
                if self._opens_turn(held, at):
                    cuts.append(len(held[:at].rstrip()))
                    break
                at = held.find(self.opening, at + 1)
        return min(cuts, default=None)

    def _certain(self, held: str) -> int:
        """How much of the held text no later token can cut off."""
        certain = len(held)
        for stop in self.stops:
            certain = min(certain, len(held) - _overlap(held, stop))
        if self.opening is not None and self.openers:
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
        self.pieces += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Decoder(Protocol):
    def step(self, token: int) -> str: ...

    def rest(self) -> str: ...


class _Fast:
    """Incremental decoding by the ``tokenizers`` library."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0

    def step(self, token: int) -> str:
        self._ids.append(token)
        new = self._stream.step(self._backend, token) or ""
        self._given += len(new)
        return new

    def rest(self) -> str:
        """What was never given out: an unfinished character at the end shows as U+FFFD."""
        whole: str = self._backend.decode(self._ids, skip_special_tokens=True)
        return whole[self._given :]


class _Slow:
    """The same for a tokenizer that has no backend of that library."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def step(self, token: int) -> str:
        self._ids.append(token)
        whole = self.rest()
        if whole.endswith("\ufffd"):
            return ""
        self._given += len(whole)
        return whole

    def rest(self) -> str:
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[self._given :]
