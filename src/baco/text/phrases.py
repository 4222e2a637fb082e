"""Lists of phrases: which token begins a listed phrase, and how many phrases a text has.

A list is a text file: one phrase a line, ``#`` begins a comment. Case, the kind of apostrophe and
the amount of white space do not matter. A word may end in ``*``: ``delv*`` is any word that begins
with these letters.

The *key word* of a phrase is its first word that is no function word, or its last word where all
are: "testament" in "a testament to". The words before it are its *opening*. What follows the key
word cannot be known where it is about to be written, and is read by :meth:`Phrases.count` alone.

A token *begins* a key word if its text, without leading white space, is

- the first letters of the key word, up to all of them: at least half of them, or more than any
  other token of the vocabulary has; or
- for a key word with ``*``, a text that begins with the letters before ``*``.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.text.vocabulary import TokenTexts, Vocabulary, load_words

DEFAULT = "english.slop.txt"
_MAX_PHRASES = 10_000
# A word: letters and digits, with apostrophes and hyphens inside.
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*\*?")
_BEFORE = r"(?<![^\W_])(?<![^\W_]['-])"
_AFTER = r"(?![^\W_])(?!['-][^\W_])"
# Tokens of the text so far that are read beyond the bytes of an opening, for white space.
_MARGIN = 16


@dataclass(frozen=True, slots=True)
class Phrase:
    """A listed phrase: its words in lower case, and the index of its key word."""

    words: tuple[str, ...]
    key: int

    @property
    def opening(self) -> tuple[str, ...]:
        """The words before the key word."""
        return self.words[: self.key]


@dataclass(frozen=True, eq=False)
class Phrases:
    """A list of phrases."""

    entries: tuple[Phrase, ...]
    _openings: "WeakKeyDictionary[TokenTexts, PhraseOpenings]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Read the text of a list.

        Args:
            text: one phrase a line.
            source: names the list in errors.

        Raises:
            BacoError: no phrases, too many, or a line that is not words.
        """
        functions = load_words("english")
        entries = dict[tuple[str, ...], Phrase]()
        for number, line in enumerate(text.splitlines(), 1):
            words = tuple(normal(line.partition("#")[0]).split())
            if not words:
                continue
            wrong = next((word for word in words if not _WORD.fullmatch(word)), None)
            if wrong is not None:
                raise BacoError(
                    f"{source}, line {number}: {wrong!r} is not a word; give one phrase a line, of "
                    "words of letters and digits, each with * at its end or without"
                )
            key = next((i for i, word in enumerate(words) if word not in functions), len(words) - 1)
            entries[words] = Phrase(words, key)
        if not entries:
            raise BacoError(f"{source} lists no phrases: give one a line")
        if len(entries) > _MAX_PHRASES:
            raise BacoError(f"{source} lists {len(entries)} phrases, at most {_MAX_PHRASES} fit")
        return cls(tuple(entries.values()))

    def count(self, text: str) -> int:
        """How many listed phrases a text has, the whole phrase each; none overlaps another."""
        return len(self.matches(text))

    def matches(self, text: str) -> list[str]:
        """The listed phrases of a text as it spells them, in lower case; none overlaps another."""
        return self._pattern.findall(normal(text))

    def openings(self, vocabulary: Vocabulary) -> "PhraseOpenings":
        """The tokens that begin these phrases, computed once for each tokenizer and device."""
        assert vocabulary.texts is not None
        openings = self._openings.get(vocabulary.texts)
        if openings is None or openings.device != vocabulary.word_start.device:
            openings = PhraseOpenings(self, vocabulary)
            self._openings[vocabulary.texts] = openings
        return openings

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.entries, key=lambda phrase: -len(phrase.words))
        return re.compile("|".join(_regex(phrase.words) + _AFTER for phrase in longest_first))


class PhraseOpenings:
    """Which tokens of a vocabulary begin listed phrases, and after which words."""

    def __init__(self, phrases: Phrases, vocabulary: Vocabulary) -> None:
        assert vocabulary.texts is not None
        self._texts = vocabulary.texts
        self.device = vocabulary.word_start.device
        word_start = vocabulary.word_start.tolist()
        always = torch.zeros(vocabulary.size, dtype=torch.bool)
        sometimes = torch.zeros_like(always)
        # Of a token: whether the text so far must have ended the word before, and the openings.
        self._after: dict[int, tuple[bool, re.Pattern[str] | None]] = {}
        by_token = dict[int, set[tuple[str, ...]]]()
        longest = 0
        for phrase, tokens in _beginning_tokens(phrases, vocabulary.texts):
            longest = max(longest, sum(len(word.encode()) + 1 for word in phrase.opening))
            for token in tokens:
                by_token.setdefault(token, set()).add(phrase.opening)
        for token, openings in by_token.items():
            if () in openings and word_start[token]:
                always[token] = True
                continue
            patterns = [_regex(words) + r"\s*$" for words in sorted(openings) if words]
            pattern = None if () in openings else re.compile("|".join(patterns))
            sometimes[token] = True
            self._after[token] = (not word_start[token], pattern)
        self.always, self._sometimes = always.to(self.device), sometimes.to(self.device)
        self._tail = longest + _MARGIN

    def begun(self, token: Tensor, tail: Callable[[int, int], Sequence[int]]) -> Tensor:
        """Whether a token, after the text so far, begins a listed phrase.

        Args:
            token: int64 [N].
            tail: ``(position, count)`` → the last ``count`` tokens before a position.

        Returns:
            bool [N].
        """
        begun = self.always[token]
        for position in self._sometimes[token].nonzero()[:, 0].tolist():
            text = normal(self._texts.decode(tail(position, self._tail)))
            new_word, pattern = self._after[int(token[position])]
            fits = not new_word or not text or text[-1].isspace()
            begun[position] = fits and (pattern is None or pattern.search(text) is not None)
        return begun


def load_phrases(path: str | None) -> Phrases:
    """A list of phrases: a file, or the built-in one.

    Raises:
        BacoError: the file cannot be read or is not a list.
    """
    if path is None:
        file = resources.files("baco").joinpath("text", "word_lists", DEFAULT)
        return Phrases.parse(file.read_text(encoding="utf-8"), DEFAULT)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BacoError(
            f"the phrase list {path!r} cannot be read: give a UTF-8 text file with one phrase a "
            "line"
        ) from error
    return Phrases.parse(text, f"phrase list {path!r}")


def normal(text: str) -> str:
    """A text in the form that phrases are compared in: lower case, straight apostrophes."""
    return text.lower().replace("\u2019", "'")


def _regex(words: Sequence[str]) -> str:
    parts = [re.escape(word.rstrip("*")) + (r"[^\W_]*" * word.endswith("*")) for word in words]
    return _BEFORE + r"\s+".join(parts)


def _beginning_tokens(phrases: Phrases, texts: TokenTexts) -> list[tuple[Phrase, list[int]]]:
    """The tokens that begin the key word of each phrase."""
    ids = dict[str, list[int]]()
    for token, data in enumerate(texts.data):
        text = normal(data.decode("utf-8", errors="replace")).lstrip()
        if text:
            ids.setdefault(text, []).append(token)
    ordered = sorted(ids)
    beginning = []
    for phrase in phrases.entries:
        key = phrase.words[phrase.key]
        letters = key.rstrip("*")
        parts = [letters[:end] for end in range(1, len(letters) + 1) if letters[:end] in ids]
        chosen = {part for part in parts if 2 * len(part) >= len(letters)} | set(parts[-1:])
        if key.endswith("*"):
            for text in ordered[bisect_left(ordered, letters) :]:
                if not text.startswith(letters):
                    break
                chosen.add(text)
        beginning.append((phrase, [token for text in sorted(chosen) for token in ids[text]]))
    return beginning
