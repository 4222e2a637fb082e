"""A half, or a draft model, that runs ahead: what it said of each row, and how sure it was.

It knows what was said and what is likely to stand; it knows nothing of how it was read.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.engine.speculative.cost_model import AcceptanceStats
from baco.engine.verify import Positions
from baco.routing.signals import Distribution


@dataclass(slots=True)
class Run:
    """Tokens that one half, or the draft model, says alone, as many of every row.

    Attributes:
        runner: who.
        records: of the rows.
        looks: is it looked at how sure it is? Else nothing waits for the device.
        tokens: what it said, int64 [B] each.
        sure: of each row, the greatest probability that it saw at each token.
        chances: of each row, that all its tokens stand.
        gain: tokens that the round is expected to give.
    """

    runner: str
    records: list[AcceptanceStats]
    looks: bool
    tokens: list[Tensor] = field(default_factory=list)
    sure: list[list[float]] = field(init=False)
    chances: list[float] = field(init=False)
    gain: float = 0.0
    _logits: list[Tensor] = field(default_factory=list)
    _partitions: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sure = [[] for _ in self.records]
        self.chances = [1.0] * len(self.records)

    def say(self, logits: Tensor, token: Tensor) -> None:
        """Take up a token [B], drawn from logits [B, V]."""
        self._logits.append(logits)
        self.tokens.append(token)
        if not self.looks:
            return
        distribution = Distribution(logits)
        self._partitions.append(distribution.log_partition)
        greatest = distribution.max.tolist()
        self.gain += sum(self.chances)
        for at, (record, sure) in enumerate(zip(self.records, greatest, strict=True)):
            self.sure[at].append(sure)
            self.chances[at] *= record.chance(self.runner, sure)

    @property
    def counts(self) -> list[int]:
        """Tokens of each row."""
        return [len(self.tokens)] * len(self.records)

    def positions(self, more: int = 0) -> Positions:
        """A position for each token, and so many after them."""
        counts = [count + more for count in self.counts]
        return Positions.of(counts, torch.stack(self.tokens, dim=1))

    @property
    def logits(self) -> Tensor:
        """What each token was drawn from, rows in turn: float32 [N, V]."""
        return torch.stack(self._logits, dim=1).flatten(0, 1)

    @property
    def partition(self) -> Tensor | None:
        """log Σ exp of each [N], as far as it was looked at."""
        return torch.stack(self._partitions, dim=1).flatten() if self.looks else None
