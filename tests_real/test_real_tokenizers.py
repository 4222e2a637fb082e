"""Pairs of real tokenizers of open models, whose models have random weights."""

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baco.text.shared_text import TextTokenizer
from tests.text_pairs import (
    PARTS,
    PROMPT,
    assert_cuts_at_seams_keep_the_ids,
    assert_is_naive,
    assert_words_begin_at_seams,
    baco_of,
    permuted_model,
    tiny_model,
)
from tests.tokenizer_kinds import permuted
from tests_real.real_tokenizers import FILES, path_of, tokenizer_of

NAMES = tuple(FILES)

pytestmark = pytest.mark.skipif(
    not all(path_of(name).exists() for name in NAMES),
    reason="the tokenizers are not there: make test-real",
)


@cache
def text_tokenizer(name: str) -> TextTokenizer:
    return TextTokenizer(tokenizer_of(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_words_begin_at_safe_seams(name: str) -> None:
    assert_words_begin_at_seams(text_tokenizer(name))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=14))
def test_a_text_has_the_same_ids_whether_it_is_cut_at_safe_seams_or_not(
    name: str, parts: list[str]
) -> None:
    assert_cuts_at_seams_keep_the_ids(name, text_tokenizer(name), "".join(parts).encode())


@pytest.mark.parametrize(("base", "aligned"), [*pairwise(NAMES), (NAMES[-1], NAMES[0])])
def test_the_engine_equals_the_naive_reference_token_for_token(base: str, aligned: str) -> None:
    models = [(tokenizer_of(name), tiny_model(tokenizer_of(name), 0)) for name in (base, aligned)]
    baco = baco_of(*models)
    drawn: dict[str, Any] = {"seed": NAMES.index(base), "temperature": 1.0, "max_tokens": 12}
    answer = baco.generate(PROMPT, router="Rand:0.5", n=2, **drawn)[1]
    assert {*assert_is_naive(baco, answer, **drawn)} == {"base", "aligned"}


@pytest.mark.parametrize(
    ("name", "partner"), [("gpt2", "mistral"), ("mistral", "gpt2"), ("unigram", "tekken")]
)
def test_permuting_the_ids_changes_no_byte_of_any_answer(name: str, partner: str) -> None:
    tokenizer, order = permuted(tokenizer_of(name), seed=1)
    other = tokenizer_of(partner), tiny_model(tokenizer_of(partner), 1)
    changed = permuted_model(tokenizer_of(name), 0, tokenizer, order)
    plain = tokenizer_of(name), tiny_model(tokenizer_of(name), 0)
    before, after = (
        baco_of(one, other).generate(PROMPT, router="Rand:0.5", n=2, seed=2, max_tokens=16)
        for one in (plain, (tokenizer, changed))
    )
    assert [answer.pieces for answer in before] == [answer.pieces for answer in after]
    assert [answer.token_ids for answer in before] != [answer.token_ids for answer in after]
