"""For models whose state is kept inside the model: the text so far is read anew at every token."""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from baco.kv_cache.batched import read_through
from baco.kv_cache.slots import CacheSize
from baco.models.caches.per_row import read_rows


class NoKVCache:
    """No cache at all, one forward a row over its whole text: slowest, and right for any model."""

    can_roll_back = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self.texts: list[list[int]] = []
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def shares(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def reading(
        self,
        ids: Sequence[int],
        samples: int = 1,  # noqa: ARG002
    ) -> Generator[int, None, list[int]]:
        yield from ()
        return list(ids)

    def prefill(self, ids: Sequence[int], samples: int = 1) -> list[int]:
        return read_through(self.reading(ids, samples))

    def after_each(self, ids: Sequence[int], piece: int) -> Iterator[Tensor]:  # noqa: ARG002
        yield self._read(ids, len(ids))

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
        self.tokens += len(ids)
        return self._read(self.texts[row], keep)

    def _read(self, ids: Sequence[int], keep: int) -> Tensor:
        whole = torch.tensor([list(ids)], device=self.model.device)
        self.forwards += 1
        output = self.model(input_ids=whole, use_cache=False, logits_to_keep=keep)
        logits: Tensor = output.logits[0, -keep:]
        return logits

    def roll_back(self, lengths: Sequence[int]) -> None:
        for text, length in zip(self.texts, lengths, strict=True):
            del text[length:]
        self._measure()

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        """Rows have nothing in common."""

    def size(self) -> CacheSize:
        return CacheSize(0, 0, 0, 0)

    def held(self) -> int:
        return 0

    def shrink(self, columns: int) -> None:
        """Nothing is held."""

    def _measure(self) -> None:
        self.lengths = [len(text) for text in self.texts]
