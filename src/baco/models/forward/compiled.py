"""Experimental: a `DenseForward` compiled for a CPU.

It pays where a model or its batch is small, so that launching operations costs more than computing
them. Sums may be taken in another order than by the plain forward: tokens are the same up to
floating-point ties.
"""

from itertools import product

import torch
from torch import Tensor

from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.slots import SlotCache
from baco.models.forward.dense import DenseForward

# Tokens of all rows up to which launching operations is most of a forward's cost.
_MAX_TOKENS = 16
# The limit of compiled functions: four for each shape of weights that was ever loaded.
_MAX_VARIANTS = 64
# Sizes that stand for any number above 1 while compiling. They differ from each other and from the
# columns of the cache and of the rotations: torch would take equal sizes for one and the same.
_ROWS, _TOKENS = 2, 3


class CompiledForward:
    """A `DenseForward` through `torch.compile`, where few tokens are read; else the plain one.

    One row and one token are shapes of their own, all other sizes are dynamic: four functions serve
    every length, draft and batch.

    Args:
        forward: the plain forward.
    """

    def __init__(self, forward: DenseForward) -> None:
        self._plain = forward
        self._read = torch.compile(forward.read, fullgraph=True)

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; return the raw logits after the last ``keep``."""
        rows, span = tokens.shape
        one_column = cache.columns == 1  # a prompt of one token
        is_short = rows * span <= _MAX_TOKENS and self._plain.uses_plain_products(span)
        if one_column or not is_short or any(cache.plan.long):
            return self._plain(tokens, cache, keep)
        tokens = tokens.clone(memory_format=torch.contiguous_format)  # strides are compiled in too
        tokens, columns, rotations, keys, values = self._plain.inputs(tokens, cache)
        keys, values = [table[:rows] for table in keys], [table[:rows] for table in values]
        for table in (tokens, columns):
            _mark_dynamic(table, 0, 1)
        for table in rotations.values():
            _mark_dynamic(table, 0)
        for table in (*keys, *values):
            _mark_dynamic(table, 0, 2)
        # Torch keeps its settings per thread, and a server decodes in another thread than it loads.
        if torch._dynamo.config.recompile_limit < _MAX_VARIANTS:  # noqa: PLR1730 (reads cost less)
            torch._dynamo.config.recompile_limit = _MAX_VARIANTS
        return self._read(tokens, columns, rotations, keys, values, 0)[:, -keep:]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile all functions; raises whatever the compiler raises."""
        for rows, span in product((1, _ROWS), (1, _TOKENS)):
            cache = BatchedKVCache(self)
            cache.copy_prefix(None, rows)
            cache.cache.reserve(rows, span)
            self._plain.rotations(2 * cache.cache.columns)
            cache.extend(torch.zeros(rows, span, dtype=torch.int64), [span] * rows, span)


def _mark_dynamic(table: Tensor, *dims: int) -> None:
    """Compile for any size of these dimensions that is not 1 here."""
    for dim in dims:
        if table.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(table, dim)
