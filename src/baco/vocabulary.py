"""What every token id is: does it start a word, does it end one, which role does it play?

A token is judged by its own text, without its neighbours. Its text is read off the tokenizer's own
conventions (`baco.tokens`), so that bytes of unfinished characters are seen for what they are.
Computed once per tokenizer, as tensors over the vocabulary.

Roles, by the first rule that fits:

- ``format``: special tokens, ids without a token, white space, new lines, Markdown marks (runs of
  ``# * ` | ~ _ = >``, two or more ``-`` or ``+``, bullets), or other marks with a new line;
- ``punctuation``: everything else without a letter or digit, emoji and symbols included;
- the others go by the word in the token, marks around it taken off: ``number`` begins with a digit,
  ``function`` and ``opinion`` stand in a word list, ``name`` begins with a capital, ``content`` is
  the rest, pieces of words included.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.tokens import Spelled, spell

ENGLISH = "english"


class Role(IntEnum):
    """What a token is."""

    PUNCTUATION = 0
    FORMAT = 1
    FUNCTION = 2
    NUMBER = 3
    NAME = 4
    OPINION = 5
    CONTENT = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tables over the V ids of a pair's common vocabulary.

    Attributes:
        size: V.
        role: a :class:`Role` per id, int8 [V].
        word_start: the token begins a new word, bool [V].
        ends_word: its text ends in white space, bool [V].
        special: a special token, or an id without a token, bool [V].
    """

    size: int
    role: Tensor
    word_start: Tensor
    ends_word: Tensor
    special: Tensor

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        size: int,
        *,
        function_words: Iterable[str] | None = None,
        opinion_words: Iterable[str] | None = None,
    ) -> Self:
        """Read the tables off a ``transformers`` tokenizer.

        Args:
            tokenizer: byte-level BPE, SentencePiece-like, WordPiece-like or whole words.
            size: V; ids that the tokenizer does not have count as special.
            function_words, opinion_words: in lower case; English by default.
        """
        functions = frozenset(function_words or load_words(ENGLISH, "function"))
        opinions = frozenset(opinion_words or load_words(ENGLISH, "opinion"))
        role = [int(Role.FORMAT)] * size
        word_start, ends_word, special = [True] * size, [False] * size, [True] * size
        for token in spell(tokenizer):
            if token.id >= size or token.special:
                continue
            text = token.text
            special[token.id] = False
            word_start[token.id] = starts_word(token)
            ends_word[token.id] = text[-1:].isspace()
            role[token.id] = int(role_of(text, functions, opinions))
        return cls(
            size=size,
            role=torch.tensor(role, dtype=torch.int8),
            word_start=torch.tensor(word_start),
            ends_word=torch.tensor(ends_word),
            special=torch.tensor(special),
        )

    def to(self, device: Any) -> Self:
        """The same tables on a device."""
        return type(self)(
            self.size,
            self.role.to(device),
            self.word_start.to(device),
            self.ends_word.to(device),
            self.special.to(device),
        )


@cache
def _built_in(language: str, kind: str) -> frozenset[str] | None:
    file = resources.files("baco").joinpath("words", f"{language}.{kind}.txt")
    return frozenset(_read(file.read_text(encoding="utf-8"))) if file.is_file() else None


def load_words(words: str | Iterable[str], kind: str = "function") -> frozenset[str]:
    """A word list: a built-in language, a file with words divided by white space, or the words.

    Raises:
        BacoError: a name that is neither a built-in language nor a readable file.
    """
    if not isinstance(words, str):
        return frozenset(word.lower() for word in words)
    built_in = _built_in(words, kind) if words.isidentifier() else None
    if built_in is not None:
        return built_in
    try:
        return frozenset(_read(Path(words).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise BacoError(
            f"word list {words!r} is neither built in ({ENGLISH}) nor a readable text file: give "
            "the path of a file with words divided by white space"
        ) from error


def _read(text: str) -> list[str]:
    lines = (line.partition("#")[0] for line in text.splitlines())
    return [word.lower() for line in lines for word in line.split()]


# --- word starts ----------------------------------------------------------------------------------

# Scripts written without spaces, as ranges of code points (Unicode blocks).
_NO_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x312F),  # radicals, kana, Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo and kana extensions
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar extension
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width katakana
    (0x1B000, 0x1B16F),
    (0x20000, 0x323AF),
)


def character_starts_word(character: str) -> bool:
    """Does a text that begins with this character begin a new word?

    White space, punctuation, symbols, emoji and every character of a script written without spaces
    do; letters and digits of other scripts do not, nor does what joins on to the character before
    it: combining marks, variation selectors, joiners, skin tones.
    """
    code, category = ord(character), unicodedata.category(character)
    if category[0] == "M" or category == "Cf" or 0x1F3FB <= code <= 0x1F3FF:
        return False
    if character.isspace() or category[0] in "PS" or category in ("Cc", "Cn"):
        return True
    return any(low <= code <= high for low, high in _NO_SPACES)


def starts_word(token: Spelled) -> bool:
    """Does a token begin a new word?

    A token that carries on an unfinished character does not. One that is itself the beginning of
    an unfinished character does if the first and the last character it may become do.
    """
    if token.starts_word is not None:
        return token.starts_word
    first = token.data[:1]
    if not first or 0x80 <= first[0] <= 0xBF:
        return False
    length = 1 if first[0] < 0x80 else 2 if first[0] < 0xE0 else 3 if first[0] < 0xF0 else 4
    return all(
        character_starts_word(character)
        for filler in (b"\x80", b"\xbf")
        if (character := _first_character(token.data[:length], filler, length)) is not None
    )


def _first_character(data: bytes, filler: bytes, length: int) -> str | None:
    """The character that ``data`` becomes with its missing bytes filled in, if there is one."""
    # After some lead bytes the second one has a narrower range (RFC 3629).
    narrow = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}
    if len(data) == 1 and length > 1:
        low, high = narrow.get(data[0], (0x80, 0xBF))
        data += bytes([low if filler == b"\x80" else high])
    try:
        return (data + filler * (length - len(data))).decode("utf-8")
    except UnicodeDecodeError:
        return None


# --- roles ----------------------------------------------------------------------------------------

_MARKDOWN = frozenset("#*`|~_=>")
_RUNS = frozenset("-+")
_BULLETS = frozenset("•◦▪‣●○■□")


def role_of(text: str, function_words: frozenset[str], opinion_words: frozenset[str]) -> Role:
    """The role of a token's text; word lists are in lower case."""
    core = text.strip()
    if core and set(core) == {"\ufffd"}:
        return Role.CONTENT  # a part of a character: in text, most often of a letter
    if not any(character.isalnum() for character in core):
        return Role.FORMAT if _is_format(text, core) else Role.PUNCTUATION
    lower = core.lower().replace("\u2019", "'")
    if lower in function_words:  # with its marks: 's, n't
        return Role.FUNCTION
    word = _bare(lower)
    if word[0].isnumeric():
        return Role.NUMBER
    if word in function_words:
        return Role.FUNCTION
    if word in opinion_words:
        return Role.OPINION
    return Role.NAME if _bare(core)[0].isupper() else Role.CONTENT


def _is_format(text: str, core: str) -> bool:
    if not core or "\n" in text:
        return True
    marks = frozenset(core)
    return marks <= _MARKDOWN | _BULLETS or (len(core) > 1 and marks <= _RUNS | _MARKDOWN)


def _bare(core: str) -> str:
    """A word without the marks around it."""
    inside = [index for index, character in enumerate(core) if character.isalnum()]
    return core[inside[0] : inside[-1] + 1]
