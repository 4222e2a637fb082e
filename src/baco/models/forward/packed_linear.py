"""Weights in the layout that a CPU's matrix kernels read.

Decoding multiplies a few rows with every weight of a model, so it is as fast as weights can be
read. oneDNN reads them in blocks; given a plain matrix it rearranges the matrix at every call,
which takes longer than the product. Here that is done once, at load, in place of the plain matrix:
nothing large is held twice. The numbers stay the same; sums may be taken in another order.

Many models use one matrix twice: for the embedding, and for the product at the output (tied
embeddings). oneDNN's layout is a fixed order of the same numbers, so `PackedEmbedding` finds the
numbers of a row in the packed matrix.
"""

import ctypes
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

# Rows that the layout is chosen for: a few draft tokens, or samples.
_ROWS = 8
# Up to this many weights in float32, a plain product of few rows with a transposed matrix is
# faster: a product in the packed layout takes longer to start.
_SMALL = 3 * 2**16
# From this many multiplications the packed layout is faster all the same where MKL, which computes
# plain products, uses half of the vector units. Such a weight is held in both layouts.
_MANY = 2**19
# oneDNN compiles kernels for each number of rows: 3 MB for a model of 0.2 B parameters, which takes
# as long as a forward. Drafts and leaving rows produce all numbers, so rows are padded: numbers up
# to this one are multiplied as they are; above it, there are half as many sizes per doubling.
_SIZES = 16
# A tied matrix whose rows cannot be found in the packed layout must be kept plain too; the packed
# copy beside it may take no larger share of the model's weights than this.
_MAX_COPY = 0.05
# Rows of an embedding that are compared at once, and at most in all: blocks of rows are alike.
_COMPARED, _MAX_COMPARED = 4096, 16_384
# Rows from which the places of all rows are known: a whole number of blocks of any layout, twice.
_FEW = 1024
# Whole numbers below it are exact in bfloat16, so that a number can encode a place digit by digit.
_DIGIT = 255


# `torch.compile` refuses the packed product unless it packs the weights itself, once for each of
# its functions. It accepts the product as an operator of ours.
_library = torch.library.Library("baco", "DEF")
_library.define("packed_linear(Tensor rows, Tensor packed, Tensor? bias, int columns) -> Tensor")


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    size = flat.shape[0]
    padding = rounded(size) - size
    if padding:
        flat = F.pad(flat, (0, 0, 0, padding))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    if padding:
        product = product[:size]
    return product.view(*rows.shape[:-1], columns)


def rounded(rows: int) -> int:
    """The number of rows that ``rows`` are padded to for a product."""
    step = max(1, (1 << (rows - 1).bit_length()) // _SIZES)
    return -(-rows // step) * step


_library.impl("packed_linear", _multiply, "MkldnnCPU")


def _output_shape(rows: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:  # noqa: ARG001
    return rows.new_empty(*rows.shape[:-1], columns)


torch.library.register_fake("baco::packed_linear", _output_shape, lib=_library)
_opaque = torch.ops.baco.packed_linear.default


class _Unpacked(Tensor):
    """A packed weight in its plain layout; its numbers are unpacked by each operation on it."""

    _packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, shape: torch.Size) -> Self:
        weight: Self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=packed.dtype, device=packed.device
        )
        weight._packed = packed
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        args, kwargs = tree_map_only(cls, lambda weight: weight._packed.to_dense(), given)
        return func(*args, **kwargs)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight.

    Attributes:
        packed: the weight in oneDNN's own layout.
        plain: the weight, transposed, where it is small and in float32: [in, out].
        shape: of the weight, (out, in).
        sample: the first numbers of the plain weight, for a fingerprint.
        bias: as in ``nn.Linear``.

    Args:
        linear: the layer to replace.
        shared: its weight is also an embedding, which then reads the packed weight.
    """

    def __init__(self, linear: nn.Linear, *, shared: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        small = weight.dtype == torch.float32 and weight.numel() <= _SMALL and not shared
        self.plain = weight.t().contiguous() if small else None
        # Numbers of input below which the plain product is faster.
        self._few = _MANY / weight.shape[0] if small and mkl_is_slow() else math.inf
        self.packed = torch.empty(0) if small and self._few == math.inf else _packed(weight)
        self.shape, self.dtype = weight.shape, weight.dtype
        self.sample = weight.flatten()[:4].clone()
        self.bias = linear.bias

    @property
    def layouts(self) -> int:
        """In how many layouts the weight is held."""
        return (self.plain is not None) + (self.packed.numel() > 0)

    @property
    def weight(self) -> Tensor:
        """The weight in its plain layout, unpacked where its numbers are read. Some models read its
        dtype at every forward.
        """
        return _Unpacked(self.packed, self.shape) if self.plain is None else self.plain.t()

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [..., in] → [..., out]."""
        compiling = torch.compiler.is_compiling()
        if self.plain is not None and (compiling or rows.numel() < self._few):
            if rows.dim() == 2 and self.bias is None:
                return torch.mm(rows, self.plain)  # starts sooner
            return F.linear(rows, self.plain.t(), self.bias)
        if compiling:
            product: Tensor = _opaque(rows, self.packed, self.bias, self.out_features)
            return product
        return _multiply(rows, self.packed, self.bias, self.out_features)


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` on the weight of a packed linear layer.

    Attributes:
        scale: what embeddings are multiplied with (Gemma); None for nothing.

    Args:
        head: the layer.
        rows, columns: the place of a weight among the packed numbers is the sum of its row's and
            its column's, int64 [out] and [in].
    """

    def __init__(self, head: PackedLinear, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.head = head
        self.scale: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.num_embeddings, self.embedding_dim = head.shape
        self._numbers, self._rows, self._columns = _numbers(head.packed), rows, columns

    @property
    def weight(self) -> Tensor:
        """The weight in its plain layout, for inspection."""
        return self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] → rows [..., in]."""
        rows = self._numbers[self._rows[ids][..., None] + self._columns]
        return rows if self.scale is None else rows * self.scale


def pack(model: nn.Module) -> None:
    """Pack every plain linear layer of a model on a CPU, in place; others stay as they are.

    Quantised layers and subclasses of ``nn.Linear`` have kernels of their own.
    """
    if not torch.backends.mkldnn.is_available():
        return
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _is_packable(child.weight)
    ]
    total = sum(weight.numel() for weight in model.parameters())
    users: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users[id(weight)] = users.get(id(weight), 0) + 1
    done: dict[int, PackedLinear] = {}
    while linears:
        parent, name, child = linears.pop()  # so that the plain weight is freed at once
        tied = users[id(child.weight)] > 1
        layer = done.get(id(child)) or PackedLinear(child, shared=tied)
        shared = tied and not _replace_embedding(model, child.weight, layer)
        if not shared or child.weight.numel() <= _MAX_COPY * total:
            setattr(parent, name, done.setdefault(id(child), layer))
    for weight in model.parameters():
        if type(weight.data) is Tensor and weight.device.type == "cpu":
            # A weight that stays plain is a view of the file and would keep all of it in memory.
            weight.data = weight.data.clone()


def _replace_embedding(model: nn.Module, weight: Tensor, layer: PackedLinear) -> bool:
    """Let the one embedding with this weight read the packed layer; False where it cannot."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Embedding) and child.weight is weight
    ]
    if len(places) != 1:
        return False
    embedding = _packed_embedding(layer, weight.detach())
    if embedding is None:
        return False
    parent, name = places[0]
    plain = getattr(parent, name)
    scale = getattr(plain, "embed_scale", None)
    if isinstance(scale, Tensor):
        embedding.scale = scale.to(weight.dtype)
    # A class of its own may do something else with the rows.
    if type(plain) is not nn.Embedding and not _embed_alike(plain, embedding):
        return False
    setattr(parent, name, embedding)
    return True


@torch.inference_mode()
def _embed_alike(plain: nn.Embedding, packed: PackedEmbedding) -> bool:
    ids = torch.arange(min(_COMPARED, plain.num_embeddings))
    rows: Tensor = plain(ids)
    return torch.equal(rows, packed(ids))


def _packed_embedding(head: PackedLinear, plain: Tensor) -> PackedEmbedding | None:
    """The embedding on a packed layer; None where its layout is no fixed order of ``plain``."""
    try:
        embedding = PackedEmbedding(head, *_places(head.shape, head.dtype))
        ids = torch.linspace(0, len(plain) - 1, min(len(plain), _MAX_COMPARED)).long()
        chunks = ids.split(_COMPARED)
        equal = all(torch.equal(embedding(chunk), plain[chunk]) for chunk in chunks)
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return None  # another build of torch, or another kind of layout
    return embedding if equal else None


@cache
def _places(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The places of a matrix's first column, and of its first row relative to its first number."""
    sample_shape = torch.Size((min(shape[0], _FEW), shape[1]))
    rows, columns = _line_places(sample_shape, dtype, 0), _line_places(sample_shape, dtype, 1)
    period = _FEW // 2
    if shape[0] > _FEW:
        blocks = torch.arange(-(-shape[0] // period))[:, None]
        rows = (rows[:period] + blocks * (rows[period] - rows[0])).flatten()[: shape[0]]
    return rows, columns - columns[0]


def _line_places(shape: torch.Size, dtype: torch.dtype, dim: int) -> Tensor:
    """The places of a matrix's first column (0) or first row (1) once it is packed.

    The line is filled with the digits of its indices, one packing per digit.
    """
    plain = torch.zeros(shape, dtype=dtype)
    line = plain.select(1 - dim, 0)
    order, index, power = torch.arange(len(line)), torch.tensor(0), 1
    while power < len(line):
        line.copy_(order // power % _DIGIT + 1)
        packed = _packed(plain)
        numbers = _numbers(packed)
        places = numbers.nonzero()[:, 0]
        index = index + (numbers[places].long() - 1) * power
        power *= _DIGIT
    return torch.empty_like(order).scatter_(0, index, places)


def _numbers(matrix: Tensor) -> Tensor:
    """All numbers of a packed matrix in memory order; valid only as long as the matrix exists."""
    size = torch.ops.mkldnn._nbytes(matrix)
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(matrix))
    return torch.frombuffer(memory, dtype=matrix.dtype)


@cache
def mkl_is_slow() -> bool:
    """Does MKL leave half of the processor's vector units unused?"""
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("avx512_f")) and "Intel" not in processor.get("cpu_name", "")


def _packed(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return packed


def _is_packable(weight: Tensor) -> bool:
    if type(weight.data) is not Tensor or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def weights(model: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Every weight of a model once, packed or not: its first numbers, its size, its bytes."""
    seen: set[int] = set()
    for module in model.modules():
        yield from own_weights(module, seen)


def own_weights(module: nn.Module, seen: set[int]) -> Iterator[tuple[Tensor, int, int]]:
    """As `weights`, of one module without its children, except weights in ``seen``."""
    if isinstance(module, PackedLinear):
        size = module.shape.numel()
        yield module.sample, size, size * module.dtype.itemsize * module.layouts
    for weight in module.parameters(recurse=False):
        if id(weight) not in seen:
            seen.add(id(weight))
            plain = type(weight.data) is Tensor and not weight.is_meta
            sample = weight.data.flatten()[:4] if plain else torch.empty(0)
            yield sample, weight.numel(), _stored_bytes(weight.data)


def _stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes; a quantised one consists of several tensors."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()
    return sum(_stored_bytes(getattr(weight, name)) for name in names)
