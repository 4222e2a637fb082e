"""Lexical diversity of the answers to one prompt: which words and n-grams they share.

Every function takes the samples of one prompt; their order does not matter. An empty sample has no
words and no n-grams.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import combinations

from baco.evaluation.metrics.registry import register_metric
from baco.text.segmentation import bare_words, distinct, spaced, words

# Size of the vocabulary that EAD assumes words are drawn from: that of English BERT.
VOCABULARY = 30_522

Gram = tuple[str, ...]


for _order in (1, 2, 3):
    register_metric(
        f"distinct_{_order}",
        kind="lexical",
        help=f"distinct {_order}-grams over all {_order}-grams of the pooled samples",
    )(partial(distinct, order=_order))


@register_metric("ead", kind="lexical")
def expectation_adjusted_distinct(texts: Sequence[str], vocabulary: int = VOCABULARY) -> float:
    """Distinct words over the number expected of as many uniform draws from a vocabulary.

    EAD = N / (V (1 − ((V − 1) / V)^C)) of N distinct among C words, V the vocabulary's size (Liu et
    al. 2022, "Rethinking and Refining the Distinct Metric"): distinct-1 without the effect of the
    answers' length. Range 0 to a little above 1 (no word repeated), higher is more
    diverse; 0 without words. Cost: linear in words.
    """
    drawn = [word for text in texts for word in words(text)]
    if not drawn:
        return 0.0
    # -expm1(C log1p(-1/V)) is 1 - ((V-1)/V)^C without loss of digits.
    expected = -vocabulary * math.expm1(len(drawn) * math.log1p(-1 / vocabulary))
    return len(set(drawn)) / expected


@register_metric("self_bleu", kind="lexical", needs=2, libraries=("sacrebleu",))
def self_bleu(texts: Sequence[str]) -> float:
    """One minus the mean BLEU-4 of each sample against all the others (Zhu et al. 2018, Texygen).

    BLEU is sacrebleu's for sentences: its 13a tokens (a character is a token where a script has no
    spaces), exponential smoothing, no orders longer than the sentence. Range 0 (all alike) to 1,
    higher is more diverse. An empty sample matches only another empty one. Cost: linear in words;
    n-grams are counted once per sample, and the reference count of an n-gram comes from its two
    highest counts.
    """
    from sacrebleu.metrics.helpers import extract_all_word_ngrams

    counted = [extract_all_word_ngrams(tokens, 1, 4) for tokens in _tokens_13a(texts)]
    lengths = [length for _, length in counted]
    highest = _two_highest(grams for grams, _ in counted)
    scores = []
    for index, (grams, length) in enumerate(counted):
        others = lengths[:index] + lengths[index + 1 :]
        scores.append(_bleu(index, grams, length, others, highest))
    return 1.0 - math.fsum(scores) / len(scores)


def _tokens_13a(texts: Sequence[str]) -> list[str]:
    """The texts with white space between sacrebleu's 13a tokens."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    split: Callable[[str], str] = Tokenizer13a()
    tokenized = [split(spaced(text)) for text in texts]
    for kind in (Tokenizer13a, TokenizerRegexp):
        # They cache the last 65,536 texts, however long.
        kind.__call__.cache_clear()
    return tokenized


def _two_highest(samples: Iterable[Counter[Gram]]) -> dict[Gram, tuple[int, int, int]]:
    """For every n-gram: its highest count in a sample, that sample, and the second highest."""
    highest: dict[Gram, tuple[int, int, int]] = {}
    for index, grams in enumerate(samples):
        for gram, count in grams.items():
            top, holder, second = highest.get(gram, (0, -1, 0))
            if count > top:
                highest[gram] = (count, index, top)
            elif count > second:
                highest[gram] = (top, holder, count)
    return highest


def _bleu(
    index: int,
    grams: Counter[Gram],
    length: int,
    others: Sequence[int],
    highest: dict[Gram, tuple[int, int, int]],
) -> float:
    from sacrebleu.metrics.bleu import BLEU

    if not length:
        return float(0 in others)
    correct, total = [0] * 4, [0] * 4
    for gram, count in grams.items():
        top, holder, second = highest[gram]
        total[len(gram) - 1] += count
        correct[len(gram) - 1] += min(count, second if holder == index else top)
    closest = min(others, key=lambda other: (abs(other - length), other))
    bleu = BLEU.compute_bleu(
        correct, total, length, closest, smooth_method="exp", effective_order=True
    )
    return min(1.0, float(bleu.score) / 100)


@register_metric("self_rouge_l", kind="lexical", needs=2, libraries=("rapidfuzz",))
def self_rouge_l(texts: Sequence[str]) -> float:
    """One minus the mean ROUGE-L F1 of every two samples (Lin 2004).

    F1 = 2 LCS / (words of one + words of the other), LCS being the longest common subsequence of
    their words: the `rouge_score` package's rougeL without stemming, which is symmetric. Range 0
    (all alike) to 1, higher is more diverse. Two samples without a word are alike. Cost: pairs of
    samples × words² / 64, by rapidfuzz's bit-parallel LCS.
    """
    from rapidfuzz.distance import LCSseq

    codes: dict[str, int] = {}
    rows = [[codes.setdefault(word, len(codes)) for word in bare_words(text)] for text in texts]
    alike = [
        2 * LCSseq.similarity(one, other) / (len(one) + len(other)) if one or other else 1.0
        for one, other in combinations(rows, 2)
    ]
    return 1.0 - math.fsum(alike) / len(alike)
