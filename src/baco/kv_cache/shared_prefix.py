"""Prompts that several rows of a cache go on from, each held once.

Where a prompt is long and its samples are many, a copy for each would take more memory than their
answers, and as much longer to go through at every step. So their rows hold only what comes after
it, and attend to both: attention over two parts is the mean of what each part says, weighted by how
much of the softmax falls on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from baco.kv_cache.slots import SlotCache

# Tokens whose copies must be saved: below, the few more operations of every layer cost more.
_SAVED = 2_048


def pays(tokens: int, samples: int) -> bool:
    """Is a prompt of so many tokens held once for so many samples, or copied for each?"""
    return tokens * (samples - 1) >= _SAVED


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A prompt that was read.

    Attributes:
        cache: its keys and values, of one row.
        length: its tokens.
        shared: rows that go on from it attend to it where it lies.
    """

    cache: "SlotCache"
    length: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """The rows that go on from one shared prompt.

    Attributes:
        prefix: the prompt.
        rows: of the batch: a stretch of them where they stand together, else int64 [G].
    """

    prefix: Prefix
    rows: slice | Tensor

    def table(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values of a layer, [key heads, tokens, width]."""
        held = self.prefix.cache.layer(layer)
        return held.keys[0], held.values[0]


def grouped(prefixes: Sequence[Prefix | None], device: torch.device) -> list[Group]:
    """The rows of a batch by the shared prompts that they go on from."""
    found: dict[int, tuple[Prefix, list[int]]] = {}
    for row, prefix in enumerate(prefixes):
        if prefix is not None:
            found.setdefault(id(prefix), (prefix, []))[1].append(row)
    return [Group(prefix, _index(rows, device)) for prefix, rows in found.values()]


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def attend_to_both(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    behind: Sequence[tuple[slice | Tensor, Tensor, Tensor]],
) -> Tensor:
    """Attention of a few tokens over their rows' own columns and over the prompts before these.

    Args:
        query: [B, heads, L, width].
        keys, values: the rows' own, [B, heads, columns, width].
        mask: added to the scores of own columns, what can be seen as [B, 1 or heads, L, columns].
        scale: of the scores.
        behind: rows and the keys and values that these have in common, [heads, tokens, width].

    Returns:
        [B, heads, L, width].
    """
    size, heads, few, width = query.shape
    query = query * scale
    own = (query @ keys.transpose(2, 3)).float() + mask.view(size, -1, few, mask.shape[-1])
    weight = own.logsumexp(dim=-1)
    said = (own.softmax(dim=-1).to(values.dtype) @ values).float()
    for rows, shared_keys, shared_values in behind:
        # All rows' queries in one product per head: the prompt is gone through once for all.
        asked = query[rows].transpose(0, 1).reshape(heads, -1, width)
        scores = torch.bmm(asked, shared_keys.transpose(1, 2)).float()
        heard = torch.bmm(scores.softmax(dim=-1).to(values.dtype), shared_values).float()
        heard = heard.view(heads, -1, few, width).transpose(0, 1)
        share = (_apart(scores.logsumexp(dim=-1), few) - weight[rows]).sigmoid()
        said[rows] = said[rows].lerp(heard, share[..., None])
    return said.to(query.dtype)


def _apart(column: Tensor, few: int) -> Tensor:
    """Of every head [heads, rows * few] as [rows, heads, few]."""
    return column.view(len(column), -1, few).transpose(0, 1)
