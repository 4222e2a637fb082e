"""A causal LM's forward with nothing in it but what decoding needs.

Where a model is small, `transformers` spends more time in Python than the model in arithmetic. Here
the same weights compute the same function over the engine's own cache, in as few calls as it takes.
It knows Llama and its closest relatives (`LAYOUTS`); who uses it tries it against the model's own
forward first (`baco.half`), so that a variant it does not know is never decoded wrongly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baco.engine.cache import SlotCache
from baco.fusing import Part, fuse

Linear = Callable[[Tensor], Tensor]
# Queries for which plain matrix products beat attention kernels.
_FEW = 32
# Positions whose rotations depend on nothing but themselves.
_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a block keeps its norms: names of modules, None where it has no such norm."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


_FIRST = Layout()
_LAST = Layout(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
LAYOUTS = {
    "LlamaForCausalLM": _FIRST,
    "MistralForCausalLM": _FIRST,
    "Qwen2ForCausalLM": _FIRST,
    "Qwen3ForCausalLM": _FIRST,
    "Olmo2ForCausalLM": _LAST,
}


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square normalisation (Zhang and Sennrich 2019) over the last ``len(weight)``."""

    weight: Tensor
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        return F.rms_norm(rows, self.weight.shape, self.weight, self.epsilon)

    @classmethod
    def of(cls, parent: nn.Module, name: str | None) -> Self | None:
        """The norm ``name`` of a module, None where there is none."""
        module: Any = getattr(parent, name, None) if name else None
        return module and cls(module.weight.detach(), module.variance_epsilon)


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: its norms, its products; ``qkv`` and ``gate_up`` are several made one."""

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
        """A layer of a model whose products were fused."""
        attention, mlp = block.self_attn, block.mlp
        return cls(
            Norm.of(block, layout.before_attention),
            attention.q_proj.whole,
            Norm.of(attention, "q_norm"),
            Norm.of(attention, "k_norm"),
            attention.o_proj,
            Norm.of(block, layout.after_attention),
            Norm.of(block, layout.before_mlp),
            mlp.gate_proj.whole,
            mlp.down_proj,
            Norm.of(block, layout.after_mlp),
        )


def prepare(model: Any) -> None:
    """Fuse a model's products as `Lean` wants them, where it is of a kind that it knows."""
    if _layout(model) is None:
        return
    for block in model.model.layers:
        fuse(block.self_attn, ("q_proj", "k_proj", "v_proj"))
        fuse(block.mlp, ("gate_proj", "up_proj"))


def _layout(model: Any) -> Layout | None:
    """How a model is laid out; None where it is none that `Lean` knows, or has something more."""
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
    used: int | None = getattr(config, "sliding_window", None)
    return used if getattr(config, "use_sliding_window", True) else None


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of a few tokens over many: softmax(scale · Q Kᵀ + mask) V (Vaswani et al. 2017,
    equation 1).

    Args:
        query: [B, heads, L, width].
        keys, values: [B, heads, columns, width].
        mask: added to scores, [B, 1, L, columns].
        scale: of the scores.

    Returns:
        [B, heads, L, width].
    """
    if query.device.type != "cpu" or query.shape[2] > _FEW:
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    # Torch's own attention is laid out for many queries: on a CPU it takes up to ten times as long.
    query = query * scale
    if query.dtype == torch.float32:
        scores = query @ keys.transpose(2, 3)
    else:  # oneDNN reads such a matrix faster as it lies
        scores = (keys @ query.transpose(2, 3)).transpose(2, 3)
    scores += mask
    return scores.softmax(dim=-1) @ values


class Lean:
    """The forward of one model, as `baco.engine.cache.Forward`.

    Args:
        model: prepared, of a known layout.
        layout: that.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        config = model.config
        self._blocks = [Block.of(block, layout) for block in model.model.layers]
        self._embed: nn.Module = model.model.embed_tokens
        norm = Norm.of(model.model, "norm")
        assert norm is not None
        self._norm = norm
        self._head: Linear = model.lm_head
        self._turn: Any = model.model.rotary_emb
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._scale: float = model.model.layers[0].self_attn.scaling
        self._rotations = (torch.empty(0), torch.empty(0))

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The lean forward of a model that was prepared, None where there is none."""
        layout = _layout(model)
        if layout is None:
            return None
        blocks = model.model.layers
        whole = all(
            isinstance(part, Part)
            for block in blocks
            for part in (block.self_attn.q_proj, block.mlp.gate_proj)
        )
        return cls(model, layout) if whole else None

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; the raw logits after the last ``keep`` of them."""
        device = self._norm.weight.device
        columns = cache.plan.columns.to(device)
        cos, sin = self._rotation(columns, cache.plan.width)
        mask = self._mask(columns, cache.columns)
        rows = self._embed(tokens.to(device))  # [B, T, hidden]
        for index, block in enumerate(self._blocks):
            heard = self._attend(block, rows, cos, sin, mask, cache.layer(index))
            rows = rows + heard
            thought = rows if block.before_mlp is None else block.before_mlp(rows)
            gate, up = block.gate_up(thought).chunk(2, dim=-1)
            thought = block.down(F.silu(gate) * up)
            rows = rows + (thought if block.after_mlp is None else block.after_mlp(thought))
        return self._head(self._norm(rows[:, -keep:]))

    def _attend(
        self,
        block: Block,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        layer: Any,
    ) -> Tensor:
        """What a layer's attention adds to rows [B, T, hidden]."""
        size, span, _ = rows.shape
        heads, width = self._key_heads, self._width
        group = self._heads // heads
        read = rows if block.before_attention is None else block.before_attention(rows)
        joint = block.qkv(read)  # [B, T, (heads + 2 * key heads) * width]
        turned, values = self._split(block, joint)
        turned = torch.addcmul(turned * cos, turned.roll(width // 2, -1), sin).to(joint.dtype)
        query, keys = turned.split((self._heads, heads), dim=2)
        layer.update(keys.transpose(1, 2), values.transpose(1, 2))
        # Query heads that share keys stand behind one another as if they were tokens.
        query = query.unflatten(2, (heads, group)).permute(0, 2, 3, 1, 4)
        query = query.reshape(size, heads, group * span, width)
        # All columns rather than those in use: a matrix that lies in one piece is not copied.
        heard = attend(query, layer.keys[:size], layer.values[:size], mask, self._scale)
        heard = heard.view(size, heads, group, span, width).permute(0, 3, 1, 2, 4)
        said = block.out(heard.reshape(size, span, -1))
        return said if block.after_attention is None else block.after_attention(said)

    def _split(self, block: Block, joint: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, T, heads + key heads, width], normed; values [B, T, ., width]."""
        heads, width = self._heads, self._width
        if block.query_norm is None or block.key_norm is None:
            split = joint.unflatten(-1, (-1, width))
            turning = heads + self._key_heads
            return split[:, :, :turning], split[:, :, turning:]
        sizes = (heads * width, self._key_heads * width, self._key_heads * width)
        query, key, value = joint.split(sizes, dim=-1)
        parts = []
        for part, norm in ((query, block.query_norm), (key, block.key_norm)):
            whole = norm.weight.shape[0] == part.shape[-1]
            split = (norm(part) if whole else part).unflatten(-1, (-1, width))
            parts.append(split if whole else norm(split))
        return torch.cat(parts, dim=2), value.unflatten(-1, (-1, width))

    def _rotation(self, columns: Tensor, until: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines at columns [B, T], as [B, T, 1, width]; the first half's sines turned
        round, so that a roll stands for the swap of halves (Su et al. 2021, equation 34).
        """
        if len(self._rotations[0]) < until:
            most = 1 << (until - 1).bit_length()
            cos, sin = self._turn(
                self._norm.weight, torch.arange(most, device=columns.device)[None]
            )
            sin = torch.cat((-sin[0, :, : self._width // 2], sin[0, :, self._width // 2 :]), dim=1)
            self._rotations = (cos[0], sin)
        cos, sin = (table[columns][:, :, None] for table in self._rotations)
        return cos, sin

    def _mask(self, columns: Tensor, width: int) -> Tensor:
        """What is added to scores: -inf where a token does not look. For every query head that
        shares keys with others, one after the other: [B, 1, group * T, width].
        """
        unseen = torch.arange(width, device=columns.device) > columns[:, None, :, None]
        mask = torch.zeros(unseen.shape, dtype=self._norm.weight.dtype, device=columns.device)
        return mask.masked_fill_(unseen, -torch.inf).repeat(1, 1, self._heads // self._key_heads, 1)
