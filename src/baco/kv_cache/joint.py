"""A KV cache for the rows of two models that one forward reads together: `JointKVCache`.

Both models' keys and values are in the same tables, since attention reads adjacent rows without a
copy. The first model's rows are before the middle in descending order, the second one's behind it
in ascending order. So each model's rows are adjacent alone, and together, however many there are.
"""

from collections.abc import Sequence

from torch import Tensor

from baco.kv_cache.batched import CPU_CHUNK, BatchedKVCache, Forward, extend_adjacent
from baco.kv_cache.slots import SlotCache


class _SharedTables:
    """The tables, and the rows and columns that each model needs of them."""

    def __init__(self) -> None:
        self.cache = SlotCache(0, 0, centred=True)
        self._needs = [(0, 0), (0, 0)]

    def _set(self, model: int, rows: int, columns: int) -> tuple[int, int]:
        """Note what a model needs; returns the rows and columns that the tables need for both."""
        self._needs[model] = rows, columns
        most_rows, most_columns = (max(numbers) for numbers in zip(*self._needs, strict=True))
        return 2 * most_rows, most_columns

    def reserve(self, model: int, rows: int, columns: int) -> None:
        self.cache.reserve(*self._set(model, rows, columns))

    def shrink(self, model: int, rows: int, columns: int) -> None:
        self.cache.shrink(*self._set(model, rows, columns))

    def drop(self, model: int, rows: int) -> None:
        most_rows, _ = self._set(model, rows, self._needs[model][1] if rows else 0)
        if not most_rows:
            self.cache = SlotCache(0, 0, centred=True)


class _ModelTables:
    """The rows of one model in shared tables."""

    models = 2

    def __init__(self, shared: _SharedTables, model: int) -> None:
        self._shared, self._model, self.reverse = shared, model, model == 0

    @property
    def cache(self) -> SlotCache:
        return self._shared.cache

    def first(self, rows: int) -> int:
        middle = self.cache.rows // 2
        return middle - rows if self.reverse else middle

    def reserve(self, rows: int, columns: int) -> None:
        self._shared.reserve(self._model, rows, columns)

    def shrink(self, rows: int, columns: int) -> None:
        self._shared.shrink(self._model, rows, columns)

    def drop(self, rows: int) -> None:
        self._shared.drop(self._model, rows)


class JointKVCache:
    """The rows of two models, read by either alone or by both in one forward.

    Attributes:
        first, second: the rows of each model; row r of both is row r of the batch.

    Args:
        forwards: of each model alone.
        together: of both: it reads rows of the first model before rows of the second, as
            ``ForwardPlan.split`` says.
        shares, chunk: as in `BatchedKVCache`.
    """

    def __init__(
        self,
        forwards: tuple[Forward, Forward],
        together: Forward,
        *,
        shares: bool = False,
        chunk: int = CPU_CHUNK,
    ) -> None:
        shared = _SharedTables()
        self.first, self.second = (
            BatchedKVCache(forward, tables=_ModelTables(shared, model), shares=shares, chunk=chunk)
            for model, forward in enumerate(forwards)
        )
        self._together = together

    def extend(
        self,
        tokens: tuple[Tensor, Tensor],
        counts: tuple[Sequence[int], Sequence[int]],
        keep: int,
    ) -> tuple[Tensor, Tensor]:
        """Read more tokens of every row with both models, in one forward.

        Args:
            tokens, counts, keep: of each model, as for `KVCache.extend`; both [B, T].

        Returns:
            The raw logits of each model.
        """
        caches = (self.first, self.second)
        first, second = extend_adjacent(caches, self._together, tokens, counts, keep)
        return first, second
