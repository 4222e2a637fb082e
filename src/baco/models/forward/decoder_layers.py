"""The layers of a decoder-only transformer, and how architectures differ in them.

`describe` reads the differences off a model's modules and configuration: norms, biases, fused
projections, rotary embeddings, windows, multipliers, soft caps. It needs no table of architectures,
so a new one that is made of the same parts is understood as well. One with other parts or
parameters is not. Nothing here knows caches.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baco.models.forward.fused_linear import FUSED, Part, fuse
from baco.models.rope import LongRope

Linear = Callable[[Tensor], Tensor]
# Kinds of rotary embeddings whose rotation depends on the position alone, and LongRoPE.
_ROPES = {"default", "linear", "llama3", "yarn", "longrope"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
# The norms of a layer in `transformers`: before attention, after it, before the MLP, after it.
_NORMS: tuple[tuple[str | None, ...], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
_HEAD_NORMS = {"q_norm", "k_norm"}
_ACTIVATIONS = ("act_fn", "activation_fn")
_MLPS = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


@dataclass(frozen=True, slots=True)
class LayerDescription:
    """How one layer differs from others.

    Attributes:
        norms: names of its norms before attention, after it, before the MLP and after it; None
            where it has no such norm.
        rope: the kind of layer whose rotary embedding it uses, "" where all use the same; None
            where queries and keys are not rotated.
        window: the last tokens that a token attends to, itself included; None for all.
    """

    norms: tuple[str | None, ...]
    rope: str | None
    window: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Description:
    """How a model differs from other decoder-only transformers.

    Attributes:
        decoder: its module of embeddings and layers.
        layers: the description of each layer.
        heads, key_heads, width: of attention.
        scale, softcap: of attention scores. Capped scores are softcap * tanh(scores / softcap).
        embedding_multiplier, residual_multiplier, logits_divisor: of embeddings, of what a layer
            adds to its input, and of logits.
        logits_softcap: as ``softcap``.
    """

    decoder: Any
    layers: tuple[LayerDescription, ...]
    heads: int
    key_heads: int
    width: int
    scale: float
    softcap: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logits_divisor: float
    logits_softcap: float | None


def describe(model: Any) -> Description | str:
    """The description of a model; where `DenseForward` does not support it, the reason in a few
    words, as the predicate of a sentence.
    """
    try:
        return _described(model)
    except _NotSupportedError as error:
        return str(error)
    except AttributeError as error:
        return f"is built in another way ({error})"


class _NotSupportedError(Exception):
    """A model does something that is not supported."""


def _described(model: Any) -> Description:
    if hasattr(model, "peft_config"):
        raise _NotSupportedError("has an adapter")
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise _NotSupportedError("is on several devices")
    decoder = model.get_decoder()
    _check_parts(decoder, _DECODER)
    if type(model.lm_head).__name__ not in ("Linear", "PackedLinear"):
        raise _NotSupportedError("has another kind of head")
    long_rope = LongRope.of(model)
    if long_rope is not None and long_rope.modules != (decoder.rotary_emb,):
        raise _NotSupportedError("has several rotary embeddings whose factors depend on the length")
    config, layers = decoder.config, list(decoder.layers)
    attention = layers[0].self_attn
    for layer in layers:
        _check_layer(layer)
    for name, values in {
        "scale": {layer.self_attn.scaling for layer in layers},
        "soft cap": {getattr(layer.self_attn, "attn_logit_softcapping", None) for layer in layers},
        "width of heads": {layer.self_attn.head_dim for layer in layers},
        "multiplier": {getattr(layer, "residual_multiplier", 1.0) for layer in layers},
    }.items():
        if len(values) > 1:
            raise _NotSupportedError(f"has layers that differ in their {name}")
    return Description(
        decoder=decoder,
        layers=tuple(_described_layers(decoder)),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        width=attention.head_dim,
        scale=float(attention.scaling),
        softcap=getattr(attention, "attn_logit_softcapping", None),
        embedding_multiplier=float(getattr(decoder, "embedding_multiplier", 1.0)),
        residual_multiplier=float(getattr(layers[0], "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(config, "logits_scaling", 1.0)),
        logits_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _described_layers(decoder: Any) -> Iterable[LayerDescription]:
    config, rope_types = decoder.config, decoder.rotary_emb.rope_type
    count = len(decoder.layers)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [_SLIDING if window else _FULL] * count
    for layer, kind in zip(decoder.layers, kinds, strict=True):
        if kind not in (_FULL, _SLIDING):
            raise _NotSupportedError(f"has layers of {kind.replace('_', ' ')}")
        per_kind = isinstance(rope_types, dict)
        rope_type = rope_types[kind] if per_kind else rope_types
        if rope_type not in _ROPES or (per_kind and rope_type == "longrope"):
            raise _NotSupportedError(f"has rotary embeddings of type {rope_type}")
        rotates = bool(getattr(layer.self_attn, "use_rope", True))
        yield LayerDescription(
            norms=next(names for names in _NORMS if _names(names) == _layer_norms(layer)),
            rope=(kind if per_kind else "") if rotates else None,
            window=window if kind == _SLIDING else None,
        )


def _check_layer(layer: Any) -> None:
    """Check that a layer consists of known parts."""
    norms = _layer_norms(layer)
    if not any(_names(names) == norms for names in _NORMS):
        raise _NotSupportedError(f"has layers with other norms: {', '.join(sorted(norms))}")
    _check_parts(layer, {"self_attn", "mlp"} | norms)
    attention, mlp = layer.self_attn, layer.mlp
    head_norms = _parts(attention) & _HEAD_NORMS
    projections = _parts(attention) - head_norms
    if projections not in _ATTENTION or len(head_norms) == 1:
        raise _NotSupportedError(f"has attention of {', '.join(sorted(_parts(attention)))}")
    _check_parts(attention, projections | head_norms)
    if not getattr(attention, "is_causal", True):
        raise _NotSupportedError("attends to later tokens")
    products = _parts(mlp) - set(_ACTIVATIONS)
    if products not in _MLPS:
        raise _NotSupportedError(f"has an MLP of {', '.join(sorted(_parts(mlp)))}")
    _check_parts(mlp, _parts(mlp))
    for parent, names in ((layer, norms), (attention, head_norms)):
        for name in names:
            if _norm_offset(getattr(parent, name)) is None:
                raise _NotSupportedError(f"has another kind of norm: {name}")


def _check_parts(module: Any, names: set[str]) -> None:
    """Check that a module has these parts, and no others that take part in its forward."""
    missing, others = names - _parts(module), _parts(module) - names
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    if missing:
        raise _NotSupportedError(f"has no {', '.join(sorted(missing))}")
    if others:
        raise _NotSupportedError(f"has other parts: {', '.join(sorted(others))}")
    if own:
        raise _NotSupportedError(f"has other parameters: {', '.join(name for name, _ in own)}")


def _parts(module: Any) -> set[str]:
    """The names of a module's parts, without those that do nothing after training."""
    inactive = (nn.Dropout, nn.Identity)
    return {name for name, part in module.named_children() if not isinstance(part, inactive)}


def _layer_norms(layer: Any) -> set[str]:
    return {name for name in _parts(layer) if "norm" in name}


def _names(names: tuple[str | None, ...]) -> set[str]:
    return {name for name in names if name}


def _epsilon(module: Any) -> float | None:
    """What a norm adds to the mean of squares."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.inference_mode()
def _norm_offset(module: Any) -> float | None:
    """What a norm adds to its weight: 0, or 1 (Gemma); None where it is not a root mean square
    normalisation. The norm is tried on a few numbers.
    """
    epsilon = _epsilon(module)
    if epsilon is None or {name for name, _ in module.named_parameters()} != {"weight"}:
        return None
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(size, generator=generator) for size in ((8,), (4, 8)))
    rows *= epsilon**0.5  # so that epsilon matters
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight)}
    output = probe(rows)
    normed = rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + epsilon)
    for offset in (0.0, 1.0):
        if torch.allclose(output, normed * (offset + weight), rtol=1e-4, atol=1e-6):
            return offset
    return None


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square normalisation (Zhang and Sennrich 2019) over the last dimension.

    Sums are taken in float32, and the result is rounded once.

    Attributes:
        weight: multiplied with afterwards, [..., size].
        epsilon: added to the mean of squares.
        by_length: both rescaled for the vector's length instead of the mean, on a CPU.
    """

    weight: Tensor
    epsilon: float
    by_length: tuple[Tensor, Tensor] | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        if self.by_length is None or torch.compiler.is_compiling():
            if self.weight.dim() == 1 and self.weight.dtype == rows.dtype:
                return F.rms_norm(rows, self.weight.shape, self.weight, self.epsilon)
            normed = F.rms_norm(rows.float(), self.weight.shape[-1:], None, self.epsilon)
            return (normed * self.weight).to(rows.dtype)
        # Half as many operations as torch's own.
        scaled, floor = self.by_length
        wide = rows if rows.dtype is torch.float32 else rows.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        normed = (wide / torch.hypot(length, floor)).mul_(scaled)
        return normed if wide is rows else normed.to(rows.dtype)

    @classmethod
    def of(cls, parent: nn.Module, name: str | None) -> Self | None:
        """The norm ``name`` of a module; None where there is none."""
        module: Any = getattr(parent, name, None) if name else None
        if module is None:
            return None
        offset, weight = _norm_offset(module), module.weight.detach()
        if offset:
            weight = weight.float() + offset
        return cls._of(weight, float(_epsilon(module) or 0))

    @classmethod
    def of_heads(cls, attention: Any, heads: int, key_heads: int, width: int) -> Self | None:
        """One norm for all heads of queries and keys, [heads + key heads, width]; None where there
        is none, or where it is not over each head alone.
        """
        query, key = (cls.of(attention, name) for name in ("q_norm", "k_norm"))
        if query is None or key is None or query.epsilon != key.epsilon:
            return None
        if query.weight.shape != (width,) or key.weight.shape != (width,):
            return None
        rows = [query.weight.expand(heads, -1), key.weight.expand(key_heads, -1)]
        return cls._of(torch.cat(rows), query.epsilon)

    @classmethod
    def _of(cls, weight: Tensor, epsilon: float) -> Self:
        if weight.device.type != "cpu":
            return cls(weight, epsilon)
        size = weight.shape[-1]
        floor = torch.tensor((size * epsilon) ** 0.5)
        return cls(weight, epsilon, (weight.float() * size**0.5, floor))


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: its norms and linear layers; ``qkv`` and ``gate_up`` are fused.

    Attributes:
        head_norm: of each head of queries and keys.
        query_norm, key_norm: over all heads of queries, and of keys.
        rope, window: as in `LayerDescription`.
    """

    before_attention: Norm | None
    qkv: Linear
    head_norm: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    rope: str | None
    window: int | None
    out: Linear
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: Linear
    activation: Linear
    down: Linear
    after_mlp: Norm | None

    @classmethod
    def of(cls, layer: Any, own: LayerDescription, whole: Description) -> Self:
        """A layer of a model whose linear layers were fused."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = [Norm.of(layer, name) for name in own.norms]
        head_norm = Norm.of_heads(attention, whole.heads, whole.key_heads, whole.width)
        activation = next(getattr(mlp, name) for name in _ACTIVATIONS if hasattr(mlp, name))
        return cls(
            before_attention=norms[0],
            qkv=_fused(attention, "qkv_proj", "q_proj"),
            head_norm=head_norm,
            query_norm=None if head_norm else Norm.of(attention, "q_norm"),
            key_norm=None if head_norm else Norm.of(attention, "k_norm"),
            rope=own.rope,
            window=own.window,
            out=attention.o_proj.forward,
            after_attention=norms[1],
            before_mlp=norms[2],
            gate_up=_fused(mlp, "gate_up_proj", "gate_proj"),
            activation=activation.forward,
            down=mlp.down_proj.forward,
            after_mlp=norms[3],
        )


def _fused(parent: Any, whole: str, part: str) -> Linear:
    """A fused layer: that of the architecture, or one made by `fuse_layers`."""
    layer = getattr(parent, whole) if hasattr(parent, whole) else getattr(parent, part).whole
    forward: Linear = layer.forward
    return forward


def is_fused(model: Any) -> bool:
    """Are the linear layers of a model fused that read the same input?"""
    return all(
        isinstance(getattr(getattr(layer, part), names[0], None), Part | None)
        for layer in model.get_decoder().layers
        for part, names in FUSED.items()
    )


def fuse_layers(model: Any) -> None:
    """Fuse the linear layers of a model, those of each layer that read the same input."""
    for layer in model.get_decoder().layers:
        for part, names in FUSED.items():
            parent = getattr(layer, part)
            if hasattr(parent, names[0]):  # some architectures have fused ones
                fuse(parent, names)
