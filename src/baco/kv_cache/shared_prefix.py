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


@dataclass(frozen=True, slots=True, eq=False)
class PrefixPart:
    """What rows attend to in one layer of a shared prompt.

    Attributes:
        rows: as in `PrefixGroup`.
        keys, values: [key heads, tokens, width].
        mask: added to the scores, float32 [G * L, tokens], for L queries of each row; finite, since
            a row may attend to none of these tokens. None where rows attend to all of them.
    """

    rows: slice | Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


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
    prefixes: Sequence[PrefixPart],
    softcap: float | None = None,
) -> Tensor:
    """Attention of a few tokens over their rows' own columns and the prompts before them.

    Args:
        query: [B, heads, L, width].
        keys, values: of the rows' own columns, [B, heads, columns, width].
        mask: added to the scores of own columns; viewable as [B, 1 or heads, L, columns].
        scale: of the scores.
        prefixes: what rows share.
        softcap: the bound of the scores, as in `softly_capped`; None for none.

    Returns:
        [B, heads, L, width].
    """
    size, heads, span, width = query.shape
    query = query * scale
    scores = softly_capped((query @ keys.transpose(2, 3)).float(), softcap)
    scores = scores + mask.view(size, -1, span, mask.shape[-1])
    log_sum = scores.logsumexp(dim=-1)
    output = (scores.softmax(dim=-1).to(values.dtype) @ values).float()
    for part in prefixes:
        rows = part.rows
        # All rows' queries in one product per head, so that the prompt is read once for all.
        queries = query[rows].transpose(0, 1).reshape(heads, -1, width)
        scores = torch.bmm(queries, part.keys.transpose(1, 2)).float()
        scores = softly_capped(scores, softcap)
        if part.mask is not None:
            scores = scores + part.mask
        prefix_out = torch.bmm(scores.softmax(dim=-1).to(values.dtype), part.values).float()
        prefix_out = prefix_out.view(heads, -1, span, width).transpose(0, 1)
        prefix_log_sum = scores.logsumexp(dim=-1).view(heads, -1, span).transpose(0, 1)
        weight = (prefix_log_sum - log_sum[rows]).sigmoid()
        output[rows] = output[rows].lerp(prefix_out, weight[..., None])
    return output.to(query.dtype)


def softly_capped(numbers: Tensor, softcap: float | None) -> Tensor:
    """Bounded numbers, softcap · tanh(numbers / softcap) (Gemma 2); as they are for None."""
    return numbers if softcap is None else (numbers / softcap).tanh_().mul_(softcap)
