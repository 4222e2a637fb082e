"""A layer of Llama and of its closest relatives: norms and linear layers.

It knows where `transformers` keeps them (`LAYOUTS`). It knows nothing of caches or positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Linear = Callable[[Tensor], Tensor]
# Kinds of rotary embeddings whose rotation depends on the position alone.
_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of a block's norms; None where it has no such norm."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


_NORM_FIRST = Layout()
_NORM_LAST = Layout(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
LAYOUTS = {
    "LlamaForCausalLM": _NORM_FIRST,
    "MistralForCausalLM": _NORM_FIRST,
    "Qwen2ForCausalLM": _NORM_FIRST,
    "Qwen3ForCausalLM": _NORM_FIRST,
    "Olmo2ForCausalLM": _NORM_LAST,
}


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square normalisation (Zhang and Sennrich 2019) over the last ``len(weight)``.

    Attributes:
        weight: multiplied with afterwards.
        epsilon: added to the mean of squares.
        by_length: both rescaled for the vector's length instead of the mean, in float32 on a CPU.
    """

    weight: Tensor
    epsilon: float
    by_length: tuple[Tensor, Tensor] | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        if self.by_length is None or torch.compiler.is_compiling():
            return F.rms_norm(rows, self.weight.shape, self.weight, self.epsilon)
        # Half as many operations as torch's own.
        scaled, floor = self.by_length
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        return (rows / torch.hypot(length, floor)).mul_(scaled)

    @classmethod
    def of(cls, parent: nn.Module, name: str | None) -> Self | None:
        """The norm ``name`` of a module; None where there is none."""
        module: Any = getattr(parent, name, None) if name else None
        if module is None:
            return None
        weight, epsilon = module.weight.detach(), module.variance_epsilon
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return cls(weight, epsilon)
        size = len(weight)
        return cls(weight, epsilon, (weight * size**0.5, torch.tensor((size * epsilon) ** 0.5)))


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: its norms and linear layers; ``qkv`` and ``gate_up`` are fused."""

    before_attention: Norm | None
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    out: Linear
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: Linear
    down: Linear
    after_mlp: Norm | None

    @classmethod
    def of(cls, block: Any, layout: Layout) -> Self:
        """A layer of a model whose linear layers were fused."""
        attention, mlp = block.self_attn, block.mlp
        return cls(
            Norm.of(block, layout.before_attention),
            attention.q_proj.whole.forward,
            Norm.of(attention, "q_norm"),
            Norm.of(attention, "k_norm"),
            attention.o_proj.forward,
            Norm.of(block, layout.after_attention),
            Norm.of(block, layout.before_mlp),
            mlp.gate_proj.whole.forward,
            mlp.down_proj.forward,
            Norm.of(block, layout.after_mlp),
        )


def layout_of(model: Any) -> Layout | None:
    """The layout of a model; None where `DenseForward` does not support the model."""
    layout, config = LAYOUTS.get(type(model).__name__), model.config
    if layout is None or config.hidden_act != "silu":
        return None
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return None
    layers = getattr(config, "layer_types", None)
    windowed = set(layers) != {"full_attention"} if layers else _window(config) is not None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return None if windowed or rope not in _ROPES else layout


def _window(config: Any) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    return window if getattr(config, "use_sliding_window", True) else None
