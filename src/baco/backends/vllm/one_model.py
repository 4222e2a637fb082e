"""One model under two prompts: its weights are held once, and one forward reads both prompts."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Split:
    """How many tokens of the current forward are the base prompt's; the others are the aligned
    prompt's. All layers of a model share it.
    """

    tokens: int = 0


class TwoPromptAttention(nn.Module):
    """In place of a model's attention layer: each prompt's tokens attend with a KV cache of their
    own.

    vLLM identifies a layer's KV cache by the layer's name. ``aligned`` is ``base`` under another
    name; it has no weights of its own.
    """

    def __init__(self, base: Attention, aligned: Attention, split: Split) -> None:
        super().__init__()
        self.base, self.aligned, self._split = base, aligned, split

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As vLLM's layer: [T, …] of the base prompt, then of the aligned one → [T, …]."""
        first = self._split.tokens
        parts = []
        for attention, rows in ((self.base, slice(first)), (self.aligned, slice(first, None))):
            if len(query[rows]):  # not every kernel accepts an empty batch
                parts.append(attention(query[rows], key[rows], value[rows], *args, **kwargs))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def has_plain_attention(model: nn.Module) -> bool:
    """Are all layers with a KV cache vLLM's ordinary attention?"""
    caches = [layer for layer in model.modules() if isinstance(layer, AttentionLayerBase)]
    return all(type(layer) is Attention for layer in caches)


def split_attention(model: nn.Module, vllm_config: "VllmConfig") -> Split:
    """Give a model's attention layers a second KV cache each, for the aligned prompt.

    The names of its layers begin with ``base``.
    """
    split = Split()
    known = vllm_config.compilation_config.static_forward_context
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                aligned = copy.copy(child)
                aligned.impl = copy.copy(child.impl)
                for layer in (aligned, aligned.impl):
                    for attribute in ("layer_name", "kv_sharing_target_layer_name"):
                        own = getattr(layer, attribute, None)
                        if own is not None:
                            setattr(layer, attribute, _aligned_name(own))
                known[aligned.layer_name] = aligned
                setattr(parent, name, TwoPromptAttention(child, aligned, split))
    return split


def _aligned_name(layer: str) -> str:
    return layer.replace("base.", "aligned.", 1)
