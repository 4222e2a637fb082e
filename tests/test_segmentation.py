"""Words in every script: one table of scripts without spaces; marks belong to their letters."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenize import tokenize

from baco.evaluation.metrics.lexical import self_bleu, self_rouge_l
from baco.text.segmentation import UNSPACED, bare_words, distinct, is_unspaced, spaced, words
from baco.text.vocabulary import character_starts_word

# Words of scripts that are written with spaces, many with combining marks or joiners inside.
SPACED_SCRIPTS = {
    "Devanagari": ("हिन्दी", "में", "कि", "का", "की", "कू", "क्‍ष"),
    "Bengali": ("বাংলা", "ভাষা", "কী"),
    "Tamil": ("தமிழ்", "மொழி"),
    "Gurmukhi": ("ਪੰਜਾਬੀ", "ਨੂੰ"),
    "Arabic": ("مَرْحَبًا", "بِكُم", "كِتَاب"),
    "Persian": ("می‌خواهم", "کتاب"),
    "Hebrew": ("שָׁלוֹם", "עוֹלָם"),
    "Vietnamese": ("tiếng", "việt"),
    "Latin": ("été", "münchen", "naïve"),
    "Cyrillic": ("привет", "й"),
    "Greek": ("ελλάς", "ΐ"),
    "Hangul": ("한국어", "단어"),
}
UNSPACED_SCRIPTS = {
    "Thai": ("ส", "วั", "ดี", "กำ"),
    "Lao": ("ສ", "ບາ"[0], "ດີ"),
    "Myanmar": ("မြ", "န်"),
    "Khmer": ("ខ្មែ"[0], "រ"),
    "Tibetan": ("བོ", "ད"),
    "Han": ("夏", "天", "𠀀"),
    "Kana": ("カ", "ナ", "が", "か\u3099", "ｶ"),
}
ALL_SPACED = [word for row in SPACED_SCRIPTS.values() for word in row]
ALL_UNSPACED = [word for row in UNSPACED_SCRIPTS.values() for word in row]
PUNCTUATION = st.sampled_from(("", ",", ".", "!", "?", "…", "»"))


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@given(st.text(st.characters(max_codepoint=127)))
def test_bare_words_of_ascii_are_rouges_tokens(text: str) -> None:
    assert bare_words(text) == tokenize(text, None)


@given(st.lists(st.tuples(st.sampled_from(ALL_SPACED), PUNCTUATION), max_size=8))
def test_a_word_with_combining_marks_is_one_word(marked_words: list[tuple[str, str]]) -> None:
    text = " ".join(word + mark for word, mark in marked_words)
    expected = [composed(word.lower()) for word, _ in marked_words]
    assert bare_words(text) == words(text) == expected


@given(st.lists(st.sampled_from(ALL_UNSPACED), max_size=8))
def test_a_character_and_its_marks_are_one_word_in_a_script_without_spaces(
    characters: list[str],
) -> None:
    expected = [composed(character) for character in characters]
    assert words("".join(characters)) == bare_words("".join(characters)) == expected


@given(st.lists(st.sampled_from(ALL_SPACED + ALL_UNSPACED), max_size=8).map(" ".join))
def test_decomposed_letters_are_the_same_words(text: str) -> None:
    for split in (words, bare_words):
        assert split(decomposed(text)) == split(composed(text))


@given(st.text(max_size=40))
def test_no_letter_mark_or_digit_is_lost(text: str) -> None:
    plain = composed(text.lower())
    kept = [c for c in plain if unicodedata.category(c)[0] in "LMN"]
    for split in (words, bare_words):
        joined_words = "".join(split(text))
        assert [c for c in joined_words if unicodedata.category(c)[0] in "LMN"] == kept


@given(st.text(max_size=40))
def test_no_bare_word_holds_white_space_or_punctuation(text: str) -> None:
    for word in bare_words(text):
        assert not any(c.isspace() or unicodedata.category(c)[0] in "PS" for c in word)


def test_words_follow_unicode_and_punctuation_is_not_a_word() -> None:
    sentence = "Can't stop: it costs 3.14 € in München, e.g. well-known d'été 😀!"
    assert words(sentence) == [
        "can't", "stop", "it", "costs", "3.14", "€", "in", "münchen", "e.g", "well", "known",
        "d'été", "😀",
    ]  # fmt: skip
    assert words("👩‍👩‍👧 🇩🇪🇫🇷") == ["👩‍👩‍👧", "🇩🇪", "🇫🇷"]
    assert bare_words("Привет, München! It's 9.") == ["привет", "münchen", "it", "s", "9"]


@pytest.mark.parametrize("low_high", UNSPACED, ids=lambda pair: f"{pair[0]:04X}")
def test_words_and_word_starts_read_one_table_of_scripts(low_high: tuple[int, int]) -> None:
    low, high = low_high
    letters = [chr(c) for c in range(low, min(high, low + 400) + 1) if chr(c).isalpha()]
    for letter in letters:
        assert is_unspaced(letter)
        assert character_starts_word(letter)
        assert spaced(f"a{letter}b") == f"a {letter} b"
        assert len(words(f"a{letter}b")) == len(bare_words(f"a{letter}b")) == 3
    for letter in "aéжकا한":
        assert not is_unspaced(letter)
        assert not character_starts_word(letter)


def test_devanagari_texts_without_a_common_word_have_similarity_zero() -> None:
    assert self_rouge_l(["कि का", "की कू"]) == 1.0
    assert self_rouge_l(["कि का", "कि का"]) == 0.0
    assert self_rouge_l([decomposed("été à Paris"), composed("été à Paris")]) == 0.0
    assert self_bleu(["कि का की कू", "कि का की कू"]) == 0.0


@given(st.text(max_size=40), st.text(max_size=40))
def test_distinct_counts_the_same_words(one: str, other: str) -> None:
    both = [*words(one), *words(other)]
    assert distinct([one, other], 1) == (len(set(both)) / len(both) if both else 0.0)
