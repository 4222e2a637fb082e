"""Linear layers that read the same input, fused: one product of many columns is faster than three.

Each of them is replaced by a `Part` of the fused layer; no weight is held twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baco.models.forward.packed_linear import PackedLinear

# The layers of a Llama-like block that read the same input, by the module that holds them.
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


class Part(nn.Module):
    """Some columns of a fused layer's output, in place of the layer that computed them.

    Attributes:
        whole: the fused layer.
        start, stop: the columns.
    """

    def __init__(self, whole: nn.Linear, start: int, stop: int) -> None:
        super().__init__()
        self.whole: nn.Linear | PackedLinear = whole
        self.start, self.stop = start, stop
        self.in_features, self.out_features = whole.in_features, stop - start

    @property
    def weight(self) -> Tensor:
        """The weight of these columns: a view, or a copy where the fused layer is packed."""
        weight: Tensor = self.whole.weight
        return weight[self.start : self.stop]

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [..., in] → [..., out]."""
        if isinstance(self.whole, PackedLinear):
            return self.whole.forward(rows)[..., self.start : self.stop]
        bias = self.whole.bias
        return F.linear(rows, self.weight, None if bias is None else bias[self.start : self.stop])


def fuse(parent: nn.Module, names: Sequence[str]) -> bool:
    """Fuse the plain linear layers ``names`` of a module; False where they differ in kind."""
    layers = [getattr(parent, name) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    if not all(type(layer.weight.data) is Tensor for layer in layers):
        return False  # quantised
    kinds = {(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}
    if len(kinds) > 1 or len({layer.bias is None for layer in layers}) > 1:
        return False
    columns = sum(layer.out_features for layer in layers)
    bias = layers[0].bias is not None
    whole = nn.Linear(layers[0].in_features, columns, bias=bias, device="meta")
    for name in ("weight", "bias"):
        if getattr(layers[0], name) is not None:
            joined = torch.cat([getattr(layer, name).detach() for layer in layers])
            setattr(whole, name, nn.Parameter(joined, requires_grad=False))
    start = 0
    for name, layer in zip(names, layers, strict=True):
        setattr(parent, name, Part(whole, start, start + layer.out_features))
        start += layer.out_features
    return True
