"""For models that keep their state inside the model: every step reads the whole text again."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from baco.kv_cache.protocol import RowSize
from baco.models.caches.per_row import extend_rows


class NoKVCache:
    """No cache: one forward per row over its whole text. Slowest, and right for any model.

    Nothing is drafted: such a model may compute other logits for the beginning of a longer text.
    """

    can_roll_back, can_cut, static_shapes = False, False, False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.texts: list[list[int]] = []
        self.forwards = self.tokens = 0

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.texts]

    def prefill(
        self,
        ids: Sequence[int],
        samples: int = 1,  # noqa: ARG002
        *,
        begun: list[int] | None = None,  # noqa: ARG002
    ) -> Generator[int, None, list[int]]:
        yield from ()
        return list(ids)

    def copy_prefix(self, prefix: list[int] | None, count: int) -> None:
        self.texts += [list(prefix or []) for _ in range(count)]

    def shares_prefix(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def prefix_variant(self, tokens: int) -> int:  # noqa: ARG002
        return 0

    def copy_block(self, source: Any, start: int, stop: int) -> None:
        """Nothing is held."""

    def load_blocks(self, blocks: Sequence[Any], tokens: int, room: int) -> list[int]:  # noqa: ARG002
        return []

    def expect_drafts(self, tokens: int) -> None:
        """No token can be removed."""

    def extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        return extend_rows(tokens, counts, keep, self._extend_row)

    def _extend_row(self, row: int, ids: Sequence[int], keep: int) -> Tensor:
        self.texts[row] += ids
        self.tokens += len(ids)
        return self._read(self.texts[row], keep)

    def roll_back(self, lengths: Sequence[int]) -> None:
        for text, length in zip(self.texts, lengths, strict=True):
            del text[length:]

    def drop(self, *, kept: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in kept]

    def score(self, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:  # noqa: ARG002
        yield self._read(ids, len(ids))

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        """Rows share no tensor."""

    def row_size(self) -> RowSize:
        return RowSize(0, 0, 0, 0)

    def allocated_bytes(self) -> int:
        return 0

    def preallocate(self, rows: int, columns: int) -> None:
        """Nothing is held."""

    def shrink(self, columns: int) -> None:
        """Nothing is held."""

    def _read(self, ids: Sequence[int], keep: int) -> Tensor:
        text = torch.tensor([list(ids)], device=self.model.device)
        self.forwards += 1
        output = self.model(input_ids=text, use_cache=False, logits_to_keep=keep)
        logits: Tensor = output.logits[0, -keep:]
        return logits
