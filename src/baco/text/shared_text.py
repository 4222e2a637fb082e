"""One text in the token ids of several tokenizers: what models with different tokenizers share.

An answer is bytes. Each model has ids of its own for it (`OwnTokens`): those it drew itself, and
the encodings of what the other model wrote. A text is encoded from its last *safe seam*, a place
that no token can span, so that its ids are those of encoding the whole text. Ids that a model drew
are replaced only where a token spans the place where the other model's words begin.

The seams are found from the tokenizer itself. A place is safe where white space follows another
character, or a letter follows another one in a script without spaces, and no entry of the
vocabulary has these two next to each other. A tokenizer that encodes a trial text differently when
it is cut at such places has no seams, for instance because a rule of it looks across words. Its
texts are encoded whole.

It knows tokenizers and bytes. It knows no models and no logits.
"""

import codecs
import re
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from baco.errors import BacoError
from baco.source import Source
from baco.text.encoder import tokenizing
from baco.text.segmentation import is_unspaced
from baco.text.token_bytes import spell

# A text whose last seam is further back, in bytes, counts as encoded whole.
SEAM_BOUND = 256
_SPACES = b" \t\n\r"
# A character of three or four bytes that follows another one of several bytes, in a token.
_LONG_AFTER_LONG = re.compile(rb"(?<=[\x80-\xbf])[\xe0-\xf4][\x80-\xbf]{0,3}")
_BYTE_AND_SPACE = re.compile(rb"[^ \t\n\r][ \t\n\r]")
# Texts that precede a text while it is encoded, so that it is not encoded as the start of a text:
# some tokenizers add a space there. The first one whose ids stay as they are is used.
_BEFORE_SPACE, _BEFORE_OTHER = ("a", "1", "."), ("\n", "(", "|", "~", ".")
# These must keep their bytes in every tokenizer of a pair.
_ORDINARY = (
    "The weather in Lisbon is warm, so we walk along the shore",
    "One line\nand another one",
    "if it rains:\n    stay",
)
# The ids of these must not change where they are cut at a seam.
_TRIALS = (
    "The quick brown fox can't jump over 12,345 lazy dogs, or can it?\nWe walk  along the shore: "
    "Grüße aus München und Zürich, où est la bibliothèque\tand \"all of this\" is 'quoted'.",
    "def add(a, b):\n    if a == 0:\n\treturn b  # no sum\n\n\n    return a+b;\n\nprint(\nadd)",
    "1. One \n2. Two\n\n- a - b\r\n- c  \n\n\n  d   e    f\n \n g … \n h!\n\n i?! \n\n“j” ‘k’",
    "夏天去海边 春の海 終日のたり Привет, мир! 🌊🏖️ 🎉 안녕하세요 세계 مرحبا بالعالم नमस्ते दुनिया",
    "HTML <b>text</b> and $x^2 + 1$ or camelCase snake_case CONSTANT e-mail a@b.c 3.14 1000000",
)
# For the noise words of tokens without text: end tokens, and other special tokens.
_END, _SPECIAL = 0x5EED0E0D, 0x5EED05EC


class TextTokenizer:
    """A model's tokenizer over texts that it shares with another tokenizer.

    Args:
        tokenizer: of ``transformers``, with a backend of the ``tokenizers`` library.
        name: of the model, for messages.
        end_ids: the tokens that end a text.

    Attributes:
        data: the bytes of every id; empty for special tokens and unused ids.
        noise_words: a number below 2**31 for each id that keys its noise. It depends on the token's
            bytes, not on its id.
        has_seams: whether texts can be encoded from a seam.

    Raises:
        BacoError: the tokenizer has no backend, or does not return ordinary text as it was.
    """

    def __init__(self, tokenizer: Any, name: str, end_ids: Collection[int] = ()) -> None:
        self.name, self._backend = name, _plain_backend(tokenizer, name)
        size = max(tokenizer.get_vocab().values()) + 1
        self.data: list[bytes] = [b""] * size
        for token in spell(tokenizer):
            self.data[token.id] = token.data
        self.noise_words = _noise_words(tokenizer, self.data, end_ids)
        # Pairs of a byte and a white space that some token has next to each other.
        self._spanned = set(_BYTE_AND_SPACE.findall(b"\0".join(self.data)))
        self._junctions = {pair for data in self.data for pair in _junctions(data)}
        self._known: dict[str, bool] = {}  # whether a character has tokens
        self._anchors = {text: self._call(text) for text in {*_BEFORE_SPACE, *_BEFORE_OTHER}}
        # White space without a token of its own is part of a longer unknown token.
        self._spaces = bytes(
            space for space in _SPACES if self._keeps(b"a" + bytes([space]) + b"b")
        )
        self._check_ordinary()
        self.has_seams = True
        self.has_seams = all(map(self._is_cut_safely, _TRIALS))

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.data)

    def encode(self, data: bytes) -> list[int]:
        """The ids of a text that continues another one. Names of special tokens are plain text.

        Bytes that are not UTF-8 are read as U+FFFD.
        """
        text = data.decode("utf-8", errors="replace")
        if not text:
            return []
        anchors = _BEFORE_SPACE if text[0].isspace() else _BEFORE_OTHER
        ids: list[int] | None = None
        for anchor in anchors:
            before, whole = self._anchors[anchor], self._call(anchor + text)
            after = whole[len(before) :]
            if whole[: len(before)] == before:
                if self.bytes_of(after) == data:
                    return after
                ids = after if ids is None else ids
        return self._call(text) if ids is None else ids

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The text that ids stand for."""
        return b"".join([self.data[id_] for id_ in ids])

    def is_seam(self, text: bytes, at: int) -> bool:
        """Whether no token can span the place ``at`` of a text, which has a byte there.

        The start of a text is a seam.
        """
        if at == 0:
            return True
        if not self.has_seams:
            return False
        if text[at] >= 0xE0:
            return self._is_seam_of_letters(text, at)
        if text[at] not in self._spaces:
            return False
        if text[at - 1 : at + 1] in self._spanned:
            return False
        before = text[max(0, at - 4) : at].decode("utf-8", errors="replace")[-1]
        # A line break can be one word with punctuation before it, whatever follows.
        return not before.isspace() and (text[at] == 0x20 or before.isalnum())

    def _is_seam_of_letters(self, text: bytes, at: int) -> bool:
        """`is_seam` between two letters of scripts without spaces."""
        before = text[max(0, at - 4) : at].decode("utf-8", errors="replace")[-1]
        after = text[at : at + 4].decode("utf-8", errors="replace")[0]
        for letter in (before, after):
            if unicodedata.category(letter) != "Lo" or not is_unspaced(letter):
                return False
            if letter not in self._known:
                self._known[letter] = self._keeps(letter.encode())
            if not self._known[letter]:  # unknown characters can become one token
                return False
        left, right = before.encode(), after.encode()
        ends = [left[start:] for start in range(len(left))]
        starts = [right[:end] for end in range(1, len(right) + 1)]
        return not any((one, other) in self._junctions for one in ends for other in starts)

    def _call(self, text: str) -> list[int]:
        with tokenizing(self):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    @property
    def name_or_path(self) -> str:
        """The model's name, for errors of the tokenizer."""
        return self.name

    def _keeps(self, data: bytes) -> bool:
        return self.bytes_of(self.encode(data)) == data

    def _check_ordinary(self) -> None:
        for text in _ORDINARY:
            if not self._keeps(text.encode()):
                read = self.bytes_of(self.encode(text.encode())).decode(errors="replace")
                raise BacoError(
                    f"the tokenizer of {self.name} does not keep text: it reads {text!r} as "
                    f"{read!r}; models of different tokenizers share text, so use a model whose "
                    "tokenizer keeps case, spaces and line breaks"
                )

    def _is_cut_safely(self, trial: str) -> bool:
        data = trial.encode()
        whole, cuts = self.encode(data), [0, len(data)]
        cuts[1:1] = [at for at in range(1, len(data)) if self.is_seam(data, at)]
        parts = [self.encode(data[a:b]) for a, b in pairwise(cuts)]
        return [id_ for part in parts for id_ in part] == whole


def _plain_backend(tokenizer: Any, name: str) -> Any:
    """A backend with the same model and ids that reads names of special tokens as plain text."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BacoError(
            f"{name} has no fast tokenizer, and models of different tokenizers need one: give a "
            "model with a tokenizer.json"
        )
    plain = Tokenizer(backend.model)  # shared, not copied
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    added = backend.get_added_tokens_decoder()
    plain.add_tokens([added[id_] for id_ in sorted(added)])
    if plain.get_added_tokens_decoder().keys() != added.keys():
        # Ids were left out between added tokens.
        plain = Tokenizer.from_str(backend.to_str())
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    return plain


def _junctions(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Neighbouring characters of several bytes in a token, as far as it has their bytes."""
    for match in _LONG_AFTER_LONG.finditer(data):
        start = match.start() - 1
        while start and 0x80 <= data[start] <= 0xBF:
            start -= 1
        yield data[start : match.start()], match[0]


def _noise_words(tokenizer: Any, data: Sequence[bytes], end_ids: Collection[int]) -> list[int]:
    """See `TextTokenizer.noise_words`."""
    names: Mapping[str, int] = tokenizer.get_vocab()
    words, used = [0] * len(data), dict[tuple[bytes, int], int]()
    own_end = getattr(tokenizer, "eos_token_id", None)
    # By name, so that the order of ids does not matter. A tokenizer's own end token comes first.
    for name, id_ in sorted(names.items(), key=lambda item: (item[1] != own_end, item[0])):
        if id_ in end_ids:
            key = b"", _END
        elif data[id_]:
            key = data[id_], 0
        else:
            key = name.encode("utf-8", "surrogatepass"), _SPECIAL
        rank = used[key] = used.get(key, -1) + 1
        words[id_] = zlib.crc32(key[0], (key[1] + rank) & 0xFFFFFFFF) & 0x7FFFFFFF
    return words


def is_open(data: bytes) -> bool:
    """Whether a text ends inside a word whose first letter is still to come: in white space, or
    inside a character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    end = decoder.decode(data[-4:])
    return bool(decoder.getstate()[0]) or end[-1:].isspace()


@dataclass(slots=True)
class EncodingStats:
    """Running totals of how texts were encoded.

    Attributes:
        encoded: tokens that encodings returned.
        whole: encodings of a text without a seam within `SEAM_BOUND` bytes.
        replaced: ids that a model had read or drawn, and that were replaced.
        seconds: spent in encoding.
    """

    encoded: int = 0
    whole: int = 0
    replaced: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class OwnTokens:
    """The ids that one model has for a growing text.

    Attributes:
        tokenizer: of the model.
        ids: in order; those that it drew, thinking included, and encodings of the rest.
        covered: the bytes of the text that they stand for.
    """

    tokenizer: TextTokenizer
    ids: list[int] = field(default_factory=list)
    covered: int = 0
    # (place in the text, ids before it), ascending. Places inside a part that the tokenizer
    # changes, for instance by normalization, are not known.
    _places: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    _fixed: int = 0  # index after the last drawn token without text, which is never replaced

    @property
    def places(self) -> dict[int, int]:
        """Places in the text between two ids → the number of ids before them."""
        return dict(self._places)

    def copy(self) -> "OwnTokens":
        """A copy that can be changed independently."""
        return OwnTokens(
            self.tokenizer, list(self.ids), self.covered, list(self._places), self._fixed
        )

    def draw(self, token: int) -> None:
        """Append a token that the model drew. The ids must cover the text before it."""
        data = self.tokenizer.data[token]
        if not data:
            self.keep(token)
            return
        self.ids.append(token)
        self.covered += len(data)
        self._places.append((self.covered, len(self.ids)))

    def keep(self, token: int) -> None:
        """Append a token that the model drew and that is no part of the text."""
        self.ids.append(token)
        self._places[-1:] = [(self.covered, len(self.ids))]
        self._fixed = len(self.ids)

    def read(self, text: bytes, stats: EncodingStats) -> int:
        """Encode what the ids do not cover of a text.

        Returns:
            How many of the first ids are the same as before.
        """
        end, drawn = len(text), self.covered
        if drawn == end:
            return len(self.ids)
        start, kept = self._last_seam(text)
        stats.whole += drawn - start > SEAM_BOUND
        encoded = self.tokenizer.encode(text[start:])
        stats.encoded += len(encoded)
        offsets = [start]
        for id_ in encoded:
            offsets.append(offsets[-1] + len(self.tokenizer.data[id_]))
        before = self.ids
        if self.tokenizer.bytes_of(encoded) != text[start:]:
            self._cut(kept)
            self.ids = self.ids + encoded
            self._places.append((end, len(self.ids)))
        else:
            index = {offset: number for number, offset in enumerate(offsets)}
            place, kept = next(
                (place, count) for place, count in reversed(self._places) if place in index
            )
            self._cut(kept)
            number = index[place]
            self.ids = self.ids + encoded[number:]
            self._places += [
                (offset, kept + count)
                for count, offset in enumerate(offsets[number + 1 :], start=1)
            ]
        self.covered = end
        same = kept
        while same < min(len(before), len(self.ids)) and before[same] == self.ids[same]:
            same += 1
        stats.replaced += len(before) - same
        return same

    def _last_seam(self, text: bytes) -> tuple[int, int]:
        """The last safe place that lies between two ids, and the number of ids before it."""
        for place, count in reversed(self._places):
            if count <= self._fixed or self.tokenizer.is_seam(text, place):
                return place, count
        raise AssertionError("the start of a text is a seam")

    def _cut(self, count: int) -> None:
        """Drop the ids after the first ``count``, which end at a known place."""
        self.ids = self.ids[:count]
        while self._places[-1][1] > count:
            self._places.pop()


@dataclass(slots=True)
class SharedText:
    """An answer that two models write, each in its own ids.

    Attributes:
        data: the text so far.
        own: the ids of each model.
        position: keys the draws: the bytes of the thinking and the text, and one for each token
            without text.
    """

    own: dict[str, OwnTokens]
    data: bytearray = field(default_factory=bytearray)
    position: int = 0

    def append(self, source: Source, token: int) -> None:
        """Append a token that a model drew."""
        own = self.own[source]
        own.draw(token)
        data = own.tokenizer.data[token]
        self.data += data
        self.position += max(1, len(data))

    def think(self, source: Source, token: int) -> None:
        """Take a token of a model's thinking, which the other model does not read."""
        own = self.own[source]
        own.keep(token)
        self.position += max(1, len(own.tokenizer.data[token]))

    @property
    def is_open(self) -> bool:
        """See :func:`is_open`."""
        return is_open(bytes(self.data[-4:]))


class SharedDetokenizer:
    """Text of tokens that come from several tokenizers, one by one, as `Detokenizer` gives it.

    A character that several tokens spell belongs to the last of them, and the texts of these tokens
    are held back until then. Bytes that are not UTF-8 become U+FFFD.

    Args:
        tokenizers: of the models.
    """

    def __init__(self, tokenizers: Mapping[Source, TextTokenizer]) -> None:
        self._tokenizers = tokenizers
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[str] = []  # texts of tokens up to the unfinished character

    def push(self, token: int, source: Source) -> list[str]:
        """Add a token; returns the texts of the earliest waiting tokens that are now final."""
        self._waiting.append(self._utf8.decode(self._tokenizers[source].data[token]))
        if self._utf8.getstate()[0]:
            return []
        texts, self._waiting = self._waiting, []
        return texts

    def close(self) -> list[str]:
        """End the text; returns the texts of all tokens that were still waiting."""
        if self._waiting:
            self._waiting[-1] += self._utf8.decode(b"", final=True)
        texts, self._waiting = self._waiting, []
        return texts
