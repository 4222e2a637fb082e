"""Lexical diversity: cases by hand, the reference packages as oracles, and the laws.

"Duplicating a sample never raises diversity" holds in two senses. Where figures are shares of a
pool (distinct-n, EAD), or each sample is matched against all the others (self-BLEU), it holds for a
copy of any sample. Where they are means over pairs (self-ROUGE-L), a copy of an outlier evens out
the crowd and may raise them, as it should; there it holds for a copy of a sample that is at least
as typical as the average, and for a copy of every sample at once.

"Identical samples give the minimum" is 0 for self-BLEU and self-ROUGE-L. Shares of a pool of n
samples have no such bound of their own: there, a set is never less diverse than as many copies of
its longest sample.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from baco.evaluation.metrics.lexical import (
    expectation_adjusted_distinct,
    self_bleu,
    self_rouge_l,
)
from baco.text.segmentation import bare_words, distinct, words

Figure = Callable[[Sequence[str]], float]

POOLED: dict[str, Figure] = {
    **{f"distinct_{order}": partial(distinct, order=order) for order in (1, 2, 3)},
    "ead": expectation_adjusted_distinct,
}
ONE_MINUS: dict[str, Figure] = {"self_bleu": self_bleu, "self_rouge_l": self_rouge_l}
EVERY = POOLED | ONE_MINUS

figures = pytest.mark.parametrize("figure", EVERY.values(), ids=EVERY)
pooled = pytest.mark.parametrize("figure", POOLED.values(), ids=POOLED)
one_minus = pytest.mark.parametrize("figure", ONE_MINUS.values(), ids=ONE_MINUS)

WORDS = ("a", "b", "c", "d", "the", "sea,", "Sun.", "夏", "été")
SAMPLE = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
SAMPLES = st.lists(SAMPLE, min_size=2, max_size=6)


def test_distinct_counts_n_grams_of_the_pooled_samples() -> None:
    texts = ["a b a b", "a b c"]  # 7 words, 5 pairs (ab ba ab | ab bc), 3 triples (aba bab | abc)
    assert distinct(texts, 1) == pytest.approx(3 / 7)
    assert distinct(texts, 2) == pytest.approx(3 / 5)
    assert distinct(texts, 3) == pytest.approx(3 / 3)


def test_no_n_gram_spans_two_samples() -> None:
    assert distinct(["a b", "c d"], 2) == 1.0
    assert distinct(["a b", "b a"], 3) == 0.0


def test_expectation_adjusted_distinct_equals_scores_computed_by_hand() -> None:
    # Three distinct of four words, drawn from two: 2 (1 - (1/2)^4) = 1.875 are to be expected.
    assert expectation_adjusted_distinct(["a b", "a c"], vocabulary=2) == pytest.approx(3 / 1.875)
    # From a vocabulary without bounds all words are expected to differ: it is distinct-1.
    assert expectation_adjusted_distinct(["a b", "a c"], 10**12) == pytest.approx(3 / 4)


def test_length_alone_does_not_lower_ead() -> None:
    short, long = "a b c d", "a b c d " * 50
    assert distinct([long], 1) / distinct([short], 1) == pytest.approx(1 / 50)
    ratio = expectation_adjusted_distinct([long], 4) / expectation_adjusted_distinct([short], 4)
    assert ratio > 0.6


def test_self_bleu_equals_a_score_computed_by_hand() -> None:
    # "a b c" against "a b d": 2 of 3 words, 1 of 2 pairs, 0 of 1 triple (smoothed to 1/2 of one).
    alike = math.exp((math.log(2 / 3) + math.log(1 / 2) + math.log(1 / 2)) / 3)
    assert self_bleu(["a b c", "a b d"]) == pytest.approx(1 - alike)


@given(st.lists(SAMPLE.filter(str.strip), min_size=2, max_size=5))
def test_self_bleu_is_sacrebleu_against_all_the_others(texts: list[str]) -> None:
    bleu = BLEU(effective_order=True)
    spread = [" ".join(text.replace("夏", " 夏 ").split()) for text in texts]
    scores = [
        bleu.sentence_score(text, spread[:index] + spread[index + 1 :]).score / 100
        for index, text in enumerate(spread)
    ]
    assert self_bleu(texts) == pytest.approx(1 - sum(scores) / len(scores), abs=1e-9)


def test_self_rouge_l_equals_a_score_computed_by_hand() -> None:
    # LCS "the sat on mat" is 4 long: F1 = 2 · 4 / (6 + 5).
    assert self_rouge_l(["The cat sat on the mat.", "the dog sat on mat"]) == pytest.approx(
        1 - 8 / 11
    )


@given(st.lists(st.text("ab cZ9-,.", max_size=20), min_size=2, max_size=5))
def test_self_rouge_l_is_rouge_score_over_all_pairs(texts: list[str]) -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = [
        scorer.score(one, other)["rougeL"].fmeasure
        if bare_words(one) or bare_words(other)
        else 1.0  # the package leaves two empty texts at 0, though they are alike
        for one, other in combinations(texts, 2)
    ]
    assert self_rouge_l(texts) == pytest.approx(1 - sum(scores) / len(scores))


@figures
@given(texts=SAMPLES, order=st.randoms(use_true_random=False))
def test_order_never_matters(figure: Figure, texts: list[str], order: Random) -> None:
    mixed = list(texts)
    order.shuffle(mixed)
    assert figure(mixed) == pytest.approx(figure(texts), abs=1e-12)


@one_minus
@given(text=SAMPLE, count=st.integers(2, 6))
def test_identical_samples_give_zero(figure: Figure, text: str, count: int) -> None:
    assert figure([text] * count) == 0.0


@one_minus
@given(texts=SAMPLES)
def test_figures_are_shares(figure: Figure, texts: list[str]) -> None:
    assert 0.0 <= figure(texts) <= 1.0


@pooled
@given(texts=SAMPLES)
def test_copies_of_the_longest_sample_are_never_more_diverse(
    figure: Figure, texts: list[str]
) -> None:
    longest = max(texts, key=lambda text: len(words(text)))
    assert figure([longest] * len(texts)) <= figure(texts) + 1e-12


@pytest.mark.parametrize("figure", [*POOLED.values(), self_bleu], ids=[*POOLED, "self_bleu"])
@given(texts=SAMPLES, place=st.integers(0, 5))
def test_duplicating_any_sample_never_raises_diversity(
    figure: Figure, texts: list[str], place: int
) -> None:
    assert figure([*texts, texts[place % len(texts)]]) <= figure(texts) + 1e-12


@given(SAMPLES)
def test_duplicating_a_typical_sample_never_raises_a_mean_over_pairs(texts: list[str]) -> None:
    def apart(index: int) -> float:
        return sum(self_rouge_l([texts[index], other]) for other in texts)

    typical = texts[min(range(len(texts)), key=apart)]
    assert self_rouge_l([*texts, typical]) <= self_rouge_l(texts) + 1e-12


def test_a_copy_of_an_outlier_evens_out_a_crowd() -> None:
    assert self_rouge_l(["a", "a", "a", "b", "b"]) > self_rouge_l(["a", "a", "a", "b"])


@figures
@given(texts=SAMPLES)
def test_duplicating_every_sample_never_raises_diversity(figure: Figure, texts: list[str]) -> None:
    assert figure([*texts, *texts]) <= figure(texts) + 1e-12


@figures
@pytest.mark.parametrize("texts", [["", ""], ["", "word"], ["word", "word"], [" ", "夏"]])
def test_empty_and_one_word_samples_have_a_figure(figure: Figure, texts: list[str]) -> None:
    assert math.isfinite(figure(texts))


def test_an_empty_sample_resembles_only_another_empty_one() -> None:
    for figure in ONE_MINUS.values():
        assert figure(["", ""]) == 0.0
        assert figure(["", "word"]) == 1.0


def test_a_script_without_spaces_is_read_by_its_characters() -> None:
    assert words("夏天。Go!") == ["夏", "天", "go"]
    assert words("カナ สวัสดี กำ") == ["カ", "ナ", "ส", "วั", "ส", "ดี", "กำ"]
    assert self_rouge_l(["我喜欢夏天", "我喜欢冬天"]) == pytest.approx(1 - 4 / 5)
    assert 0 < self_bleu(["我喜欢夏天的海", "我喜欢冬天的海"]) < 1
