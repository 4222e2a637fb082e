"""Natural language inference: does one text entail another, contradict it, or neither?"""

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
        order: which of the classifier's classes is which of ``LABELS``.
    """

    made_by: Mapping[str, str]
    classifier: Classifier = field(repr=False)
    order: tuple[int, ...]
    memory: Memory[tuple[str, str], Probabilities] = field(default_factory=Memory, repr=False)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        """Probabilities of ``LABELS`` for (premise, hypothesis), [N, 3].

        A text entails itself: that is not asked.
        """
        return np.array(self.memory.ask(pairs, self._judge)).reshape(-1, len(LABELS))

    def _judge(self, pairs: list[tuple[str, str]]) -> list[Probabilities]:
        certain = np.eye(len(LABELS))[ENTAILMENT]
        asked = [pair for pair in pairs if pair[0] != pair[1]]
        inputs = self.classifier.pairs(*zip(*asked, strict=True)) if asked else []
        found = iter(self.classifier.probabilities(inputs)[:, self.order] if asked else ())
        return [certain if one == other else next(found) for one, other in pairs]


@cache
def nli(name: str | None = None) -> Nli:
    """The NLI model of a hub id or folder; by default DeBERTa-large fine-tuned on MultiNLI.

    Raises:
        MetricUnavailable: it cannot be loaded, or its classes are not the three of NLI.
    """
    place = name or MODEL
    classifier = Classifier.load("nli", place)
    told = {int(key): str(label).lower() for key, label in classifier.model.config.id2label.items()}
    order = [next((key for key, text in told.items() if text == label), -1) for label in LABELS]
    if sorted(order) != list(range(len(LABELS))):
        raise MetricUnavailable(
            f"the nli model {place!r} tells {', '.join(told.values())}: name one that tells "
            f"{', '.join(LABELS)}"
        )
    return Nli(origin(place, classifier.model), classifier, tuple(order))
