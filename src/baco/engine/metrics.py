"""What decoding took: forwards of each half, drafts made and kept, tokens by source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baco.engine.sequence import SequenceState
from baco.kv_cache.protocol import KVCache


@dataclass(slots=True)
class Stats:
    """Running totals of an engine.

    Attributes:
        stores: the halves' caches, which count their own forwards.
        rounds: steps that decoded anything.
        tokens: said, by source.
        drafted, accepted: tokens that were drafted, and how many of them stood.
    """

    stores: Mapping[str, KVCache]
    rounds: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"base": 0, "aligned": 0})
    drafted: int = 0
    accepted: int = 0

    def carry_on(self, past: "Stats") -> None:
        """Count on from another engine's totals; forwards are counted by their stores."""
        self.rounds, self.tokens = past.rounds, dict(past.tokens)
        self.drafted, self.accepted = past.drafted, past.accepted

    @property
    def forwards(self) -> dict[str, int]:
        """How often each half ran, prompts included."""
        return {name: store.forwards for name, store in self.stores.items()}

    def count(
        self,
        rows: Sequence[SequenceState],
        before: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        """Take up one round: ``rows`` had ``before`` tokens each."""
        self.rounds += 1
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        for row, had in zip(rows, before, strict=True):
            base = row.sources[had:].count("base")
            self.tokens["base"] += base
            self.tokens["aligned"] += len(row.sources) - had - base
