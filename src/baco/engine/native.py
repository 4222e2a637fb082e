"""A cache that the model keeps itself: slow, and right for any causal LM.

For architectures whose state is not keys and values of every token (state-space models, ALiBi).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_CACHE_NAMES = ("past_key_values", "cache_params", "state")


def read_rows(
    tokens: Tensor,
    counts: Sequence[int],
    keep: int,
    read: Callable[[int, Sequence[int], int], Tensor],
) -> Tensor:
    """`Store.read`, a row at a time.

    Args:
        tokens: [B, T], of which each row reads its last ``counts``; nothing is read of one that
            has none.
        counts: one a row.
        keep: of how many last tokens the logits are wanted.
        read: (row, token ids, keep) → the logits after the row's last tokens, [keep or fewer,
            width].

    Returns:
        [B, keep, width], flush right, zeros where a row has fewer.
    """
    found = {
        row: read(row, ids[-count:], keep)
        for row, (ids, count) in enumerate(zip(tokens.tolist(), counts, strict=True))
        if count
    }
    some = next(iter(found.values()))
    whole = some.new_zeros(len(counts), keep, some.shape[-1])
    for row, logits in found.items():
        whole[row, keep - len(logits) :] = logits
    return whole


class NativeStore:
    """The model's own cache, one a row, one forward a row, with the verbs of `Store`."""

    rewinds = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.rows: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def shares(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def prefill(self, ids: Sequence[int], samples: int = 1) -> tuple[dict[str, Any], int]:  # noqa: ARG002
        return (self._read({}, list(ids))[1] if ids else {}), len(ids)

    def admit(self, prefix: tuple[dict[str, Any], int] | None, count: int) -> None:
        state, length = prefix or ({}, 0)
        self.rows += [copy.deepcopy(state) for _ in range(count)]
        self.lengths += [length] * count

    def reorder(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in order]
        self.lengths = [self.lengths[row] for row in order]

    def read(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        return read_rows(tokens, counts, keep, self._read_row)

    def _read_row(self, row: int, ids: Sequence[int], keep: int) -> Tensor:
        found = []
        for token in ids:  # such a state may take no more than one token at a time
            logits, self.rows[row] = self._read(self.rows[row], [token])
            found.append(logits)
        self.lengths[row] += len(ids)
        self.tokens += len(ids)
        return torch.stack(found[-keep:])

    def rewind(self, lengths: Sequence[int]) -> None:
        if any(now > kept for now, kept in zip(self.lengths, lengths, strict=True)):
            raise ValueError("a model's own cache cannot be rewound")

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        """Rows have nothing in common."""

    def bytes_per_token(self, prefix: Any) -> int:  # noqa: ARG002
        return 0  # unknown: such a state need not grow with the text at all

    def _read(self, state: dict[str, Any], ids: list[int]) -> tuple[Tensor, dict[str, Any]]:
        tokens = torch.tensor([ids], device=self.model.device)
        self.forwards += 1
        output = self.model(input_ids=tokens, use_cache=True, **state)
        kept = {name: output[name] for name in _CACHE_NAMES if output.get(name) is not None}
        return output.logits[0, -1], kept
