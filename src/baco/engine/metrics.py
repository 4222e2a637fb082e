"""Running totals of an engine: forwards, draft tokens, tokens by source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from baco.engine.sequence import SequenceState
from baco.kv_cache.protocol import KVCache


@dataclass(slots=True)
class Stats:
    """Running totals of an engine.

    Attributes:
        caches: the models' KV caches, which count their own forwards.
        steps: that decoded anything.
        tokens: generated, by source.
        drafted, accepted: draft tokens, and those of them that were accepted.
    """

    caches: Mapping[str, KVCache]
    steps: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"base": 0, "aligned": 0})
    drafted: int = 0
    accepted: int = 0

    def resume(self, past: "Stats") -> None:
        """Start from another engine's totals; forwards are counted by the caches."""
        self.steps, self.tokens = past.steps, dict(past.tokens)
        self.drafted, self.accepted = past.drafted, past.accepted

    @property
    def forwards(self) -> dict[str, int]:
        """Forwards of each model, prompts included."""
        return {name: cache.forwards for name, cache in self.caches.items()}

    def update(
        self,
        rows: Sequence[SequenceState],
        lengths: Sequence[int],
        drafted: Sequence[int],
        accepted: Sequence[int],
    ) -> None:
        """Count one step; the rows had ``lengths`` tokens before it."""
        self.steps += 1
        self.drafted += sum(drafted)
        self.accepted += sum(accepted)
        for row, length in zip(rows, lengths, strict=True):
            new = row.sources[length:]
            base = new.count("base")
            self.tokens["base"] += base
            self.tokens["aligned"] += len(new) - base
