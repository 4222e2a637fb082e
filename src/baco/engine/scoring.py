"""Scores texts: how likely one model of the pair finds each token, read chunk by chunk."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch

from baco.kv_cache.protocol import KVCache
from baco.models.model import PairModel
from baco.source import Source

# Entries of logits that are held at once; but a chunk never has fewer tokens than this.
_MAX_ENTRIES, _MIN_CHUNK = 2**22, 16
# Bytes for each of these entries: raw logits, logits in float32, and log-probabilities.
ENTRY_BYTES = 20


@dataclass(slots=True, eq=False)
class Scoring:
    """A text to be scored, and its scores so far.

    Attributes:
        ids: the text's T tokens.
        model: the model that scores it.
        first: the first token that is scored, below T.
        top: how many most likely tokens are wanted at each position.
        logprobs: of the tokens from ``first`` on, in nats; None for the text's first token.
        tops: the most likely tokens (id → nats) at their positions.
        done: whether it is finished or failed.
        error: why it failed.
    """

    ids: Sequence[int]
    model: Source
    first: int
    top: int
    logprobs: list[float | None] = field(default_factory=list)
    tops: list[dict[int, float] | None] = field(default_factory=list)
    done: bool = False
    error: str | None = None

    def restart(self) -> None:
        """Forget the scores: the text will be read from its start."""
        self.logprobs.clear()
        self.tops.clear()


def scoring_chunk(model: PairModel) -> int:
    """Tokens of a text that a model reads at once while scoring."""
    return min(model.prefill_chunk, max(_MIN_CHUNK, _MAX_ENTRIES // model.logits_width))


def score(model: PairModel, cache: KVCache, scoring: Scoring) -> Generator[int, None, None]:
    """Score a text beside the rows of a cache. Yields the number of tokens of each chunk."""
    if scoring.first == 0:
        scoring.logprobs.append(None)
        scoring.tops.append(None)
    ids, end = scoring.ids, 0
    # The logits after the last token predict nothing in the text.
    for logits in cache.score(ids[:-1], scoring_chunk(model)):
        start, end = end, end + len(logits)
        skipped = max(scoring.first - 1 - start, 0)
        if skipped < len(logits):
            logprobs = model.checked_logits(logits[skipped:]).log_softmax(dim=-1)
            _append(scoring, logprobs, start + skipped + 1)
        yield len(logits)
    scoring.done = True


def _append(scoring: Scoring, logprobs: torch.Tensor, start: int) -> None:
    """Append the scores of the tokens from ``start`` on, from log-probabilities [P, V]."""
    token = torch.tensor([list(scoring.ids[start : start + len(logprobs)])], device=logprobs.device)
    scoring.logprobs.extend(logprobs.gather(1, token.T)[:, 0].tolist())
    top = logprobs.topk(min(scoring.top, logprobs.shape[-1]), dim=-1)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    scoring.tops.extend(dict(zip(ids, values, strict=True)) for ids, values in pairs)
