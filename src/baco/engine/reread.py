"""For models whose state is kept inside the model: the text so far is read anew at every token."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RereadStore:
    """No cache at all, one forward a row over its whole text: slowest, and right for any model."""

    rewinds = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.texts: list[list[int]] = []
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def prefill(self, ids: Sequence[int]) -> list[int]:
        return list(ids)

    def admit(self, prefix: list[int] | None, count: int) -> None:
        self.texts += [list(prefix or []) for _ in range(count)]
        self._measure()

    def reorder(self, order: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in order]
        self._measure()

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        rows: list[Tensor | None] = []
        for row, (ids, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            if count == 0:  # a row that this half never reads
                rows.append(None)
                continue
            self.texts[row] += ids[-count:]
            whole = torch.tensor([self.texts[row]], device=self.model.device)
            logits = self.model(input_ids=whole, use_cache=False).logits[0, -keep:]
            rows.append(torch.nn.functional.pad(logits, (0, 0, keep - len(logits), 0)))
            self.forwards += 1
            self.tokens += count
        self._measure()
        some = next(row for row in rows if row is not None)
        return torch.stack([torch.zeros_like(some) if row is None else row for row in rows])

    def rewind(self, lengths: Sequence[int]) -> None:
        for text, length in zip(self.texts, lengths, strict=True):
            del text[length:]
        self._measure()

    def bytes_per_token(self, prefix: Any) -> int:  # noqa: ARG002
        return 0

    def _measure(self) -> None:
        self.lengths = [len(text) for text in self.texts]
