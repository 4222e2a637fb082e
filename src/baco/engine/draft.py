"""The data of one step: a draft, and what the models compute at its positions."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.engine.batch import Batch
from baco.routing.signals import Allowed, Distribution, Past, Siblings
from baco.source import Drafter, Source


class ModelOutput(NamedTuple):
    """What a forward of one model returned for the last K tokens of every row.

    Attributes:
        logits: raw, on the common vocabulary, float32 [B, K, V].
        hidden_states: float32 [B, K, D]; None where no router reads them.
    """

    logits: Tensor
    hidden_states: Tensor | None = None


@dataclass(slots=True)
class Positions:
    """The N positions that a step decides: each row's next token, and those after its draft tokens.

    Attributes:
        counts: how many each row has, at least 1. Q is the largest.
        row: the row of each position, int64 [N]. The positions of a row follow each other.
        offset: its distance from the row's next token, int64 [N].
        draft_tokens: int64 [B, Q - 1 or more]. Entries beyond a row's positions are not read.
    """

    counts: list[int]
    row: Tensor
    offset: Tensor
    draft_tokens: Tensor

    @classmethod
    def of(cls, counts: list[int], draft_tokens: Tensor) -> "Positions":
        """The positions of rows that have this many each."""
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        offsets = [offset for count in counts for offset in range(count)]
        device = draft_tokens.device
        return cls(counts, tensor_on(device, rows), tensor_on(device, offsets), draft_tokens)

    @property
    def most(self) -> int:
        """Q, the most positions of any row."""
        return max(self.counts)

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same number of positions."""
        return len(self.row) == len(self.counts) * self.most

    def drafted_before(self) -> list[list[int]]:
        """The draft tokens before each position."""
        tokens = self.draft_tokens.tolist()
        return [tokens[row][:end] for row, count in enumerate(self.counts) for end in range(count)]

    def flatten(self, logits: Tensor) -> Tensor:
        """From values after each row's last K tokens, [B, K, V], to those at the positions."""
        keep = logits.shape[1]
        if self.uniform and keep == self.most:
            return logits.reshape(-1, logits.shape[-1])
        count = tensor_on(logits.device, self.counts)[self.row]
        return logits[self.row, keep - count + self.offset]

    def pad(self, values: Tensor) -> Tensor:
        """From values at the positions, [N, ...], to [B, Q, ...] with zeros after a row's own."""
        if self.uniform:
            return values.reshape(len(self.counts), self.most, *values.shape[1:])
        padded = values.new_zeros(len(self.counts), self.most, *values.shape[1:])
        padded[self.row, self.offset] = values
        return padded


@dataclass
class Draft:
    """The positions that a step decides, and what the drafter computed on the way.

    Attributes:
        batch: the rows.
        positions: their next positions and draft tokens.
        counts: draft tokens of each row.
        drafter: the model that wrote the draft tokens; None for n-gram drafts.
        logits: the drafter's own, at the positions, where it is a model of the pair.
        confidence: the drafter's highest probability at each draft token of each row, where that
            was computed.
        wants_bonus: whether the other model also reads the last draft token, to predict the token
            after it.
    """

    batch: Batch
    positions: Positions
    counts: list[int]
    drafter: Drafter | None = None
    logits: Distribution | None = None
    confidence: list[list[float]] = field(default_factory=list)
    wants_bonus: bool = False

    @cached_property
    def noise_keys(self) -> Tensor:
        """The noise keys of the positions, int64 [N, 2]."""
        keys, positions = self.batch.noise_keys(), self.positions
        if positions.uniform:
            return keys[:, : positions.most].flatten(0, 1)
        return keys[positions.row, positions.offset]

    @cached_property
    def previous(self) -> Tensor:
        """The token before each position, int64 [N]; ``NO_TOKEN`` before an answer's first."""
        positions = self.positions
        drafted = positions.draft_tokens[:, : positions.most - 1]
        before = torch.cat((self.batch.last_tokens()[:, None], drafted), dim=1)
        return before[positions.row, positions.offset]

    @cached_property
    def allowed(self) -> Allowed | None:
        """What the structures of the answers allow at the positions."""
        if not self.batch.structured:
            return None
        counts, tokens = self.positions.counts, self.positions.draft_tokens.tolist()
        return self.batch.allowed(
            [own[: count - 1] for own, count in zip(tokens, counts, strict=True)]
        )

    def past(self) -> Past:
        """The answer before each position; ``num_base`` is right at each row's first alone."""
        positions, rows = self.positions, self.batch.rows
        row, offset = positions.row.tolist(), positions.offset.tolist()
        drafted = positions.draft_tokens.tolist() if positions.most > 1 else None
        device = positions.row.device
        lengths = [len(sequence.tokens) - sequence.num_thinking for sequence in rows]
        bases = [sequence.sources.count("base") for sequence in rows]

        def tail(position: int, count: int) -> list[int]:
            sequence, after = rows[row[position]], offset[position]
            tokens: list[int] = sequence.tokens[
                max(sequence.num_thinking, len(sequence.tokens) - count) :
            ]
            if drafted is not None:
                tokens += drafted[row[position]][:after]
            return tokens[-count:]

        return Past(
            tensor_on(device, lengths, torch.int64)[positions.row] + positions.offset,
            tensor_on(device, bases, torch.int64)[positions.row],
            tail,
            self._siblings() if self.batch.sibling_aware else None,
        )

    def _siblings(self) -> Siblings:
        columns = [row.sibling_counts for row in self.batch.rows]
        table = tensor_on(self.positions.row.device, columns, torch.int64)[self.positions.row]
        return Siblings(*table.unbind(dim=1))

    @cached_property
    def active(self) -> Tensor:
        """The source of each row's last token, bool [B], True for the base model."""
        return self.batch.last_sources()


@dataclass(frozen=True, slots=True)
class Logits:
    """What the models computed at a draft's positions.

    Attributes:
        of: the distributions of the models that ran. One is enough where the other cannot matter.
        bonus: raw logits after the last draft token of each row, float32 [B, V], of the model that
            did not draft; None where they were not computed.
    """

    of: dict[Source, Distribution]
    bonus: Tensor | None = None
