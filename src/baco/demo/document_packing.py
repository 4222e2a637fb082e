"""Packs documents into rows of equal length and shuffles them into batches, from one seed.

It knows token ids only. Every row begins at the start of a document, as every prompt does;
documents follow one another in a row, each ended by its end token, and the last is cut where the
row ends.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

IGNORED = -100  # target of positions that are not learnt; cross_entropy's default


def pack(
    documents: Iterable[tuple[list[int], list[bool]]], width: int, fill: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both long [rows, width].

    Each document is its ids and, for each id, whether the model should learn it. A document
    of which less than half would fit opens the next row; the gap is filled with `fill`.
    """
    rows: list[list[int]] = []
    learnt: list[list[bool]] = []
    ids: list[int] = []
    flags: list[bool] = []
    for document, flag in documents:
        if ids and len(ids) + len(document) // 2 > width:
            rows.append(ids)
            learnt.append(flags)
            ids, flags = [], []
        ids = ids + document
        flags = flags + flag
        if len(ids) > width:
            rows.append(ids[: width + 1])
            learnt.append(flags[: width + 1])
            ids, flags = [], []
    if ids:
        rows.append(ids)
        learnt.append(flags)
    inputs = torch.full((len(rows), width + 1), fill)
    targets = torch.full((len(rows), width + 1), IGNORED)
    for row, (ids, flags) in enumerate(zip(rows, learnt, strict=True)):
        tokens = torch.tensor(ids)
        inputs[row, : len(ids)] = tokens
        targets[row, : len(ids)] = torch.where(torch.tensor(flags), tokens, IGNORED)
    return inputs[:, :-1].contiguous(), targets[:, 1:].contiguous()


def batches(
    rows: tuple[Tensor, Tensor], size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of `size` rows; every row is seen once before any is seen again."""
    inputs, targets = rows
    assert len(inputs) > 0, "nothing to learn from"
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        pick, order = order[:size], order[size:]
        yield inputs[pick], targets[pick]
