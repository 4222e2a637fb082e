"""Classes of answers to a prompt that mean the same, and the judges of two answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from baco.evaluation.metrics.classifier import Classifier
from baco.evaluation.metrics.loading import Memory, origin
from baco.evaluation.metrics.nli import ENTAILMENT, Nli
from baco.evaluation.metrics.protocols import Answers, Prompts

NOVELTYBENCH = "yimingzhang/deberta-v3-large-generation-similarity"
# NoveltyBench's classifier is published without its tokenizer.
TOKENIZERS = {NOVELTYBENCH: "microsoft/deberta-v3-large"}
THRESHOLD = 0.102  # NoveltyBench's, on the probability that two answers are alike
PIECES = 128  # tokens read of each answer
SHORT = 5  # words up to which answers are compared by the words they share


class Pair(NamedTuple):
    """Two answers to a prompt; the first represents a class."""

    prompt: str
    one: str
    other: str


def partition(
    prompts: Prompts, answers: Answers, same: Callable[[list[Pair]], Sequence[bool]]
) -> list[list[int]]:
    """Greedy classes: an answer joins the first class whose first answer means the same.

    The rule of NoveltyBench (Zhang et al. 2025) and of semantic entropy (Kuhn et al. 2023,
    algorithm 1). Where `same` is not transitive, the classes depend on the order of the answers.
    Equal answers are in one class without a call of `same`. All prompts open one class at a time,
    so that one call of `same` serves them all.

    Returns:
        The class of every answer, [prompts][samples], numbered in order of appearance.
    """
    classes = [[-1] * len(row) for row in answers]
    opened = 0
    while pending := [index for index, row in enumerate(classes) if -1 in row]:
        compared: list[tuple[int, int]] = []
        pairs: list[Pair] = []
        for index in pending:
            row, texts, prompt = classes[index], answers[index], prompts[index].text
            first = row.index(-1)
            for place in range(first, len(row)):
                if row[place] == -1 and texts[place].strip() == texts[first].strip():
                    row[place] = opened
                elif row[place] == -1:
                    compared.append((index, place))
                    pairs.append(Pair(prompt, texts[first], texts[place]))
        for (index, place), alike in zip(compared, same(pairs) if pairs else (), strict=True):
            if alike:
                classes[index][place] = opened
        opened += 1
    return classes


@dataclass(frozen=True, slots=True)
class SimilarityClassifier:
    """NoveltyBench's judge: a classifier of "a user who has seen one gains nothing from the other".

    Each answer is cut to 128 tokens. Two answers are alike if class 1 has a probability above
    0.102; answers of up to five words are alike if half of their words are shared.
    """

    made_by: Mapping[str, str]
    classifier: Classifier = field(repr=False)
    memory: Memory[tuple[str, str], bool] = field(default_factory=Memory, repr=False)

    def partition(self, prompts: Prompts, answers: Answers) -> list[list[int]]:
        """See :class:`Equivalence`."""
        return partition(prompts, answers, self._same)

    def _same(self, pairs: list[Pair]) -> list[bool]:
        return self.memory.get([(pair.one, pair.other) for pair in pairs], self._judge)

    def _judge(self, pairs: list[tuple[str, str]]) -> list[bool]:
        short = [share_words(one, other) for one, other in pairs]
        inputs = [
            self._input(one, other)
            for (one, other), known in zip(pairs, short, strict=True)
            if known is None
        ]
        alike = iter(self.classifier.probabilities(inputs)[:, 1] > THRESHOLD if inputs else ())
        return [bool(next(alike)) if known is None else known for known in short]

    def _input(self, one: str, other: str) -> dict[str, list[int]]:
        tokenizer = self.classifier.tokenizer
        first, second = (
            tokenizer.encode(text, truncation=True, max_length=PIECES, add_special_tokens=False)
            for text in (one, other)
        )
        ids = [tokenizer.cls_token_id, *first, tokenizer.sep_token_id, *second]
        ids.append(tokenizer.sep_token_id)
        start = len(first) + 2  # of the second answer
        return {
            "input_ids": ids,
            "token_type_ids": [0] * start + [1] * (len(ids) - start),
            "attention_mask": [1] * len(ids),
        }


def share_words(one: str, other: str) -> bool | None:
    """Whether two answers of up to five words share half of them; None for longer ones."""
    ones, others = one.strip().lower().split(), other.strip().lower().split()
    longest = max(len(ones), len(others))
    return None if longest > SHORT else len(set(ones) & set(others)) * 2 >= longest


@dataclass(frozen=True, slots=True)
class Entailment:
    """The judge of semantic entropy: each answer, after the prompt, entails the other.

    Entailment is the most likely class in both directions (Kuhn et al. 2023, 4.1).
    """

    nli: Nli

    @property
    def made_by(self) -> Mapping[str, str]:
        """The NLI model's."""
        return self.nli.made_by

    def partition(self, prompts: Prompts, answers: Answers) -> list[list[int]]:
        """See :class:`Equivalence`."""
        return partition(prompts, answers, self._same)

    def _same(self, pairs: list[Pair]) -> list[bool]:
        texts = [(f"{prompt} {one}", f"{prompt} {other}") for prompt, one, other in pairs]
        forward = self.nli.judge(texts).argmax(axis=1) == ENTAILMENT
        reverse = self.nli.judge([(other, one) for one, other in texts]).argmax(axis=1)
        return [bool(both) for both in forward & (reverse == ENTAILMENT)]


@cache
def similarity_classifier(name: str | None = None) -> SimilarityClassifier:
    """The classifier of a hub id or folder; by default NoveltyBench's.

    Raises:
        MetricUnavailable: it cannot be loaded.
    """
    place = name or NOVELTYBENCH
    classifier = Classifier.load("equivalence", place, TOKENIZERS.get(place))
    return SimilarityClassifier(origin(place, classifier.model), classifier)
