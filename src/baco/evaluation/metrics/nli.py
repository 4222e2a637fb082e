"""Natural language inference: whether a text entails another, contradicts it, or neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.metrics.classifier import Classifier
from baco.evaluation.metrics.loading import Memory, origin
from baco.evaluation.metrics.protocols import MetricUnavailable

MODEL = "microsoft/deberta-large-mnli"  # Kuhn et al. 2023
LABELS = ("contradiction", "neutral", "entailment")
CONTRADICTION, NEUTRAL, ENTAILMENT = range(3)

Probabilities = NDArray[np.float64]  # [3], in the order of LABELS


@dataclass(frozen=True, slots=True)
class Nli:
    """A classifier of (premise, hypothesis).

    Attributes:
        order: the index of the classifier's class for each of ``LABELS``.
    """

    made_by: Mapping[str, str]
    classifier: Classifier = field(repr=False)
    order: tuple[int, ...]
    memory: Memory[tuple[str, str], Probabilities] = field(default_factory=Memory, repr=False)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        """Probabilities of ``LABELS`` for (premise, hypothesis), [N, 3].

        A text entails itself; the classifier does not run on such pairs.
        """
        return np.array(self.memory.get(pairs, self._judge)).reshape(-1, len(LABELS))

    def _judge(self, pairs: list[tuple[str, str]]) -> list[Probabilities]:
        certain = np.eye(len(LABELS))[ENTAILMENT]
        differing = [pair for pair in pairs if pair[0] != pair[1]]
        inputs = self.classifier.pairs(*zip(*differing, strict=True)) if differing else []
        judged = iter(self.classifier.probabilities(inputs)[:, self.order] if differing else ())
        return [certain if one == other else next(judged) for one, other in pairs]


@cache
def nli(name: str | None = None) -> Nli:
    """The NLI model of a hub id or folder; by default DeBERTa-large fine-tuned on MultiNLI.

    Raises:
        MetricUnavailable: it cannot be loaded, or its classes are not the three of NLI.
    """
    place = name or MODEL
    classifier = Classifier.load("nli", place)
    id2label = classifier.model.config.id2label
    ids = {str(label).lower(): int(key) for key, label in id2label.items()}
    order = [ids.get(label, -1) for label in LABELS]
    if sorted(order) != list(range(len(LABELS))):
        raise MetricUnavailable(
            f"the nli model {place!r} has the classes {', '.join(ids)}: "
            f"name one that has {', '.join(LABELS)}"
        )
    return Nli(origin(place, classifier.model), classifier, tuple(order))
