"""Draft tokens that one model writes ahead: a model of the pair (self-drafting) or a draft model.

It knows logits, tokens and acceptance rates. It does not know how logits are computed.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.engine.draft import ModelOutput
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.routing.signals import Distribution
from baco.source import Drafter

# Draft tokens of a row that there is room for at first.
_FIRST_TOKENS = 4


@dataclass(slots=True)
class SelfDraft:
    """The same number of draft tokens for every row, written by one model alone.

    Attributes:
        drafter: the model.
        stats: acceptance rates of the rows.
        sync_each_step: compute confidences, which waits for the device at every token. Without it,
            ``confidence``, ``acceptance`` and ``expected_tokens`` stay as they begin.
        tokens: int64 [B] each.
        confidence: of each row, the drafter's highest probability at each token.
        acceptance: of each row, the probability that all its tokens are accepted.
        expected_tokens: tokens that the step is expected to commit.
    """

    drafter: Drafter
    stats: list[AcceptanceStats]
    sync_each_step: bool
    tokens: list[Tensor] = field(default_factory=list)
    confidence: list[list[float]] = field(init=False)
    acceptance: list[float] = field(init=False)
    expected_tokens: float = 0.0
    _distributions: list[Distribution] = field(default_factory=list)
    _logits: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, K or more, V]
    _hidden_states: list[Tensor] = field(default_factory=list)  # [B, D] each; or none

    def __post_init__(self) -> None:
        self.confidence = [[] for _ in self.stats]
        self.acceptance = [1.0] * len(self.stats)

    def append(self, output: ModelOutput, index: int, token: Tensor) -> None:
        """Append a token [B] that was drawn from the logits at one index of an output. Logits are
        copied: the memory that they are in may be that of the model's next logits too.
        """
        if output.hidden_states is not None:
            self._hidden_states.append(output.hidden_states[:, index])
        distribution = Distribution(self._kept(output.logits[:, index]))
        self._distributions.append(distribution)
        self.tokens.append(token)
        if not self.sync_each_step:
            return
        self.expected_tokens += sum(self.acceptance)
        pairs = zip(self.stats, distribution.max.tolist(), strict=True)
        for row, (stats, confidence) in enumerate(pairs):
            self.confidence[row].append(confidence)
            self.acceptance[row] *= stats.probability(self.drafter, confidence)

    def _kept(self, logits: Tensor) -> Tensor:
        """A copy of logits [B, V] in the table of all."""
        at, room = len(self.tokens), self._logits.shape[1] if self._logits.dim() == 3 else 0
        if at == room:
            rows, width = logits.shape
            longer = logits.new_empty(rows, 2 * room or _FIRST_TOKENS, width)
            if room:
                longer[:, :room] = self._logits
            self._logits = longer
        self._logits[:, at] = logits
        return self._logits[:, at]

    @property
    def counts(self) -> list[int]:
        """Draft tokens of each row."""
        return [len(self.tokens)] * len(self.stats)

    @property
    def logits(self) -> Distribution:
        """What the tokens were drawn from, before masks and biases: N = B × K, row by row."""
        logits = self._logits[:, : len(self.tokens)].flatten(0, 1)
        partitions = read = None
        if self.sync_each_step:
            each = [distribution.log_partition for distribution in self._distributions]
            partitions = torch.stack(each, dim=1).flatten()
        if self._hidden_states:
            read = torch.stack(self._hidden_states, dim=1).flatten(0, 1)
        return Distribution(logits, partitions, hidden_states=read)
