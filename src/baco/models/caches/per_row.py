"""The cache that a model keeps itself, one per row: slow, and right for any causal LM.

It serves architectures whose state is not a key and a value per token (state-space models, ALiBi).
"""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from baco.kv_cache.protocol import RowSize, finish

# A state is measured after one token and after this many; beyond, it grows at the same rate.
_MEASURED_TOKENS = 64
_CACHE_NAMES = ("past_key_values", "cache_params", "state")


def extend_rows(
    tokens: Tensor,
    counts: Sequence[int],
    keep: int,
    extend_row: Callable[[int, Sequence[int], int], Tensor],
) -> Tensor:
    """`KVCache.extend`, one row at a time.

    Args:
        tokens, counts, keep: as for `KVCache.extend`.
        extend_row: (row, token ids, keep) → the logits after the row's last tokens, [keep or fewer,
            width]. It is not called for a row that reads nothing.

    Returns:
        [B, keep, width], right-aligned, zeros where a row has fewer.
    """
    rows = {
        row: extend_row(row, ids[-count:], keep)
        for row, (ids, count) in enumerate(zip(tokens.tolist(), counts, strict=True))
        if count
    }
    some = next(iter(rows.values()))
    whole = some.new_zeros(len(counts), keep, max(logits.shape[-1] for logits in rows.values()))
    for row, logits in rows.items():
        whole[row, keep - len(logits) :, : logits.shape[-1]] = logits
    return whole


def tensor_bytes(state: Any) -> list[int]:
    """Bytes of every tensor anywhere in a state, each storage once.

    A view counts as the whole storage that it keeps alive.
    """
    storages: dict[int, int] = {}
    visited: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
            return
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, dict):
            parts: Iterator[Any] = iter(value.values())
        elif isinstance(value, list | tuple):
            parts = iter(value)
        elif isinstance(value, type | torch.nn.Module) or not hasattr(value, "__dict__"):
            return
        else:
            parts = iter(vars(value).values())
        for part in parts:
            visit(part)

    visit(state)
    return list(storages.values())


class PerRowKVCache:
    """The model's own cache, one per row and one forward per row, with the verbs of `KVCache`.

    Rows cannot be rolled back, except by the last token alone: the logits after it are kept, and
    returned when it is read again.

    Args:
        model: of the rows.
        chunk: tokens of a prompt that are read at once; None for a model that continues its state
            by one token only, so that a prompt is read whole.
    """

    can_roll_back, can_cut, static_shapes = False, False, False

    def __init__(self, model: Any, chunk: int | None = None) -> None:
        self.model, self.chunk = model, chunk
        self.states: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self._last: list[Tensor | None] = []  # the logits after each row's last token
        self._read_again = set[int]()  # rows whose states are one token ahead
        self.forwards = self.tokens = 0

    def prefill(
        self,
        ids: Sequence[int],
        samples: int = 1,  # noqa: ARG002
        *,
        begun: tuple[dict[str, Any], int] | None = None,
    ) -> Generator[int, None, tuple[dict[str, Any], int]]:
        state, read = begun or ({}, 0)
        for chunk in self._chunks(ids[read:], self.chunk):
            state = self._read(state, chunk)[1]
            yield len(chunk)
        return state, len(ids)

    def copy_prefix(self, prefix: tuple[dict[str, Any], int] | None, count: int) -> None:
        state, length = prefix or ({}, 0)
        self.states += [copy.deepcopy(state) for _ in range(count)]
        self.lengths += [length] * count
        self._last += [None] * count

    def shares_prefix(self, tokens: int, samples: int) -> bool:  # noqa: ARG002
        return False

    def prefix_variant(self, tokens: int) -> int:  # noqa: ARG002
        return 0

    def copy_block(
        self, source: tuple[dict[str, Any], int] | int, start: int, stop: int
    ) -> dict[str, Any] | None:
        if isinstance(source, int):
            if source in self._read_again:
                return None
            source = self.states[source], self.lengths[source]
        state, length = source
        return copy.deepcopy(state) if (start, stop) == (0, length) else None

    def load_blocks(
        self,
        blocks: Sequence[dict[str, Any]],
        tokens: int,
        room: int,  # noqa: ARG002
    ) -> tuple[dict[str, Any], int]:
        (state,) = blocks
        return copy.deepcopy(state), tokens

    def expect_drafts(self, tokens: int) -> None:
        """No token can be removed."""

    def extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        return extend_rows(tokens, counts, keep, self._extend_row)

    def _extend_row(self, row: int, ids: Sequence[int], keep: int) -> Tensor:
        rows, unread = [], ids
        if row in self._read_again and ids:
            self._read_again.remove(row)
            last = self._last[row]
            assert last is not None
            rows, unread = [last], ids[1:]
        for token in unread:  # such a state may take no more than one token at a time
            logits, self.states[row] = self._read(self.states[row], [token])
            rows.append(logits[-1])
        self._last[row] = rows[-1]
        self.lengths[row] += len(ids)
        self.tokens += len(ids)
        # Kept logits are narrower where the model has begun to return hidden states behind them.
        return pad_sequence(rows[-keep:], batch_first=True)

    def roll_back(self, lengths: Sequence[int]) -> None:
        for row, (now, kept) in enumerate(zip(self.lengths, lengths, strict=True)):
            if now <= kept:
                continue
            if now > kept + 1 or self._last[row] is None or row in self._read_again:
                raise ValueError("a model's own cache cannot be rolled back")
            self._read_again.add(row)
            self.lengths[row] = kept

    def drop(self, *, kept: Sequence[int]) -> None:
        self.states = [self.states[row] for row in kept]
        self.lengths = [self.lengths[row] for row in kept]
        self._last = [self._last[row] for row in kept]
        self._read_again = {new for new, old in enumerate(kept) if old in self._read_again}

    def score(self, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:
        state: dict[str, Any] = {}
        for own in self._chunks(ids, chunk if self.chunk else None):
            logits, state = self._read(state, own, keep=len(own))
            yield logits

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        """Rows share no tensor."""

    def row_size(self) -> RowSize:
        short, long = (
            tensor_bytes(finish(self.prefill([1] * tokens))[0]) for tokens in (1, _MEASURED_TOKENS)
        )
        return RowSize.between(short, long, _MEASURED_TOKENS)

    def allocated_bytes(self) -> int:
        return 0

    def preallocate(self, rows: int, columns: int) -> None:
        """A state takes what its own text needs."""

    def shrink(self, columns: int) -> None:
        """A state takes what its own text needs."""

    def _chunks(self, ids: Sequence[int], chunk: int | None) -> Iterator[list[int]]:
        step = chunk or max(1, len(ids))
        return (list(ids[start : start + step]) for start in range(0, len(ids), step))

    def _read(
        self, state: dict[str, Any], ids: list[int], keep: int = 1
    ) -> tuple[Tensor, dict[str, Any]]:
        """Continue a state: the logits after the last ``keep`` tokens, and the state after them."""
        tokens = torch.tensor([ids], device=self.model.device)
        self.forwards += 1
        output = self.model(input_ids=tokens, use_cache=True, logits_to_keep=keep, **state)
        kept = {name: output[name] for name in _CACHE_NAMES if output.get(name) is not None}
        return output.logits[0, -keep:], kept
