"""What a pair has read of a batch of answers: the two halves' caches and who spoke."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache


@dataclass(frozen=True, slots=True)
class Keys:
    """What keys the coins of a batch's rows, beside the seed.

    Rows of one prompt, such as ``num_return_sequences`` makes, are its samples in their order.

    Attributes:
        digests: each row's prompt, the ids after its padding.
        samples: each row's number among the rows of its prompt.
        start: column of the aligned half in which each row's answer begins, int64 [B].
    """

    digests: tuple[bytes, ...]
    samples: tuple[int, ...]
    start: Tensor

    @classmethod
    def of(cls, digests: Sequence[bytes], start: Tensor) -> Self:
        """Number the rows of every prompt."""
        seen = Counter[bytes]()
        samples = []
        for digest in digests:
            samples.append(seen[digest])
            seen[digest] += 1
        return cls(tuple(digests), tuple(samples), start)

    def rows(self, indices: Tensor) -> "Keys":
        """The keys of some rows."""
        kept = indices.tolist()
        digests, samples = ((column[i] for i in kept) for column in (self.digests, self.samples))
        return Keys(tuple(digests), tuple(samples), self.start[indices])


class PairCache(Cache):
    """The cache of both halves, for ``past_key_values``: crops, repeats and reorders as one.

    The two halves hold different numbers of columns, since their prompts differ; both end with the
    same answer, so a column counted from the end is the same token in either.

    Attributes:
        base, aligned: the halves' own caches.
        base_mask, aligned_mask: 1 where a column is read, 0 where it is padding; int64 [B, T'].
        source: which half says the token after a column of the aligned half, True for base;
            bool [B, T]. Within a prompt it says nothing.
        ids, base_ids: the two halves' columns, int64 [B, T] and [B, T'].
        keys: what the rows' coins are keyed by. They stay in their places when beams change theirs.
        base_long, aligned_long: rows that a half has read with the long factors of its rotary
            embeddings, bool [B].
    """

    def __init__(self, base_config: Any, aligned_config: Any) -> None:
        super().__init__(layers=[])
        self.base = DynamicCache(config=base_config)
        self.aligned = DynamicCache(config=aligned_config)
        self.base_mask = self.aligned_mask = torch.ones(0, 0, dtype=torch.int64)
        self.source = torch.zeros(0, 0, dtype=torch.bool)
        self.ids = self.base_ids = torch.zeros(0, 0, dtype=torch.int64)
        self.keys = Keys((), (), torch.zeros(0, dtype=torch.int64))
        self.base_long = self.aligned_long = torch.zeros(0, dtype=torch.bool)

    def append(self, ids: Tensor, base_ids: Tensor, source: Tensor) -> None:
        """Keep the new columns' ids, [B, k] and [B, k'], and sources, [B, k]."""
        if self.batch_size:
            ids, source = torch.cat([self.ids, ids], 1), torch.cat([self.source, source], 1)
            base_ids = torch.cat([self.base_ids, base_ids], 1)
        self.ids, self.base_ids, self.source = ids, base_ids, source
        for name in ("base_long", "aligned_long"):
            if len(getattr(self, name)) == 0:  # the router never names this half
                setattr(self, name, torch.zeros(len(ids), dtype=torch.bool))

    def sources_of(self, ids: Tensor, row: int) -> Tensor:
        """The sources after each column of a text [T] that a row of this cache holds: bool [T].

        Several rows hold it only where they were repeated or are beams; it is ``row`` then, if
        that is among them.
        """
        held = (self.ids[:, : len(ids)] == ids).all(dim=1)
        if not (row < len(held) and held[row]):
            row = int(held.nonzero()[0, 0])
        return self.source[row, : len(ids)]

    @property
    def is_compileable(self) -> bool:
        """Never: a column's source depends on the columns before it."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return self.source.shape[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Columns of the aligned half, prompt and answer: what ``generate`` counts."""
        return self.source.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns; the sign is ``transformers``' habit."""
        self.base.crop(tokens_to_remove)
        self.aligned.crop(tokens_to_remove)
        kept = self.source.shape[1] - abs(tokens_to_remove)
        kept_of_base = self.base_mask.shape[1] - abs(tokens_to_remove)
        self.base_mask = self.base_mask[:, :kept_of_base]
        self.base_ids = self.base_ids[:, :kept_of_base]
        self.aligned_mask = self.aligned_mask[:, :kept]
        self.source, self.ids = self.source[:, :kept], self.ids[:, :kept]

    def reset(self) -> None:
        """Forget everything."""
        self.base.reset()
        self.aligned.reset()
        self.base_mask, self.aligned_mask = self.base_mask[:0, :0], self.aligned_mask[:0, :0]
        self.source = self.source[:0, :0]
        self.ids, self.base_ids = self.ids[:0, :0], self.base_ids[:0, :0]
        self.keys = Keys((), (), self.keys.start[:0])
        self.base_long, self.aligned_long = self.base_long[:0], self.aligned_long[:0]

    def activate_past_recording(self) -> None:
        """Keep what sliding windows would drop, so that ``crop`` can go back."""
        self.base.activate_past_recording()
        self.aligned.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.base.reorder_cache(beam_idx)
        self.aligned.reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.base.batch_select_indices(indices)
        self.aligned.batch_select_indices(indices)
        self._rows(indices)
        self.keys = self.keys.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, side by side."""
        self.base.batch_repeat_interleave(repeats)
        self.aligned.batch_repeat_interleave(repeats)
        rows = torch.arange(self.batch_size, device=self.source.device).repeat_interleave(repeats)
        self._rows(rows)
        repeated = self.keys.rows(rows)
        self.keys = Keys.of(repeated.digests, repeated.start)

    def _rows(self, indices: Tensor) -> None:
        self.base_mask = self.base_mask[indices]
        self.aligned_mask = self.aligned_mask[indices]
        self.source = self.source[indices]
        self.ids, self.base_ids = self.ids[indices], self.base_ids[indices]
        self.base_long, self.aligned_long = self.base_long[indices], self.aligned_long[indices]
