"""What counts as a word, where words are counted."""

import re

# Thai, Lao, Burmese, Khmer; kana, CJK ideographs: written without spaces, a character is a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_CHARACTER = re.compile(f"([{_UNSPACED}])")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_LETTERS = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Lower-case words as white space separates them, marks and all."""
    return _WORD.findall(text.lower())


def bare_words(text: str) -> list[str]:
    """Lower-case runs of letters and digits.

    In English these are the tokens of ROUGE's own tokenizer; where that one throws away every
    letter beyond a to z, this keeps them.
    """
    return _LETTERS.findall(text.lower())


def spaced(text: str) -> str:
    """The text with white space around every character of a script written without spaces."""
    return _CHARACTER.sub(r" \1 ", text)
