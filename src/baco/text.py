"""From token ids to text, one token at a time: no character is cut, stop strings are found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream

from baco.routing.routers import Source


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

    Text is handed out once it is certain to stay: whole characters, and nothing that may turn out
    to be the beginning of a stop string or the white space in front of one.

    Attributes:
        tokenizer: of the aligned half.
        stops: strings that end the answer; what follows from there on is cut off.
        opening: the base model's opening of the next turn, which ends the answer too where it
            stands at a line's start.
        spaced: the answer carries on a text, so that a space it begins with is its own.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    opening: str | None = None
    spaced: bool = False
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
        if not (self._started or self.spaced):
            # The space that joins an answer to its prompt is no part of the answer.
            new = new.lstrip(" ")
        if not new:
            return [], False
        self._started = True
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
        if self.opening is not None:
            at = held.find("\n" + self.opening)
            if at >= 0:
                cuts.append(len(held[:at].rstrip()))
            elif not self.pieces and held.startswith(self.opening):
                cuts.append(0)
        return min(cuts, default=None)

    def _certain(self, held: str) -> int:
        """How much of the held text no later token can turn into part of a stop string."""
        certain = len(held)
        for stop in self.stops:
            certain = min(certain, len(held) - _overlap(held, stop))
        if self.opening is not None:
            at_line = len(held) - _overlap(held, "\n" + self.opening)
            if not self.pieces and self.opening.startswith(held):
                at_line = 0
            certain = min(certain, len(held[:at_line].rstrip()))
        return certain

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
