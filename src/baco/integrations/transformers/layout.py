"""The columns that each model reads of one batch of token ids.

The aligned model reads the ids as they are. The base model reads its own prompt in each row, and
then the same answer. Both end in the same column, so a column counted from the end is the same
token.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.integrations.transformers.cache import Keys, PairCache
from baco.integrations.transformers.chat import BasePrompt, ChatReader
from baco.text.prompts import ids_digest


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns that one call reads, and those read before.

    Attributes:
        aligned_ids, base_ids: the new columns, int64 [B, T] and [B, T'].
        aligned_mask, base_mask: 1 for a token, 0 for padding, earlier columns included.
        start: the new column in which each row's answer begins, int64 [B]; below 1 where it began
            earlier.
        first: the first new column whose logits are routed, in any row of the batch.
        active: the active source of each row, True for base, bool [B].
        keys: of the rows' coins.
        seen: columns that the aligned model has read before.
    """

    aligned_ids: Tensor
    base_ids: Tensor
    aligned_mask: Tensor
    base_mask: Tensor
    start: Tensor
    first: int
    active: Tensor
    keys: Keys
    seen: int = 0

    @classmethod
    def continued(cls, ids: Tensor, cache: PairCache, base_rows: int) -> Self:
        """Continue the answers in ``cache``: both models read ``ids``, int64 [B, k]."""
        seen = cache.get_seq_length()
        ones = torch.ones_like(ids)
        return cls(
            aligned_ids=ids,
            base_ids=_known(ids, base_rows),
            aligned_mask=torch.cat([cache.aligned_mask, ones], dim=1),
            base_mask=torch.cat([cache.base_mask, ones], dim=1),
            start=torch.full_like(ids[:, 0], -seen),
            first=0,
            active=cache.source[:, -1],
            keys=cache.keys,
            seen=seen,
        )

    @classmethod
    def of_prompts(
        cls,
        ids: Tensor,
        mask: Tensor | None,
        *,
        reader: ChatReader | None,
        prompt_length: int | None,
        base_rows: int,
    ) -> Self:
        """Begin a batch.

        Args:
            ids, mask: int64 [B, T]; padding may be on either side.
            reader: finds the base model's prompts; None: the base model reads the ids as they are.
            prompt_length: columns before the answers. By default an answer begins after its
                conversation, and after the first token of raw text, which is scored as an answer.
            base_rows: the number of token ids that the base model knows.

        Raises:
            BacoError: prompts without tokens, or raw text with a token that the base model does not
                know.
        """
        if not ids.shape[1]:
            raise BacoError("the prompt has no token: give input_ids of at least one")
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device, torch.int64)
        lead = mask.argmax(dim=1)  # padding on the left
        own = [row[int(skip) :] for row, skip in zip(ids, lead, strict=True)]
        own_mask = [row[int(skip) :] for row, skip in zip(mask, lead, strict=True)]
        if reader is None:
            prompts: list[BasePrompt | None] = [None] * len(own)
        else:
            rows = zip(own, own_mask, strict=True)
            prompts = reader.read([row[: int(kept.sum())].tolist() for row, kept in rows])
        base, base_mask, start, digests = [], [], [], []
        for row, kept, prompt in zip(own, own_mask, prompts, strict=True):
            skip = ids.shape[1] - len(row)
            if prompt is None:
                before = 1 if prompt_length is None else max(1, prompt_length - skip)
                _check_known(row[:before], base_rows)
                base_prompt, before_base = row[:before], kept[:before]
            else:
                before = prompt.start
                base_prompt = torch.tensor(prompt.ids, dtype=ids.dtype, device=ids.device)
                before_base = torch.ones_like(base_prompt)
            # After the conversation a prompt may hold the beginning of the answer.
            begins = before if prompt_length is None else max(before, prompt_length - skip)
            base.append(torch.cat([base_prompt, _known(row[before:], base_rows)]))
            base_mask.append(torch.cat([before_base, kept[before:]]))
            start.append(skip + begins)
            digests.append(ids_digest(row[:begins].tolist()))
        starts = torch.tensor(start, device=ids.device)
        return cls(
            aligned_ids=ids,
            base_ids=_flush_right(base),
            aligned_mask=mask,
            base_mask=_flush_right(base_mask),
            start=starts,
            first=min(start) - 1,
            active=torch.zeros(len(start), dtype=torch.bool, device=ids.device),
            keys=Keys.of(digests, starts),
        )


def _flush_right(rows: list[Tensor]) -> Tensor:
    """Stack rows of different lengths, zeros on the left: [B, longest]."""
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])


def _known(ids: Tensor, base_rows: int) -> Tensor:
    """The answer as the base model reads it: 0 for an end token that only the aligned model has.

    The row has ended there; the batch keeps it until its other rows have ended.
    """
    return ids.masked_fill(ids >= base_rows, 0)


def _check_known(ids: Tensor, base_rows: int) -> None:
    for token in ids.tolist():
        if token >= base_rows:
            raise BacoError(
                f"token {token} of the prompt is unknown to the base model ({base_rows} tokens): "
                "pass a rendered chat prompt with base_prompt='auto', or text without it"
            )
