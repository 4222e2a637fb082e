"""Semantic diversity, quality and utility: cases by hand, the laws, and the registry.

"Duplicating a sample never raises diversity": for distinct_k and utility_k a copy, drawn last, of
any sample. The others say how evenly the samples spread, so a copy of an outlier may raise them
(three alike and one apart, then two apart: the crowd is more even). For them the law is that a copy
of the most typical sample does not, and that a copy of every sample at once does not.

"Order never matters" holds for all but utility_k, whose reader goes through the samples in order,
and for distinct_k and semantic_entropy where the judge of equivalence is an equivalence relation;
NoveltyBench's classifier need not be one, and its classes are by definition those of the samples in
the order of their drawing.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from baco import BacoError
from baco.demo.world import Question, aligned_examples
from baco.evaluation.metrics import (
    Equivalence,
    Metric,
    MetricUnavailable,
    Reward,
    entry,
    metric,
    names,
    semantic,
)
from baco.evaluation.metrics.demo import DemoJudge
from baco.evaluation.metrics.embedding import Embedder
from baco.evaluation.metrics.semantic import embedding_distance, vendi
from baco.evaluation.records import Prompt
from tests.scorers import save_nli

PROMPT = Prompt("p", ({"role": "user", "content": "Where to?"},))
POOL = (
    "Go to Lisbon in May.",
    "You should visit Lisbon in May.",
    "Naxos, for the food.",
    "Bake a cake.",
    "Hi",
    "",
)
SAMPLES = st.lists(st.sampled_from(POOL), min_size=2, max_size=7)


class FirstWord:
    """A judge by which answers with equal first words are equivalent, and reward is length."""

    made_by: Mapping[str, str] = {"judge": "first word"}

    def partition(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        classes = []
        for row in answers:
            firsts = [text.split()[0] if text else "" for text in row]
            known = list(dict.fromkeys(firsts))
            classes.append([known.index(first) for first in firsts])
        return classes

    def rewards(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        return [[float(len(text)) for text in row] for row in answers]

    def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
        return [[min(10.0, 1.0 + reward) for reward in row] for row in rewards]


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Metric]:
    """The metrics of how evenly samples spread."""
    inference = save_nli(tmp_path_factory.mktemp("nli"))
    return {
        "embedding_distance": metric("embedding_distance"),
        "vendi": metric("vendi"),
        "nli_diversity": metric("nli_diversity", nli=inference),
        "semantic_entropy": metric("semantic_entropy", equivalence=FirstWord()),
    }


LEAST = {"embedding_distance": 0.0, "vendi": 1.0, "nli_diversity": -1.0, "semantic_entropy": 0.0}


def figure(measure: Metric, texts: Sequence[str]) -> float:
    (score,) = measure.score([PROMPT], [texts])
    assert score is not None
    return score


# --- by hand ---


def test_distinct_k_counts_classes() -> None:
    measure = metric("distinct_k", equivalence=FirstWord())
    assert measure.score([PROMPT] * 2, [["a b", "a c", "d"], ["x", "x"]]) == [2.0, 1.0]


def test_semantic_entropy_is_that_of_the_classes_shares() -> None:
    measure = metric("semantic_entropy", equivalence=FirstWord())
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figure(measure, ["a b", "a c", "d", "a"]) == pytest.approx(expected)
    assert figure(measure, ["a", "b", "c"]) == pytest.approx(math.log(3))


class Compass:
    """An embedder of four words: points of the compass, as unit vectors."""

    WORDS = ("east", "north", "west", "south")

    def embed(self, texts: Sequence[str]) -> NDArray[np.float64]:
        east, north = np.eye(2)
        return np.array([(east, north, -east, -north)[self.WORDS.index(text)] for text in texts])


COMPASS = cast(Embedder, Compass())


def test_vendi_equals_scores_computed_by_hand() -> None:
    rows = [["east"] * 3, ["east", "north"], ["east", "east", "north"], ["east", "west"]]
    third = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert vendi(COMPASS, rows) == pytest.approx([1.0, 2.0, math.exp(third), 1.0])


def test_embedding_distance_equals_scores_computed_by_hand() -> None:
    rows = [["east"] * 3, ["east", "west"], ["east", "north", "west"]]
    assert embedding_distance(COMPASS, rows) == pytest.approx([0.0, 2.0, (1 + 2 + 1) / 3])


def test_every_prompt_is_scored_by_its_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds whatever prompts are embedded together, with any numbers of samples."""
    monkeypatch.setattr(semantic, "PROMPTS_AT_ONCE", 2)
    rows = [
        ["east", "north"],
        ["east"] * 3,
        ["west", "north", "east"],
        ["west", "east"],
        ["south"] * 2,
    ]
    for figure_of in (vendi, embedding_distance):
        alone = [figure_of(COMPASS, [row])[0] for row in rows]
        assert figure_of(COMPASS, rows) == alone


def test_reward_is_the_mean_over_samples() -> None:
    assert figure(metric("reward", reward=FirstWord()), ["abc", "a", ""]) == pytest.approx(4 / 3)


def test_utility_equals_scores_computed_by_hand() -> None:
    # Ratings 4, 2, 3; the third is of the first's class and adds nothing to what was seen.
    measure = metric("utility_k", equivalence=FirstWord(), reward=FirstWord())
    expected = (4 + 0.8 * 2 + 0) / (1 + 0.8 + 0.64)
    assert figure(measure, ["a b", "c", "a "]) == pytest.approx(expected)
    assert figure(measure, ["a long enough answer"]) == 10.0


def test_utility_is_ten_at_most_and_falls_with_repetition() -> None:
    measure = metric("utility_k", equivalence=FirstWord(), reward=FirstWord())
    best = [f"{letter} and so on, and so on" for letter in "abcd"]
    assert figure(measure, best) == pytest.approx(10.0)
    assert figure(measure, best[:1] * 4) == pytest.approx(10 * (1 - 0.8) / (1 - 0.8**4))


def test_effective_diversity_counts_acceptable_answers_alone() -> None:
    # Ratings 1 + the length, 10 at most: the first three are below the bar of 5.5.
    rows = ["a", "b", "c d", "e five", "e again", "f long", "f enough"]
    classes = metric("effective_distinct_k", equivalence=FirstWord(), reward=FirstWord())
    assert figure(classes, rows) == 2.0
    assert figure(classes, rows[:3]) == 0.0
    distance = metric("effective_distance", reward=FirstWord())
    plain = metric("embedding_distance")
    good = rows[3:]
    assert figure(distance, good) == pytest.approx(figure(plain, good))
    # 6 of the 21 pairs are of acceptable answers; the others count as 0.
    assert figure(distance, rows) == pytest.approx(figure(plain, good) * 6 / 21)
    assert figure(distance, rows[:4]) == 0.0


@given(texts=SAMPLES)
def test_effective_diversity_is_at_most_diversity(texts: list[str]) -> None:
    judges = {"equivalence": FirstWord(), "reward": FirstWord()}
    effective = figure(metric("effective_distinct_k", **judges), texts)
    assert effective <= figure(metric("distinct_k", **judges), texts)


def test_effective_diversity_needs_a_known_scale_of_quality() -> None:
    class Unscaled(FirstWord):
        def ratings(self, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
            raise MetricUnavailable("its scale is unknown")

    for name in ("effective_distinct_k", "effective_distance"):
        with pytest.raises(MetricUnavailable, match=f"{name} is unavailable: its scale is unknown"):
            metric(name, equivalence=FirstWord(), reward=Unscaled())


# --- laws ---


@given(text=st.sampled_from(POOL), count=st.integers(2, 6))
def test_identical_samples_give_the_minimum(
    spread: dict[str, Metric], text: str, count: int
) -> None:
    for name, measure in spread.items():
        assert figure(measure, [text] * count) == pytest.approx(LEAST[name], abs=1e-9)
    assert figure(metric("distinct_k", equivalence=FirstWord()), [text] * count) == 1.0


@given(texts=SAMPLES)
def test_identical_samples_have_the_lowest_diversity(
    spread: dict[str, Metric], texts: list[str]
) -> None:
    for name, measure in spread.items():
        assert figure(measure, texts) >= LEAST[name] - 1e-9


@given(texts=SAMPLES, seed=st.integers(0, 99))
def test_order_never_matters(spread: dict[str, Metric], texts: list[str], seed: int) -> None:
    mixed = random.Random(seed).sample(texts, len(texts))
    for measure in (*spread.values(), metric("distinct_k", equivalence=FirstWord())):
        assert figure(measure, mixed) == pytest.approx(figure(measure, texts), abs=1e-9)


@given(texts=SAMPLES, place=st.integers(0, 6))
def test_a_copy_of_any_sample_adds_no_class_and_no_utility(texts: list[str], place: int) -> None:
    copied = [*texts, texts[place % len(texts)]]
    classes = metric("distinct_k", equivalence=FirstWord())
    assert figure(classes, copied) == figure(classes, texts)
    utility = metric("utility_k", equivalence=FirstWord(), reward=FirstWord())
    assert figure(utility, copied) <= figure(utility, texts) + 1e-12


@given(texts=SAMPLES)
def test_a_copy_of_the_most_typical_sample_never_raises_diversity(
    spread: dict[str, Metric], texts: list[str]
) -> None:
    for measure in spread.values():
        copies = [figure(measure, [*texts, text]) for text in texts]
        assert min(copies) <= figure(measure, texts) + 1e-9


@given(texts=SAMPLES)
def test_a_copy_of_every_sample_never_raises_diversity(
    spread: dict[str, Metric], texts: list[str]
) -> None:
    for measure in spread.values():
        assert figure(measure, [*texts, *texts]) <= figure(measure, texts) + 1e-9


def test_a_copy_of_an_outlier_evens_out_the_crowd(spread: dict[str, Metric]) -> None:
    crowd = [POOL[0]] * 3 + [POOL[3]]
    for name in ("embedding_distance", "vendi", "semantic_entropy"):
        assert figure(spread[name], [*crowd, POOL[3]]) > figure(spread[name], crowd)


@pytest.mark.parametrize("texts", [["", ""], ["", "Hi"], ["Hi", "Hi"]])
def test_empty_and_one_word_samples_have_a_figure(
    spread: dict[str, Metric], texts: list[str]
) -> None:
    for measure in spread.values():
        assert math.isfinite(figure(measure, texts))


# --- the demo world's judge ---


def _prompt_of(question: Question) -> Prompt:
    return Prompt(
        question.text,
        ({"role": "user", "content": question.text},),
        reference={"family": question.family, "slots": dict(question.slots)},
    )


def test_the_demo_judge_is_a_reward_and_an_equivalence() -> None:
    judge = DemoJudge()
    assert isinstance(judge, Equivalence)
    assert isinstance(judge, Reward)
    for question, answer in aligned_examples(20, seed=5):
        prompt, row = _prompt_of(question), [answer, "gibberish", answer + " ", "more gibberish"]
        assert judge.partition([prompt], [row]) == [[0, 1, 0, 1]]
        (rewards,) = judge.rewards([prompt], [row])
        assert rewards == [1.0, 0.0, 1.0, 0.0]
        assert judge.ratings([rewards]) == [[10.0, 1.0, 10.0, 1.0]]
        models = {"equivalence": "demo", "reward": "demo"}
        for name, expected in (
            ("distinct_k", 2.0),
            ("semantic_entropy", math.log(2)),
            ("reward", 0.5),
            ("utility_k", (10 + 0.8 * 1) / (1 + 0.8 + 0.64 + 0.512)),
        ):
            assert metric(name, **models).score([prompt], [row]) == [pytest.approx(expected)]


def test_the_demo_judge_refuses_prompts_of_other_tasks() -> None:
    with pytest.raises(BacoError, match="'p' is not a question of the demo world"):
        metric("reward", reward="demo").score([PROMPT], [["Hi"]])


# --- the registry ---


def test_there_are_eleven_of_diversity_two_of_quality_and_utility() -> None:
    assert names("lexical") == (
        "distinct_1",
        "distinct_2",
        "distinct_3",
        "ead",
        "self_bleu",
        "self_rouge_l",
    )
    assert names("semantic") == (
        "embedding_distance",
        "vendi",
        "nli_diversity",
        "semantic_entropy",
        "distinct_k",
    )
    assert names("quality") == ("reward", "perplexity")
    assert names("utility") == ("effective_distinct_k", "effective_distance", "utility_k")
    assert names() == (
        *names("lexical"),
        *names("semantic"),
        *names("quality"),
        *names("utility"),
    )
    assert len(names("lexical", "semantic")) == 11


def test_an_unknown_metric_or_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BacoError, match="unknown metric 'self_blue': use self_bleu"):
        metric("self_blue")
    with pytest.raises(BacoError, match="unknown model role 'embeddings': use embedding"):
        metric("distinct_1", embeddings="x")


@pytest.mark.parametrize("name", [name for name in names() if entry(name).needs == 2])
def test_metrics_that_compare_samples_need_two(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder: Path = tmp_path_factory.getbasetemp() / "nli-of-two"
    models = {"nli": save_nli(folder), "equivalence": FirstWord(), "reward": FirstWord()}
    with pytest.raises(BacoError, match=f"prompt 'p' has 1 of the 2 samples that {name} compares"):
        metric(name, **models).score([PROMPT], [["alone"]])


def test_a_metric_that_cannot_run_is_a_fault_of_one_line() -> None:
    assert issubclass(MetricUnavailable, BacoError)


def test_every_metric_records_its_models() -> None:
    for name in (*names("lexical"), "vendi"):
        assert metric(name).made_by
    made_by = metric("utility_k", equivalence="demo", reward="demo").made_by
    assert made_by["equivalence judge"] == made_by["reward judge"] == "demo world"
