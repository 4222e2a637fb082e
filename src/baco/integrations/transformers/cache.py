"""The cache of a pair in `transformers`: both models' caches, and the source of every token."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a batch's coins, beside the seed.

    Rows of one prompt, such as ``num_return_sequences`` makes, are its samples in their order.

    Attributes:
        digests: of each row's prompt, that is, its ids after the padding.
        samples: each row's number among the rows of its prompt.
        start: column of the aligned model in which each row's answer begins, int64 [B].
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
    """The caches of both models, as one ``past_key_values``: cropped, repeated, reordered together.

    The caches have different numbers of columns, since the prompts differ. Both end with the same
    answer, so a column counted from the end is the same token in both.

    Attributes:
        base, aligned: the models' own caches.
        base_mask, aligned_mask: 1 for a token, 0 for padding; int64 [B, T'] and [B, T].
        source: the source of the token after each column of the aligned model, True for base; bool
            [B, T]. Its values within a prompt have no meaning.
        ids, base_ids: the tokens in the columns, int64 [B, T] and [B, T'].
        keys: of the rows' coins. They stay in their rows when beams are reordered.
        base_long, aligned_long: rows that a model has read with the long factors of its rotary
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
        """Append new columns: ids, [B, k] and [B, k'], and sources, [B, k]."""
        if self.batch_size:
            ids, source = torch.cat([self.ids, ids], 1), torch.cat([self.source, source], 1)
            base_ids = torch.cat([self.base_ids, base_ids], 1)
        self.ids, self.base_ids, self.source = ids, base_ids, source
        for name in ("base_long", "aligned_long"):
            if len(getattr(self, name)) == 0:  # the router never picks this model
                setattr(self, name, torch.zeros(len(ids), dtype=torch.bool))

    def sources_of(self, ids: Tensor, row: int) -> Tensor:
        """The sources after each column of a text, int64 [T], that is in this cache: bool [T].

        Rows that were repeated, or are beams, may hold the same text. ``row`` is preferred then.
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
        """Columns of the aligned model, prompt and answer; ``generate`` counts these."""
        return self.source.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` columns (``transformers`` negates the number)."""
        self.base.crop(tokens_to_remove)
        self.aligned.crop(tokens_to_remove)
        kept = self.source.shape[1] - abs(tokens_to_remove)
        kept_of_base = self.base_mask.shape[1] - abs(tokens_to_remove)
        self.base_mask = self.base_mask[:, :kept_of_base]
        self.base_ids = self.base_ids[:, :kept_of_base]
        self.aligned_mask = self.aligned_mask[:, :kept]
        self.source, self.ids = self.source[:, :kept], self.ids[:, :kept]

    def reset(self) -> None:
        """Remove all rows."""
        self.base.reset()
        self.aligned.reset()
        self.base_mask, self.aligned_mask = self.base_mask[:0, :0], self.aligned_mask[:0, :0]
        self.source = self.source[:0, :0]
        self.ids, self.base_ids = self.ids[:0, :0], self.base_ids[:0, :0]
        self.keys = Keys((), (), self.keys.start[:0])
        self.base_long, self.aligned_long = self.base_long[:0], self.aligned_long[:0]

    def activate_past_recording(self) -> None:
        """Keep the columns that sliding windows would drop, so that ``crop`` works."""
        self.base.activate_past_recording()
        self.aligned.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row i by row ``beam_idx[i]``."""
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
        """Repeat every row ``repeats`` times; copies follow each other."""
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
