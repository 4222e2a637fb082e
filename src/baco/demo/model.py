"""A Llama-type language model in a hundred lines, quick to train on two CPU cores.

It knows token ids and no text. All layers' weights of one kind are one parameter, so that
the optimiser treats them in one batched call; `to_llama` hands the weights to `transformers`,
whose `LlamaForCausalLM` computes the same function (a test holds the two together).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

ROPE_BASE = 10_000.0
NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model; both models of the pair share them."""

    vocabulary: int
    hidden: int = 160
    layers: int = 5
    heads: int = 5
    inner: int = 432
    context: int = 512

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads


@dataclass(slots=True)
class Cache:
    """Keys and values of the positions seen so far, with room for more."""

    keys: Tensor  # [layers, B, heads, capacity, head]
    values: Tensor
    length: int = 0

    @classmethod
    def empty(cls, shape: Shape, rows: int, capacity: int) -> "Cache":
        """Room for `capacity` positions of `rows` rows."""
        size = (shape.layers, rows, shape.heads, capacity, shape.head)
        return cls(torch.zeros(size), torch.zeros(size))

    def rows(self, index: Tensor) -> "Cache":
        """The cache of the rows named by `index` (long [B']), repeats allowed."""
        return Cache(self.keys[:, index], self.values[:, index], self.length)


class TinyLlama(nn.Module):
    """Decoder-only transformer: RMS norms, rotary positions, SwiGLU, tied embeddings."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        layers, hidden, inner = shape.layers, shape.hidden, shape.inner

        def normal(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * scale)

        wide, deep = hidden**-0.5, (2 * layers) ** -0.5
        self.embedding = normal(shape.vocabulary, hidden, scale=0.05)
        self.qkv = normal(layers, 3 * hidden, hidden, scale=wide)
        self.out = normal(layers, hidden, hidden, scale=wide * deep)
        self.gate_up = normal(layers, 2 * inner, hidden, scale=wide)
        self.down = normal(layers, hidden, inner, scale=inner**-0.5 * deep)
        self.attention_norm = nn.Parameter(torch.ones(layers, hidden))
        self.mlp_norm = nn.Parameter(torch.ones(layers, hidden))
        self.final_norm = nn.Parameter(torch.ones(hidden))
        cosine, sine = _rotations(shape.context, shape.head)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def matrices(self) -> list[Tensor]:
        """The parameters that are stacks of matrices, which Muon trains. AdamW trains the rest."""
        return [self.qkv, self.out, self.gate_up, self.down]

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Final hidden states [B, T, hidden] of ids [B, T].

        With a cache, the ids follow the positions it holds, and are added to them.
        """
        shape = self.shape
        rows, width = ids.shape
        start = cache.length if cache else 0
        end = start + width
        cosine = self.get_buffer("cosine")[start:end]
        sine = self.get_buffer("sine")[start:end]
        x = F.embedding(ids, self.embedding)
        for layer in range(shape.layers):
            y = F.rms_norm(x, (shape.hidden,), self.attention_norm[layer], NORM_EPS)
            heads = F.linear(y, self.qkv[layer]).view(rows, width, 3, shape.heads, shape.head)
            query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
            query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
            if cache is not None:
                cache.keys[layer, :, :, start:end] = key
                cache.values[layer, :, :, start:end] = value
                key = cache.keys[layer, :, :, :end]
                value = cache.values[layer, :, :, :end]
            y = F.scaled_dot_product_attention(query, key, value, is_causal=start == 0)
            x = x + F.linear(y.transpose(1, 2).reshape(rows, width, -1), self.out[layer])
            y = F.rms_norm(x, (shape.hidden,), self.mlp_norm[layer], NORM_EPS)
            gate, up = F.linear(y, self.gate_up[layer]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, self.down[layer])
        if cache is not None:
            cache.length = end
        return F.rms_norm(x, (shape.hidden,), self.final_norm, NORM_EPS)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of final hidden states [..., hidden]."""
        return F.linear(hidden, self.embedding)


def _rotations(context: int, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head] of the rotary positions, in `transformers`' layout."""
    frequency = ROPE_BASE ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    angle = torch.arange(context, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


def to_llama(model: TinyLlama, *, end: int, begin: int, pad: int) -> LlamaForCausalLM:
    """The same model as a `transformers` Llama, with float16 weights.

    `end`, `begin` and `pad` are the special token ids of its configuration.
    """
    shape = model.shape
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            tie_word_embeddings=True,
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )
    weights: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.final_norm,
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        query, key, value = model.qkv[layer].chunk(3)
        gate, up = model.gate_up[layer].chunk(2)
        weights |= {
            prefix + "self_attn.q_proj.weight": query,
            prefix + "self_attn.k_proj.weight": key,
            prefix + "self_attn.v_proj.weight": value,
            prefix + "self_attn.o_proj.weight": model.out[layer],
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": model.down[layer],
            prefix + "input_layernorm.weight": model.attention_norm[layer],
            prefix + "post_attention_layernorm.weight": model.mlp_norm[layer],
        }
    weights["lm_head.weight"] = model.embedding
    llama.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})
    for parameter in llama.parameters():
        parameter.data = parameter.data.half()
    return llama
