"""For models whose state is kept inside the model: the text so far is read anew at every token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baco.engine.native import read_rows


class RereadStore:
    """No cache at all, one forward a row over its whole text: slowest, and right for any model."""

    rewinds = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.texts: list[list[int]] = []
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def shares(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def prefill(self, ids: Sequence[int], samples: int = 1) -> list[int]:  # noqa: ARG002
        return list(ids)

    def admit(self, prefix: list[int] | None, count: int) -> None:
        self.texts += [list(prefix or []) for _ in range(count)]
        self._measure()

    def reorder(self, order: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in order]
        self._measure()

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        logits = read_rows(tokens, counts, keep, self._read_row)
        self._measure()
        return logits

    def _read_row(self, row: int, ids: Sequence[int], keep: int) -> Tensor:
        self.texts[row] += ids
        whole = torch.tensor([self.texts[row]], device=self.model.device)
        self.forwards += 1
        self.tokens += len(ids)
        logits: Tensor = self.model(input_ids=whole, use_cache=False).logits[0, -keep:]
        return logits

    def rewind(self, lengths: Sequence[int]) -> None:
        for text, length in zip(self.texts, lengths, strict=True):
            del text[length:]
        self._measure()

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        """Rows have nothing in common."""

    def bytes_per_token(self, prefix: Any) -> int:  # noqa: ARG002
        return 0

    def _measure(self) -> None:
        self.lengths = [len(text) for text in self.texts]
