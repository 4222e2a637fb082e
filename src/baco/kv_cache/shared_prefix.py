"""Attention over a prompt that several rows share, without a copy for each row.

Copies of a long prompt for many samples would take more memory than their answers, and every step
would read all of them. So such rows hold only the tokens after the prompt, and attend to both
parts: attention over two parts is the mean of their outputs, weighted by each part's share of the
softmax.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Copied tokens that sharing must save; below, the extra operations of every layer cost more.
_MIN_SAVED = 2_048


def sharing_pays(tokens: int, samples: int) -> bool:
    """Is it faster to share a prompt of this many tokens than to copy it for each sample?"""
    return tokens * (samples - 1) >= _MIN_SAVED


@dataclass(frozen=True, slots=True, eq=False)
class PrefixGroup:
    """Rows that continue one shared prompt.

    Attributes:
        rows: of the batch: a slice where they are adjacent, else int64 [G].
        length: tokens of the prompt.
        keys, values: of the prompt in every layer, [key heads, tokens, width] each.
    """

    rows: slice | Tensor
    length: int
    keys: list[Tensor]
    values: list[Tensor]


def row_index(rows: list[int], device: torch.device) -> slice | Tensor:
    """An index of ascending row numbers: a slice where they are adjacent."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def attend_with_prefixes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    prefixes: Sequence[tuple[slice | Tensor, Tensor, Tensor]],
) -> Tensor:
    """Attention of a few tokens over their rows' own columns and the prompts before them.

    Args:
        query: [B, heads, L, width].
        keys, values: of the rows' own columns, [B, heads, columns, width].
        mask: added to the scores of own columns; viewable as [B, 1 or heads, L, columns].
        scale: of the scores.
        prefixes: rows, and the keys and values that they share, [heads, tokens, width].

    Returns:
        [B, heads, L, width].
    """
    size, heads, span, width = query.shape
    query = query * scale
    scores = (query @ keys.transpose(2, 3)).float() + mask.view(size, -1, span, mask.shape[-1])
    log_sum = scores.logsumexp(dim=-1)
    output = (scores.softmax(dim=-1).to(values.dtype) @ values).float()
    for rows, shared_keys, shared_values in prefixes:
        # All rows' queries in one product per head, so that the prompt is read once for all.
        queries = query[rows].transpose(0, 1).reshape(heads, -1, width)
        scores = torch.bmm(queries, shared_keys.transpose(1, 2)).float()
        prefix_out = torch.bmm(scores.softmax(dim=-1).to(values.dtype), shared_values).float()
        prefix_out = prefix_out.view(heads, -1, span, width).transpose(0, 1)
        prefix_log_sum = scores.logsumexp(dim=-1).view(heads, -1, span).transpose(0, 1)
        weight = (prefix_log_sum - log_sum[rows]).sigmoid()
        output[rows] = output[rows].lerp(prefix_out, weight[..., None])
    return output.to(query.dtype)
