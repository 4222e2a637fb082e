"""Top-p truncation, of the parameter ``top_p`` and of the sampler ``base_top_p``."""

from torch import Tensor


def outside_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """The tokens that top-p [N] drops from logits [N, V], never the likeliest: bool [N, V]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens
    drop = (before >= top_p[:, None]).scatter(1, order, before >= top_p[:, None])
    drop &= (top_p < 1)[:, None]
    return drop.scatter_(1, order[:, :1], False)
