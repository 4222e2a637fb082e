"""Rows of a packed matrix, looked up where they lie.

Many models use one matrix twice: to look tokens up, and to multiply with at the output (tied
embeddings). Packed for the product it would have to be held plain as well; but oneDNN's layout is
a fixed order of the same numbers, and a row's numbers can be found in it.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor, nn

from baco.models.forward.packed_linear import PackedLinear, packed

# Rows that are compared at once.
_PIECE = 4096
# Whole numbers below it are exact in bfloat16, so that a number can tell a place, digit by digit.
_DIGIT = 255


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` on the weight of a packed linear layer.

    Args:
        head: the layer.
        rows, columns: a weight's place among the packed numbers is the sum of its row's and its
            column's, int64 [out] and [in].
    """

    def __init__(self, head: PackedLinear, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.head = head
        self.num_embeddings, self.embedding_dim = head.shape
        self._numbers, self._rows, self._columns = _numbers(head.packed), rows, columns

    @property
    def weight(self) -> Tensor:
        """The weight as it was, to look at."""
        return self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] → rows [..., in]."""
        return self._numbers[self._rows[ids][..., None] + self._columns]


def looked_up(head: PackedLinear, plain: Tensor) -> PackedEmbedding | None:
    """The embedding on a packed layer; None where its layout is not such an order of ``plain``."""
    try:
        made = PackedEmbedding(head, *_places(head.shape, head.dtype))
        ids = torch.arange(len(plain))
        same = all(torch.equal(made(some), plain[some]) for some in ids.split(_PIECE))
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None  # another build of torch, or another kind of layout
    return made if same else None


@cache
def _places(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The places of a matrix's first column and of its first row, the latter counted from there."""
    rows, columns = _line(shape, dtype, 0), _line(shape, dtype, 1)
    return rows, columns - columns[0]


def _line(shape: torch.Size, dtype: torch.dtype, dim: int) -> Tensor:
    """Where the first column (0) or row (1) of a matrix lies once it is packed."""
    plain = torch.zeros(shape, dtype=dtype)
    line = plain.select(1 - dim, 0)
    order, found, power = torch.arange(len(line)), torch.tensor(0), 1
    while power < len(line):
        line.copy_(order // power % _DIGIT + 1)
        made = packed(plain)
        numbers = _numbers(made)
        held = numbers.nonzero()[:, 0]
        found = found + (numbers[held].long() - 1) * power
        power *= _DIGIT
    return torch.empty_like(order).scatter_(0, found, held)


def _numbers(matrix: Tensor) -> Tensor:
    """All numbers of a packed matrix as they lie in memory, which it has to outlive."""
    size = torch.ops.mkldnn._nbytes(matrix)
    place = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(matrix))
    return torch.frombuffer(place, dtype=matrix.dtype)
