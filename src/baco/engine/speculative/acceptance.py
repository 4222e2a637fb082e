"""How often a sequence's draft tokens were accepted lately."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

# Weight of the newest observation in the moving averages.
_EMA_WEIGHT = 0.1
# Acceptance rises with the drafter's confidence, so it is tracked per confidence bucket. These are
# the edges between the buckets, and the rates assumed before anything was observed.
_CONFIDENCE_EDGES = (0.5, 0.9, 0.99)
_INITIAL_RATES = (0.5, 0.65, 0.7, 0.97)


@dataclass(slots=True)
class AcceptanceStats:
    """Acceptance rates of one sequence, as moving averages.

    Attributes:
        ngram: of tokens drafted from n-grams.
        bonus: of the bonus token: how often the drafter then draws the token that the other model
            predicted after the last draft token.
        by_drafter: of tokens drafted by a model: ``base``, ``aligned`` or ``draft``.
        by_confidence: the same, per confidence bucket.
    """

    ngram: float = 0.5
    bonus: float = 0.75
    by_drafter: dict[str, float] = field(
        default_factory=lambda: {"base": 0.8, "aligned": 0.85, "draft": 0.6}
    )
    by_confidence: dict[str, list[float]] = field(default_factory=dict)

    def update_ngram(self, accepted: int, drafted: int) -> None:
        """``accepted`` of the draft tokens were accepted, and the next one was not."""
        self.ngram = _ema(self.ngram, accepted, drafted)

    def update_self_draft(
        self, drafter: str, accepted: int, drafted: int, confidence: Sequence[float]
    ) -> None:
        """The same for a model's draft; ``confidence`` is its highest probability at each token,
        as far as that was computed.
        """
        self.by_drafter[drafter] = _ema(self.by_drafter[drafter], accepted, drafted)
        rates = self._buckets(drafter)
        for index in range(min(accepted + 1, len(confidence))):
            bucket = bisect(_CONFIDENCE_EDGES, confidence[index])
            rates[bucket] = _ema(rates[bucket], index < accepted, 1)

    def update_bonus(self, accepted: bool) -> None:
        """The drafter drew the predicted bonus token, or another one."""
        self.bonus = _ema(self.bonus, accepted, 1)

    def probability(self, drafter: str, confidence: float) -> float:
        """Estimated acceptance probability of a token drafted at this confidence."""
        return self._buckets(drafter)[bisect(_CONFIDENCE_EDGES, confidence)]

    def _buckets(self, drafter: str) -> list[float]:
        return self.by_confidence.setdefault(drafter, list(_INITIAL_RATES))


def _ema(rate: float, accepted: int, drafted: int) -> float:
    for index in range(min(accepted + 1, drafted)):
        rate += _EMA_WEIGHT * ((index < accepted) - rate)
    return min(max(rate, 0.02), 0.98)
