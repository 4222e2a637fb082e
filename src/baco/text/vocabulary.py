"""Word starts, word ends and roles of all token ids, computed once per tokenizer as tensors.

A token is classified by its own text, without its neighbours. Its bytes come from
`baco.text.token_bytes`, so that unfinished characters are recognised.

A token starts a word if its first character does (`character_starts_word`): `` (the`` and ``."``
do, ``ing`` does not. The second part of a contraction (``'s``) is a separate word.

Roles, by the first rule that fits:

- ``format``: special tokens, ids without a token, white space, new lines, Markdown marks (runs of
  ``# * ` | ~ _ = >``, two or more ``-`` or ``+``, bullets), or other marks with a new line;
- ``content``: the rest of a character that an earlier token began;
- ``punctuation``: everything else without a letter or digit, emoji and symbols included;
- the others are classified by the first word in the token without the marks around it: ``number``
  begins with a digit of any script, ``function`` and ``opinion`` are in a word list, ``name``
  begins with a capital letter, ``content`` is the rest, pieces of words and number words included.

Where a token ends inside a character, a property holds if it holds for the first and for the last
character that its bytes can become.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache, cached_property
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.text.segmentation import is_unspaced
from baco.text.token_bytes import Spelled, spell

ENGLISH = "english"


class Role(IntEnum):
    """The class of a token."""

    PUNCTUATION = 0
    FORMAT = 1
    FUNCTION = 2
    NUMBER = 3
    NAME = 4
    OPINION = 5
    CONTENT = 6


class TokenTexts:
    """The bytes of every token, read from the tokenizer when they are first needed.

    Args:
        tokenizer: of ``transformers``.
        size: V; ids that the tokenizer does not have are empty.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size

    @cached_property
    def data(self) -> list[bytes]:
        """The bytes of each id, in UTF-8; special tokens are empty."""
        table = [b""] * self._size
        for token in spell(self._tokenizer):
            if token.id < self._size and not token.special:
                table[token.id] = token.data
        return table

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens; U+FFFD where characters are incomplete."""
        return b"".join(self.data[token] for token in tokens).decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tables over the V ids of a pair's common vocabulary.

    Attributes:
        size: V.
        role: a :class:`Role` per id, int8 [V].
        word_start: the token begins a new word, bool [V].
        ends_word: its text ends in white space, bool [V].
        special: a special token, or an id without a token, bool [V].
        texts: of the tokens; None where they are not known.
    """

    size: int
    role: Tensor
    word_start: Tensor
    ends_word: Tensor
    special: Tensor
    texts: TokenTexts | None = field(default=None, repr=False, compare=False)
    _sets: dict[tuple[Role, ...], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        size: int,
        *,
        function_words: str | Iterable[str] = ENGLISH,
        opinion_words: str | Iterable[str] = ENGLISH,
    ) -> Self:
        """Compute the tables from a ``transformers`` tokenizer.

        Args:
            tokenizer: byte-level BPE, SentencePiece-like, WordPiece-like or whole words.
            size: V; ids that the tokenizer does not have count as special.
            function_words, opinion_words: what :func:`load_words` takes.

        Raises:
            BacoError: the tokenizer does not tell how its tokens are spelled, or a word list cannot
                be read.
        """
        functions = load_words(function_words, "function")
        opinions = load_words(opinion_words, "opinion")
        role = [int(Role.FORMAT)] * size
        word_start, ends_word, special = [True] * size, [False] * size, [True] * size
        for token in spell(tokenizer):
            if token.id >= size or token.special:
                continue
            texts = token.readings
            special[token.id] = False
            word_start[token.id] = starts_word(token)
            ends_word[token.id] = texts[0][-1:].isspace() and texts[-1][-1:].isspace()
            role[token.id] = int(_role(token, texts, functions, opinions))
        return cls(
            size=size,
            role=torch.tensor(role, dtype=torch.int8),
            word_start=torch.tensor(word_start),
            ends_word=torch.tensor(ends_word),
            special=torch.tensor(special),
            texts=TokenTexts(tokenizer, size),
        )

    def to(self, device: Any) -> Self:
        """The same tables on a device."""
        return type(self)(
            self.size,
            self.role.to(device),
            self.word_start.to(device),
            self.ends_word.to(device),
            self.special.to(device),
            self.texts,
        )

    def in_roles(self, roles: tuple[Role, ...]) -> Tensor:
        """The tokens with any of these roles: bool [V]."""
        if roles not in self._sets:
            tokens = torch.zeros_like(self.role, dtype=torch.bool)
            for role in roles:
                tokens |= self.role == role
            self._sets[roles] = tokens
        return self._sets[roles]


def load_words(
    words: str | PathLike[str] | Iterable[str], kind: str = "function"
) -> frozenset[str]:
    """A word list: a built-in language, a text file (a word a line, ``#`` for comments), or words.

    Args:
        words: a language's name, a path, or the words themselves.
        kind: of a built-in list, "function" or "opinion".

    Raises:
        BacoError: neither a built-in language nor a readable file with words in it.
    """
    if not isinstance(words, str | PathLike):
        return frozenset(map(_lower, words))
    built_in = _built_in(str(words), kind) if str(words).isidentifier() else None
    if built_in is not None:
        return built_in
    try:
        entries = _read(Path(words).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BacoError(
            f"word list {str(words)!r} is neither built in ({ENGLISH}) nor a readable text file: "
            "give the path of a UTF-8 file with one word a line"
        ) from error
    if not entries:
        raise BacoError(f"word list {str(words)!r} is empty: give a file with one word a line")
    return entries


@cache
def _built_in(language: str, kind: str) -> frozenset[str] | None:
    file = resources.files("baco").joinpath("text", "word_lists", f"{language}.{kind}.txt")
    return _read(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read(text: str) -> frozenset[str]:
    lines = (line.partition("#")[0] for line in text.splitlines())
    return frozenset(_lower(word) for line in lines for word in line.split())


def _lower(word: str) -> str:
    """A word in the form that lists are compared in: lower case, with a straight apostrophe."""
    return word.lower().replace("\u2019", "'")


# --- word starts ----------------------------------------------------------------------------------


@cache
def character_starts_word(character: str) -> bool:
    """Whether a text that begins with this character begins a new word.

    White space, punctuation, symbols, emoji and all characters of scripts without spaces do.
    Letters and digits of other scripts do not, nor do characters that attach to the one before:
    combining marks, variation selectors, joiners, skin tones.
    """
    code, category = ord(character), unicodedata.category(character)
    if category[0] == "M" or category == "Cf" or 0x1F3FB <= code <= 0x1F3FF:
        return False
    if character.isspace() or category[0] in "PS" or category in ("Cc", "Cn"):
        return True
    return is_unspaced(character)


def starts_word(token: Spelled) -> bool:
    """Whether an ordinary token begins a new word.

    It does if the tokenizer separates it from the token before, or if its first character begins a
    word: ``##の`` does, ``##ing`` does not. The rest of a character that an earlier token began
    does not.
    """
    if token.continues_character:
        return False
    return token.apart is True or all(
        character_starts_word(text[0]) for text in token.readings if text
    )


# --- roles ----------------------------------------------------------------------------------------

_MARKDOWN = frozenset("#*`|~_=>")
_RUNS = frozenset("-+")
_BULLETS = frozenset("•◦▪‣●○■□")


def _role(
    token: Spelled,
    texts: tuple[str, ...],
    function_words: frozenset[str],
    opinion_words: frozenset[str],
) -> Role:
    if token.continues_character:
        return Role.CONTENT
    if token.apart is False:  # a piece of a word is not in a word list, even if it looks like one
        function_words = opinion_words = frozenset()
        texts = tuple(text.lower() for text in texts)
    first, *other = (role_of(text, function_words, opinion_words) for text in texts)
    if not other or other == [first]:
        return first
    is_wordless = {first, *other} <= {Role.PUNCTUATION, Role.FORMAT}
    return Role.PUNCTUATION if is_wordless else Role.CONTENT


def role_of(text: str, function_words: frozenset[str], opinion_words: frozenset[str]) -> Role:
    """The role of an ordinary token with this text. The word lists are in lower case."""
    core = text.strip()
    word = _bare(core)
    if not word:
        return Role.FORMAT if _is_format(text, core) else Role.PUNCTUATION
    if unicodedata.category(word[0])[0] == "N":
        return Role.NUMBER
    lower = _lower(word)
    if lower in function_words:
        return Role.FUNCTION
    if word != core and _lower(core) in function_words:  # with its marks: 's
        return Role.FUNCTION
    if lower in opinion_words:
        return Role.OPINION
    return Role.NAME if word[0].isupper() else Role.CONTENT


def _is_format(text: str, core: str) -> bool:
    if not core or "\n" in text:
        return True
    marks = frozenset(core)
    return marks <= _MARKDOWN | _BULLETS or (len(core) > 1 and marks <= _RUNS | _MARKDOWN)


def _bare(core: str) -> str:
    """The first word of a text without the marks around it; empty if it has none."""
    if core.isalpha():  # most tokens
        return core
    for part in core.split():
        inside = [index for index, character in enumerate(part) if _in_word(character)]
        if inside:
            return part[inside[0] : inside[-1] + 1]
    return ""


@cache
def _in_word(character: str) -> bool:
    """Letters, digits and the combining marks of letters, but not those of symbols and emoji."""
    category = unicodedata.category(character)
    if "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef":
        return False
    return category[0] in "LN" or category in ("Mn", "Mc")
