"""A low-rank adapter (LoRA, Hu et al. 2021) over a model that reads both prompts in one forward.

The weights are those of the base model. The adapter's product is added to the aligned prompt's
rows alone.
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import PPMissingLayer

from baco.backends.vllm.one_model import Split

_PREFIX = "base_model.model."  # PEFT's, before the name of a layer
_FILE = "adapter_model.safetensors"


class LowRank(nn.Module):
    """What an adapter adds to a linear layer: B A x, split over devices as the layer is.

    Args:
        layer: vLLM's, which may have several layers of the checkpoint side by side.
        parts: how many of those, in their order.
        rank: of the adapter in each.
    """

    def __init__(self, layer: LinearBase, parts: int, rank: int) -> None:
        super().__init__()
        self._parts, self._rank, width = parts, rank, parts * rank
        plain = {"bias": False, "return_bias": False}
        if isinstance(layer, RowParallelLinear):
            self.down = RowParallelLinear(
                layer.input_size, width, input_is_parallel=layer.input_is_parallel, **plain
            )
            self.up = ReplicatedLinear(width, layer.output_size, **plain)
        else:
            self.down = ReplicatedLinear(layer.input_size, width, **plain)
            if isinstance(layer, QKVParallelLinear):
                heads = (layer.head_size, layer.total_num_heads, layer.total_num_kv_heads)
                self.up = QKVParallelLinear(width, *heads, **plain)
            elif isinstance(layer, MergedColumnParallelLinear):
                self.up = MergedColumnParallelLinear(width, layer.output_sizes, **plain)
            elif isinstance(layer, ColumnParallelLinear):
                self.up = ColumnParallelLinear(width, layer.output_size, **plain)
            else:
                self.up = ReplicatedLinear(width, layer.output_size, **plain)
        for product in (self.down, self.up):
            product.weight.data.zero_()  # a layer of the checkpoint may have no adapter

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [T, in] → [T, out], both as they are on this device."""
        added: Tensor = self.up(self.down(rows))
        return added

    def load_down(self, part: int, weight: Tensor) -> None:
        """Load A of a part, [rank, in]."""
        if isinstance(self.down, RowParallelLinear):  # such layers have one part
            self.down.weight.weight_loader(self.down.weight, weight)
        else:
            self.down.weight.data[self._columns(part)] = weight.to(self.down.weight)

    def load_up(self, part: int, weight: Tensor) -> None:
        """Load scale · B of a part, [out, rank]."""
        whole = weight.new_zeros(weight.shape[0], self._parts * self._rank)
        whole[:, self._columns(part)] = weight
        shard: tuple[str | int, ...] = ()
        if self._parts > 1:
            shard = ("qkv"[part] if isinstance(self.up, QKVParallelLinear) else part,)
        self.up.weight.weight_loader(self.up.weight, whole, *shard)

    def _columns(self, part: int) -> slice:
        return slice(part * self._rank, (part + 1) * self._rank)


class Adapter(nn.Module):
    """All that an adapter adds to a model.

    Args:
        model: vLLM's model.
        folder: PEFT's files.
        split: where the rows of the aligned prompt begin.
    """

    def __init__(self, model: Any, folder: Path, split: Split) -> None:
        super().__init__()
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = config["r"]
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        self._scale = config["lora_alpha"] / root
        with safe_open(folder / _FILE, "pt") as file:
            adapted = {_layer_of(name)[0] for name in file.keys()}  # noqa: SIM118 - not a mapping
        packed = getattr(model, "packed_modules_mapping", {})
        self.layers = nn.ModuleList()
        self._parts: dict[str, tuple[LowRank, int]] = {}
        for name, layer in model.named_modules():
            parent, _, last = name.rpartition(".")
            names = [f"{parent}.{part}" for part in packed.get(last, [])]
            if adapted.isdisjoint(names):
                names = [name]
            if isinstance(layer, LinearBase) and not adapted.isdisjoint(names):
                added = LowRank(layer, len(names), rank)
                self.layers.append(added)
                self._parts |= {part: (added, index) for index, part in enumerate(names)}
                layer.register_forward_hook(partial(_add, added, split))
        elsewhere = tuple(  # on other pipeline stages
            f"{name}." for name, layer in model.named_modules() if isinstance(layer, PPMissingLayer)
        )
        unknown = [name for name in adapted - self._parts.keys() if not name.startswith(elsewhere)]
        if unknown:
            raise ValueError(f"the adapter {folder} changes {unknown[0]}, which vLLM's model lacks")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Sequence[str]:
        """Load the tensors of PEFT's file; return the names of all weights."""
        for name, weight in weights:
            layer, product = _layer_of(name)
            if layer not in self._parts:
                continue
            added, part = self._parts[layer]
            if product == "lora_A":
                added.load_down(part, weight)
            else:
                added.load_up(part, weight * self._scale)
        return [name for name, _ in self.named_parameters()]


def _layer_of(name: str) -> tuple[str, str]:
    """The layer that a tensor of PEFT's file is for, and ``lora_A`` or ``lora_B``."""
    layer, _, product = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    return layer, product


def _add(
    added: LowRank, split: Split, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Any
) -> None:
    """Add the adapter's product to the output of a layer, after its forward."""
    rows = output[0] if isinstance(output, tuple) else output
    aligned = inputs[0][split.tokens :]
    if len(aligned):
        rows[split.tokens :] += added(aligned)
