"""How likely one model of the pair finds a text, token by token, read piece by piece."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from baco.kv_cache.protocol import KVCache
from baco.models.model import PairModel
from baco.source import Source

# Logits of a piece that are held at once, in entries; but never fewer tokens than this.
_MOST_ENTRIES, _LEAST = 2**22, 16
# Bytes for each of these entries: logits as they come, in float32, and log-probabilities.
ENTRY_BYTES = 20


@dataclass(slots=True, eq=False)
class Scoring:
    """A text to be scored, and what came of it so far.

    Attributes:
        ids: the text's T tokens.
        half: the model that scores it.
        first: the first token that is scored, below T.
        top: how many most likely tokens are wanted at each place.
        logprobs: of the tokens from ``first`` on, in nats; None where nothing stands before one.
        tops: the most likely tokens (id → nats) at their places.
        done: have all been scored, or did it fail?
        error: what it failed with.
    """

    ids: Sequence[int]
    half: Source
    first: int
    top: int
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[dict[int, float] | None] = field(default_factory=list)
    done: bool = False
    error: str | None = None

    def roll_back(self) -> None:
        """It is to be read again from its start."""
        self.logprobs.clear()
        self.tops.clear()


def piece_of(half: PairModel) -> int:
    """Tokens of a text that a model reads at once where it scores them."""
    return min(half.prefill_chunk, max(_LEAST, _MOST_ENTRIES // half.rows_of_logits))


def score(half: PairModel, store: KVCache, scoring: Scoring) -> Generator[int, None, None]:
    """Read a text with a model, beside the rows of its cache, and score its tokens: yields how many
    tokens each piece had.
    """
    if scoring.first == 0:
        scoring.logprobs.append(None)
        scoring.tops.append(None)
    read, ids = 0, scoring.ids
    # Nothing comes after the last token.
    for logits in store.score(ids[:-1], piece_of(half)):
        start, read = read, read + len(logits)
        skipped = max(scoring.first - 1 - start, 0)
        if skipped < len(logits):
            rows = half.fit_checked(logits[skipped:]).log_softmax(dim=-1)
            _take(scoring, rows, start + skipped + 1)
        yield len(logits)
    scoring.done = True


def _take(scoring: Scoring, rows: torch.Tensor, start: int) -> None:
    """Note log-probabilities [P, V] of the tokens from ``start`` on."""
    own = torch.tensor([list(scoring.ids[start : start + len(rows)])], device=rows.device)
    scoring.logprobs.extend(rows.gather(1, own.T)[:, 0].tolist())
    best = rows.topk(min(scoring.top, rows.shape[-1]), dim=-1)
    each = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    scoring.tops.extend(dict(zip(*row, strict=True)) for row in each)
