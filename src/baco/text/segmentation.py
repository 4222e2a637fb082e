"""Word segmentation for metrics, in every script.

In scripts without spaces, a character with its combining marks is a word. Elsewhere words are those
of Unicode's UAX #29 (default word boundaries), as the `regex` package finds them. Texts are
compared in lower case and in normal form C, so that é is one letter however it is encoded.
"""

import unicodedata
from collections.abc import Sequence

import regex

# Scripts written without spaces, as ranges of code points (Unicode blocks).
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x109F),  # Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A00, 0x1AAF),  # Buginese, Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x312F),  # radicals, kana, Bopomofo
    (0x3190, 0x31FF),  # Kanbun, Bopomofo and kana extensions
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar extension
    (0xAA60, 0xAA7F),
    (0xAA80, 0xAADF),  # Tai Viet
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width katakana
    (0x116D0, 0x116FF),  # Myanmar extension
    (0x1AFF0, 0x1B16F),
    (0x20000, 0x3FFFD),
)

_CLASS = "".join(f"{chr(low)}-{chr(high)}" for low, high in UNSPACED)
_CLUSTER = regex.compile(rf"((?=[{_CLASS}])\X)")
_BOUNDARY = regex.compile(r"\b", regex.WORD | regex.V1)
_SOMETHING = regex.compile(r"[\p{L}\p{M}\p{N}\p{S}]")
# Joiners inside a word of Devanagari or Persian are part of it.
_BARE = regex.compile(r"[\p{L}\p{M}\p{N}]+(?:[\u200c\u200d]+[\p{L}\p{M}\p{N}]+)*")


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script written without spaces."""
    code = ord(character)
    return any(low <= code <= high for low, high in UNSPACED)


def words(text: str) -> list[str]:
    """Lower-case words. Punctuation is not a word; a symbol or an emoji is."""
    parts: list[str] = []
    for index, part in enumerate(_CLUSTER.split(_normalized(text))):
        # Every second part is a character of a script without spaces.
        parts += [part] if index % 2 else _BOUNDARY.split(part)
    return [part for part in parts if _SOMETHING.search(part)]


def bare_words(text: str) -> list[str]:
    """Lower-case runs of letters with their marks, and digits.

    In ASCII these are the tokens of ROUGE's tokenizer, which drops all other letters.
    """
    return list(_BARE.findall(spaced(_normalized(text))))


def spaced(text: str) -> str:
    """The text with white space around every character of a script written without spaces."""
    return str(_CLUSTER.sub(r" \1 ", text))


def distinct(texts: Sequence[str], order: int) -> float:
    """Distinct-n: distinct n-grams / all n-grams of the pooled texts (Li et al. 2016).

    Range 0 to 1, higher is more diverse; 0 without any n-gram. Cost: linear in words.
    """
    distinct_ngrams: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        row = words(text)
        ngrams = list(zip(*(row[start:] for start in range(order)), strict=False))
        distinct_ngrams.update(ngrams)
        total += len(ngrams)
    return len(distinct_ngrams) / total if total else 0.0


def _normalized(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower())
