"""The verbs of a KV cache, which are all that the engine knows of one.

An implementation may hold its rows in torch tensors (`baco.kv_cache.batched`), in a model's own
cache, or in the sequences of another library (`baco.models.caches`). The protocol knows token ids
and rows. It knows no model, no router and no text.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor

T = TypeVar("T")


def finish(steps: Generator[int, None, T]) -> T:
    """Run a generator such as `KVCache.prefill` to its end and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


@dataclass(frozen=True, slots=True)
class RowSize:
    """Bytes that one row of a cache takes.

    Attributes:
        fixed: whatever the row's length.
        per_token: for each token of the row.
        tensor_fixed, tensor_per_token: the same for the row's part of the cache's largest tensor,
            which exists twice while the cache grows.
    """

    fixed: int
    per_token: int
    tensor_fixed: int
    tensor_per_token: int

    @classmethod
    def between(cls, short: Sequence[int], long: Sequence[int], tokens: int) -> Self:
        """The size of a cache that grows no faster than linearly.

        Args:
            short: bytes of each tensor of a row with one token.
            long: the same with ``tokens`` tokens.
            tokens: above 1.
        """
        per_token = max(0, -(-(sum(long) - sum(short)) // (tokens - 1)))
        largest = -(-max(long, default=0) // tokens) if per_token else 0
        return cls(max(0, sum(short) - per_token), per_token, max(short, default=0), largest)

    def bytes(self, tokens: int) -> int:
        """Bytes of a row with this many tokens; 0 for a row that is never read."""
        return self.fixed + self.per_token * tokens if tokens else 0

    def largest_tensor(self, tokens: int) -> int:
        """Bytes of the largest tensor of such a row."""
        return self.tensor_fixed + self.tensor_per_token * tokens if tokens else 0


class KVCache(Protocol):
    """What a model has read of the rows of a batch. Rows are numbered from 0 without gaps.

    Attributes:
        can_roll_back: whether tokens that were read can be removed again. Without it nothing can be
            drafted.
        can_cut: whether a row can be rolled back to any length at any time. Else only what
            `expect_drafts` announced can be removed.
        static_shapes: whether the tables stay at one address and size while rows are decoded.
        lengths: the number of tokens that each row holds.
        forwards, tokens: how often the model ran, and on how many tokens of rows.
    """

    can_roll_back: bool
    can_cut: bool

    @property
    def static_shapes(self) -> bool: ...

    @property
    def lengths(self) -> list[int]: ...

    @property
    def forwards(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def prefill(
        self, ids: Sequence[int], samples: int = 1, *, begun: Any = None
    ) -> Generator[int, None, Any]:
        """Read a prompt once, chunk by chunk, beside the rows.

        Args:
            ids: the prompt.
            samples: how many rows will continue it.
            begun: what `load_blocks` returned for the prompt's first tokens, which are not read.

        Yields:
            The number of tokens in each chunk, after reading it.

        Returns:
            A prefix for `copy_prefix`. The cache may free it once nothing refers to it.
        """

    def copy_prefix(self, prefix: Any, count: int) -> None:
        """Append ``count`` rows that continue ``prefix``; None for rows that are never read."""

    def shares_prefix(self, tokens: int, samples: int) -> bool:
        """Whether this many samples of a prompt of this many tokens share one copy of it."""

    def prefix_variant(self, tokens: int) -> int:
        """A number that depends on how many tokens of a text have been read. Blocks of a text can
        be loaded only for a text with the same number.
        """

    def copy_block(self, source: Any, start: int, stop: int) -> Any:
        """A copy of what is cached of some tokens of a text, for `load_blocks`.

        Args:
            source: a prefix, as `prefill` returns it, or the number of a row.
            start, stop: the tokens. A cache that cannot be cut copies only whole texts.

        Returns:
            The copy; None if it could not be continued.
        """

    def load_blocks(self, blocks: Sequence[Any], tokens: int, room: int) -> Any:
        """A prompt of which the first tokens have been read, for `prefill`.

        Args:
            blocks: of the prompt's first tokens, in order, as `copy_block` returned them.
            tokens: how many tokens are taken; the last block may have more.
            room: tokens of the whole prompt.
        """

    def expect_drafts(self, tokens: int) -> None:
        """Announce how many last tokens of the next `extend` may be removed again, at most. Beyond
        these, only the very last token may be, if the row then reads it once more. Without an
        announcement every token may be removed.
        """

    def extend(self, tokens: Tensor, counts: Sequence[int], keep: int) -> Tensor:
        """Read more tokens of every row.

        Args:
            tokens: [B, T]; row r reads its last ``counts[r]``, and those before are padding.
            counts: one per row, 0 for a row that reads nothing.
            keep: the number of last tokens whose logits are returned.

        Returns:
            Raw logits [B, keep, width]; entries of tokens that a row did not read are undefined.
        """

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Remove what each row r has read beyond ``lengths[r]`` tokens.

        A cache that cannot be cut may remove more; its `lengths` then say from where on a row must
        be read again.
        """

    def drop(self, *, kept: Sequence[int]) -> None:
        """Drop all rows but ``kept``, which get new numbers in the order given."""

    def score(self, ids: Sequence[int], chunk: int) -> Iterator[Tensor]:
        """Read a text beside the rows: the raw logits after each of its tokens, [T, width], in
        chunks of up to ``chunk`` tokens, or whole where the model cannot read on.
        """

    def clear(self, running: Sequence[int], ended: Sequence[int]) -> None:
        """Overwrite with zeros what running rows hold beyond their lengths, and all that ended rows
        hold: a masked NaN still spreads, since 0 × NaN is NaN.
        """

    def row_size(self) -> RowSize:
        """Bytes that a row takes, measured on a few tokens."""

    def allocated_bytes(self) -> int:
        """Bytes of tables that may have room for more rows, or longer ones, than there are; 0 where
        each row takes exactly what it needs.
        """

    def preallocate(self, rows: int, columns: int) -> None:
        """Make room for this many rows and columns at once, where shapes are static."""

    def shrink(self, columns: int) -> None:
        """Give back what the tables hold beyond the rows there are and this many columns."""


class JointCache(Protocol):
    """The rows of two models that one forward reads together.

    Attributes:
        first, second: the rows of each model; row r of both is row r of the batch.
    """

    @property
    def first(self) -> KVCache: ...

    @property
    def second(self) -> KVCache: ...

    def extend(
        self,
        tokens: tuple[Tensor, Tensor],
        counts: tuple[Sequence[int], Sequence[int]],
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        """Read more tokens of every row with both models; arguments of each as for
        `KVCache.extend`. Returns the raw logits of each model.
        """
