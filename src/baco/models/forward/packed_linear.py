"""Weights laid out the way a CPU's matrix kernels read them.

Decoding multiplies a few rows with every weight of a model, so it runs as fast as weights can be
read. oneDNN reads them in blocks; handed a plain matrix it rearranges it at every call, which takes
longer than the product. Here that is done once, at load, in the place of the plain matrix: nothing
large is held twice. Numbers stay what they are, sums may be taken in another order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Rows a product is laid out for: a handful of drafted tokens, or of samples.
_ROWS = 8
# Up to so many weights in float32 a plain product, by a matrix that lies turned round, is the
# faster: one in the packed layout takes longer to start.
_SMALL = 3 * 2**16
# For every number of rows oneDNN writes kernels of its own: 3 MB for a model of 0.2 B parameters,
# which takes as long as a forward. Drafts and leaving rows bring all numbers about, so rows are
# filled up: numbers up to this one are multiplied as they are, above it half as many in a doubling.
_SIZES = 16
# A matrix that is also looked up in (tied embeddings), and cannot be where it is packed, has to be
# kept as it is too; a packed copy beside it may take no more of the model's weights than this.
_LARGEST_COPY = 0.05


# `torch.compile` refuses the packed product unless it lays the weights out itself, once for each of
# its functions. Under a name of our own it takes it as it is.
_library = torch.library.Library("baco", "DEF")
_library.define("packed_linear(Tensor rows, Tensor packed, Tensor? bias, int columns) -> Tensor")


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    size = len(flat)
    if rounded(size) > size:
        flat = F.pad(flat, (0, 0, 0, rounded(size) - size))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    return product[:size].view(*rows.shape[:-1], columns)


def rounded(rows: int) -> int:
    """As many rows as are multiplied in the place of so many."""
    step = max(1, (1 << (rows - 1).bit_length()) // _SIZES)
    return -(-rows // step) * step


_library.impl("packed_linear", _multiply, "MkldnnCPU")


def _shaped(rows: Tensor, packed: Tensor, bias: Tensor | None, columns: int) -> Tensor:  # noqa: ARG001
    return rows.new_empty(*rows.shape[:-1], columns)


torch.library.register_fake("baco::packed_linear", _shaped, lib=_library)
_opaque = torch.ops.baco.packed_linear.default


class PackedLinear(nn.Module):
    """A linear layer on a packed weight.

    Attributes:
        plain: the weight, where it is small and in float32; its columns lie in one piece.
        packed: else the weight in oneDNN's own layout.
        shape: of the weight, (out, in).
        sample: its first numbers as they were, to know it by.
        bias: as in ``nn.Linear``.

    Args:
        linear: the layer as it was.
        shared: its weight is also looked up in, where it is packed.
    """

    def __init__(self, linear: nn.Linear, *, shared: bool = False) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        small = weight.dtype == torch.float32 and weight.numel() <= _SMALL and not shared
        self.plain = weight.t().contiguous().t() if small else None
        self.packed = torch.empty(0) if small else packed(weight)
        self.shape, self.dtype = weight.shape, weight.dtype
        self.sample = weight.flatten()[:4].clone()
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The weight as it was, to look at."""
        plain: Tensor = torch.Tensor.to_dense(self.packed) if self.plain is None else self.plain
        return plain

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [..., in] → [..., out]."""
        if self.plain is not None:
            return F.linear(rows, self.plain, self.bias)
        if torch.compiler.is_compiling():
            product: Tensor = _opaque(rows, self.packed, self.bias, self.out_features)
            return product
        return _multiply(rows, self.packed, self.bias, self.out_features)


def packed(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's own layout."""
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return made


def pack(model: nn.Module) -> None:
    """Pack every plain linear layer of a model on a CPU, in place; others are left as they are.

    Quantised layers, and those of a class of their own, have kernels of their own.
    """
    if not torch.backends.mkldnn.is_available():
        return
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and _packable(child.weight)
    ]
    total = sum(weight.numel() for weight in model.parameters())
    users: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            users[id(weight)] = users.get(id(weight), 0) + 1
    done: dict[int, PackedLinear] = {}
    while linears:
        parent, name, child = linears.pop()  # so that the plain weight goes as soon as it may
        tied = users[id(child.weight)] > 1
        layer = done.get(id(child)) or PackedLinear(child, shared=tied)
        shared = tied and not _shares(model, child.weight, layer)
        if not shared or child.weight.numel() <= _LARGEST_COPY * total:
            setattr(parent, name, done.setdefault(id(child), layer))
    for weight in model.parameters():
        if type(weight.data) is Tensor and weight.device.type == "cpu":
            # What stays plain is a view of the file, all of which it would keep in memory.
            weight.data = weight.data.clone()


def _shares(model: nn.Module, weight: Tensor, layer: PackedLinear) -> bool:
    """Let the one embedding that a weight is also for look it up where it is packed."""
    from baco.models.forward.packed_embedding import looked_up  # it stands on this module

    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Embedding and child.weight is weight
    ]
    if len(places) != 1:
        return False
    embedding = looked_up(layer, weight.detach())
    if embedding is None:
        return False
    parent, name = places[0]
    setattr(parent, name, embedding)
    return True


def _packable(weight: Tensor) -> bool:
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
    """As `weights`, of one module without those inside it; ``seen`` holds what was there before."""
    if isinstance(module, PackedLinear):
        size = module.shape.numel()
        yield module.sample, size, size * module.dtype.itemsize
    for weight in module.parameters(recurse=False):
        if id(weight) not in seen:
            seen.add(id(weight))
            plain = type(weight.data) is Tensor and not weight.is_meta
            few = weight.data.flatten()[:4] if plain else torch.empty(0)
            yield few, weight.numel(), _stored(weight.data)


def _stored(weight: Tensor) -> int:
    """Bytes that a weight takes; a quantised one is made of several tensors."""
    if not is_traceable_wrapper_subclass(weight):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()
    return sum(_stored(getattr(weight, name)) for name in names)
