"""A cache that the model keeps itself: slow, and right for any causal LM.

For architectures whose state is not keys and values of every token (state-space models, ALiBi).
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from baco.kv_cache.batched import read_through
from baco.kv_cache.slots import CacheSize

# Tokens after which a state is measured: beyond, it grows as it did up to there.
_MEASURED = 64
_CACHE_NAMES = ("past_key_values", "cache_params", "state")


def read_rows(
    tokens: Tensor,
    counts: Sequence[int],
    keep: int,
    read: Callable[[int, Sequence[int], int], Tensor],
) -> Tensor:
    """`KVCache.read`, a row at a time.

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


def tensor_bytes(state: Any) -> list[int]:
    """Bytes of every tensor that is held anywhere in a state, each once.

    What is only a part of a larger tensor holds all of it.
    """
    found: dict[int, int] = {}
    seen: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, dict):
            inside: Iterator[Any] = iter(value.values())
        elif isinstance(value, list | tuple):
            inside = iter(value)
        elif isinstance(value, type | torch.nn.Module) or not hasattr(value, "__dict__"):
            return
        else:
            inside = iter(vars(value).values())
        for part in inside:
            look(part)

    look(state)
    return list(found.values())


class PerRowKVCache:
    """The model's own cache, one a row, one forward a row, with the verbs of `KVCache`.

    Args:
        model: of the rows.
        piece: tokens of a prompt that are read at once; None for a model that reads no more than
            one token on, and so reads a prompt whole.
    """

    can_roll_back = False

    def __init__(self, model: Any, piece: int | None = None) -> None:
        self.model, self.piece = model, piece
        self.rows: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.forwards = self.tokens = 0

    def shares(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def reading(
        self,
        ids: Sequence[int],
        samples: int = 1,  # noqa: ARG002
    ) -> Generator[int, None, tuple[dict[str, Any], int]]:
        state: dict[str, Any] = {}
        for piece in self._pieces(ids, self.piece):
            state = self._read(state, piece)[1]
            yield len(piece)
        return state, len(ids)

    def prefill(self, ids: Sequence[int], samples: int = 1) -> tuple[dict[str, Any], int]:
        return read_through(self.reading(ids, samples))

    def after_each(self, ids: Sequence[int], piece: int) -> Iterator[Tensor]:
        state: dict[str, Any] = {}
        for own in self._pieces(ids, piece if self.piece else None):
            logits, state = self._read(state, own, keep=len(own))
            yield logits

    def _pieces(self, ids: Sequence[int], piece: int | None) -> Iterator[list[int]]:
        step = piece or max(1, len(ids))
        return (list(ids[start : start + step]) for start in range(0, len(ids), step))

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
            found.append(logits[-1])
        self.lengths[row] += len(ids)
        self.tokens += len(ids)
        return torch.stack(found[-keep:])

    def roll_back(self, lengths: Sequence[int]) -> None:
        if any(now > kept for now, kept in zip(self.lengths, lengths, strict=True)):
            raise ValueError("a model's own cache cannot be rewound")

    def clean(self, going: Sequence[int], ended: Sequence[int]) -> None:
        """Rows have nothing in common."""

    def size(self) -> CacheSize:
        one, many = (
            tensor_bytes(read_through(self.reading([1] * tokens))[0]) for tokens in (1, _MEASURED)
        )
        return CacheSize.between(one, many, _MEASURED)

    def held(self) -> int:
        return 0

    def shrink(self, columns: int) -> None:
        """A state takes what its own text needs."""

    def _read(
        self, state: dict[str, Any], ids: list[int], keep: int = 1
    ) -> tuple[Tensor, dict[str, Any]]:
        """Read on: the logits after the last ``keep`` tokens, and the state after them."""
        tokens = torch.tensor([ids], device=self.model.device)
        self.forwards += 1
        output = self.model(input_ids=tokens, use_cache=True, logits_to_keep=keep, **state)
        kept = {name: output[name] for name in _CACHE_NAMES if output.get(name) is not None}
        return output.logits[0, -keep:], kept
