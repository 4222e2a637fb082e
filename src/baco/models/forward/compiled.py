"""The lean forward without Python in it: compiled for a CPU.

It pays where a model or its batch is small, so that starting operations costs more than what they
compute. Sums may be taken in another order than by the plain forward: tokens are the same up to
floating-point ties.
"""

from itertools import product

import torch
from torch import Tensor

from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.slots import SlotCache
from baco.models.forward.llama import LlamaForward

# Tokens of all rows up to which starting operations is most of what a forward costs.
_FEW = 16
# How many functions there may be: four for each shape of weights that was ever loaded.
_VARIANTS = 64
# What stands for any number above 1 while compiling. They differ from each other, and from the
# columns of the cache and of the rotations: equal sizes would be taken for one and the same.
_ROWS, _TOKENS = 2, 3


class CompiledForward:
    """A lean forward through `torch.compile`, where a few tokens are read; others are read plainly.

    One row and one token are shapes of their own, all other sizes stay open: four functions serve
    every length, draft and batch.

    Args:
        lean: the plain forward.
    """

    def __init__(self, lean: LlamaForward) -> None:
        self._lean = lean
        self._read = torch.compile(lean.read, fullgraph=True)

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; the raw logits after the last ``keep`` of them."""
        rows, span = tokens.shape
        one = cache.columns == 1  # a prompt of one token
        if one or rows * span > _FEW or not self._lean.multiplies(span):
            return self._lean(tokens, cache, keep)
        tokens = tokens.clone(memory_format=torch.contiguous_format)  # its strides count as well
        tokens, columns, rotations, keys, values = self._lean.inputs(tokens, cache)
        keys, values = [table[:rows] for table in keys], [table[:rows] for table in values]
        for table in (tokens, columns):
            _leave_open(table, 0, 1)
        for table in rotations:
            _leave_open(table, 0)
        for table in (*keys, *values):
            _leave_open(table, 0, 2)
        # Torch keeps its settings for each thread, and a server decodes in another than it loads.
        if torch._dynamo.config.recompile_limit < _VARIANTS:  # noqa: PLR1730 (reads cost less)
            torch._dynamo.config.recompile_limit = _VARIANTS
        return self._read(tokens, columns, rotations, keys, values, 0)[:, -keep:]

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile all that there is to compile; whatever the compiler raises where it cannot."""
        for rows, span in product((1, _ROWS), (1, _TOKENS)):
            store = BatchedKVCache(self)
            store.copy_prefix(None, rows)
            store.cache.reserve(rows, span)
            self._lean.rotations(2 * store.cache.columns)
            store.extend(torch.zeros(rows, span, dtype=torch.int64), [span] * rows, span)


def _leave_open(table: Tensor, *dims: int) -> None:
    """Compile for any size of these dimensions, where it is not 1."""
    for dim in dims:
        if table.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(table, dim)
