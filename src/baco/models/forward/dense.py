"""A forward of Llama and its closest relatives with nothing in it but what decoding needs.

With a small model, `transformers` spends more time in Python than in arithmetic. Here the same
weights compute the same function over BACo's own cache, in as few calls as possible. Every model is
tried against its own forward first (`baco.models.forward.selection`), so that a variant which this
module does not know is never decoded wrongly. `baco.models.forward.decoder_layers` has the layers.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from baco.kv_cache.shared_prefix import PrefixGroup, attend_with_prefixes
from baco.kv_cache.slots import SlotCache, columns_for
from baco.models.forward.decoder_layers import Block, Layout, Linear, Norm, layout_of
from baco.models.forward.fused_linear import FUSED, Part, fuse

# Tokens [B, T], their columns, rotations, keys and values of every layer.
Inputs = tuple[Tensor, Tensor, tuple[Tensor, Tensor], list[Tensor], list[Tensor]]
# Queries of a row up to which plain matrix products are faster than attention kernels.
_MAX_PLAIN = 32


def prepare(model: Any) -> None:
    """Fuse the linear layers of a model that `DenseForward` supports; leave other models alone."""
    if layout_of(model) is None:
        return
    for block in model.model.layers:
        for part, names in FUSED.items():
            fuse(getattr(block, part), names)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of a few tokens over many: softmax(scale · Q Kᵀ + mask) V (Vaswani et al. 2017,
    equation 1).

    Args:
        query: [B, heads, L, width].
        keys, values: [B, heads, columns, width], contiguous.
        mask: added to scores: [B * heads, L, columns] where products are plain (`_is_plain`), else
            [B, 1, L, columns].
        scale: of the scores.

    Returns:
        [B, heads, L, width].
    """
    if not _is_plain(query):
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    # Torch's own attention is made for many queries: on a CPU it takes up to ten times as long.
    _, _, span, width = query.shape
    flat, keys, values = query.reshape(-1, span, width), keys.flatten(0, 1), values.flatten(0, 1)
    if query.dtype == torch.float32:
        scores = torch.baddbmm(mask, flat, keys.transpose(1, 2), alpha=scale)
    else:  # oneDNN reads such a matrix faster without a transpose
        scores = (keys @ (flat * scale).transpose(1, 2)).transpose(1, 2) + mask
    return torch.bmm(scores.softmax(dim=-1), values).view(query.shape)


def _is_plain(query: Tensor) -> bool:
    """Is attention of query [B, heads, L, width] computed by plain products?"""
    return query.device.type == "cpu" and query.shape[2] <= _MAX_PLAIN


class DenseForward:
    """The forward of one model; implements `baco.kv_cache.batched.Forward`.

    Args:
        model: prepared by `prepare`.
        layout: of the model.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        config = model.config
        self._blocks = [Block.of(block, layout) for block in model.model.layers]
        self._embed: Any = model.model.embed_tokens
        norm = Norm.of(model.model, "norm")
        assert norm is not None
        self._norm = norm
        self._head: Linear = model.lm_head.forward
        self._rotary: Any = model.model.rotary_emb
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._scale: float = model.model.layers[0].self_attn.scaling
        self._rotations = (torch.empty(0), torch.empty(0))

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The forward of a prepared model; None for a model that is unsupported or unprepared."""
        layout = layout_of(model)
        if layout is None:
            return None
        blocks = model.model.layers
        fused = all(
            isinstance(part, Part)
            for block in blocks
            for part in (block.self_attn.q_proj, block.mlp.gate_proj)
        )
        return cls(model, layout) if fused else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._norm.weight.device

    def uses_plain_products(self, span: int) -> bool:
        """Is attention of ``span`` tokens of a row computed by plain products?"""
        return self.device.type == "cpu" and span * self._heads // self._key_heads <= _MAX_PLAIN

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; return the raw logits after the last ``keep``."""
        plan, width = cache.plan, None
        if self.device.type != "cpu" or not self.uses_plain_products(tokens.shape[1]):
            width = min(columns_for(plan.width), cache.columns)
        return self.read(
            *self.inputs(tokens, cache), keep, plan.prefix_lengths, plan.shared_prefixes, width
        )

    def tables(self, cache: SlotCache) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer."""
        like = self._norm.weight.new_empty(1, self._key_heads, 0, self._width)
        return cache.tables(len(self._blocks), like)

    def inputs(self, tokens: Tensor, cache: SlotCache) -> Inputs:
        """The arguments of `read`, on the device of the weights."""
        keys, values = self.tables(cache)
        columns = cache.plan.columns.to(self.device, non_blocking=True)
        tokens = tokens.to(self.device, non_blocking=True)
        prefix = max((group.length for group in cache.plan.shared_prefixes), default=0)
        return tokens, columns, self.rotations(prefix + cache.columns), keys, values

    def read(
        self,
        tokens: Tensor,
        columns: Tensor,
        rotations: tuple[Tensor, Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        keep: int,
        prefix_lengths: Tensor | None = None,
        shared_prefixes: Sequence[PrefixGroup] = (),
        width: int | None = None,
    ) -> Tensor:
        """The forward as a function of tensors alone, which can be compiled and recorded.

        Args:
            tokens: [B, T].
            columns: of the cache, where each token is written, [B, T].
            rotations: as `rotations` returns them.
            keys, values: of every layer, [B or more, key heads, columns, width]; written to.
            keep: the number of last tokens whose logits are returned; 0 for all.
            prefix_lengths, shared_prefixes: as in `baco.kv_cache.slots.ForwardPlan`.
            width: the number of first columns that tokens may attend to; None for all. Plain
                products on a CPU are faster over all, since a contiguous matrix is not copied.

        Returns:
            Raw logits [B, keep, vocabulary].
        """
        size, span = tokens.shape
        positions = columns if prefix_lengths is None else columns + prefix_lengths[:, None]
        cos, sin = (table[positions][:, :, None] for table in rotations)
        mask = self._mask(columns, width or keys[0].shape[2])
        slots = self._slots(columns, keys[0].shape[2])
        hidden = self._embed(tokens)  # [B, T, hidden]
        for layer, (block, own_keys, own_values) in enumerate(
            zip(self._blocks, keys, values, strict=True)
        ):
            attn_in = hidden if block.before_attention is None else block.before_attention(hidden)
            query, new_keys, new_values = self._split(block, block.qkv(attn_in), cos, sin)
            own_keys.view(-1, self._width).index_copy_(0, slots, new_keys)
            own_values.view(-1, self._width).index_copy_(0, slots, new_values)
            cached = (own_keys[:size], own_values[:size])
            if width is not None:
                cached = (cached[0][:, :, :width], cached[1][:, :, :width])
            attention = (query, *cached, mask, self._scale)
            shared = [(g.rows, g.keys[layer], g.values[layer]) for g in shared_prefixes]
            heads = attend_with_prefixes(*attention, shared) if shared else attend(*attention)
            attn_out = block.out(self._joined(heads, span))
            if block.after_attention is not None:
                attn_out = block.after_attention(attn_out)
            hidden = hidden + attn_out
            mlp_in = hidden if block.before_mlp is None else block.before_mlp(hidden)
            gate, up = block.gate_up(mlp_in).chunk(2, dim=-1)
            mlp_out = block.down(F.silu(gate).mul_(up))
            if block.after_mlp is not None:
                mlp_out = block.after_mlp(mlp_out)
            hidden = hidden + mlp_out
        return self._head(self._norm(hidden if keep in (0, span) else hidden[:, -keep:]))

    def _split(
        self, block: Block, joint: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer from the output of its fused product, [B, T, …].

        Returns:
            Queries [B, key heads, group * T, width], where query heads that share keys follow one
            another as if they were tokens; keys and values [B * T * key heads, width].
        """
        size, span, _ = joint.shape
        heads, width = self._key_heads, self._width
        split = joint.view(size, span, -1, width)
        to_rotate = self._normed(block, joint, split[:, :, : self._heads + heads])
        rotated = torch.addcmul(to_rotate * cos, to_rotate.roll(width // 2, -1), sin)
        if rotated.dtype != joint.dtype:
            rotated = rotated.to(joint.dtype)
        query = rotated[:, :, : self._heads]
        if span > 1:
            query = query.reshape(size, span, heads, -1, width).permute(0, 2, 3, 1, 4)
        return (
            query.reshape(size, heads, -1, width),
            rotated[:, :, self._heads :].reshape(-1, width),
            split[:, :, self._heads + heads :].reshape(-1, width),
        )

    def _joined(self, output: Tensor, span: int) -> Tensor:
        """The output of all heads for ``span`` tokens per row, laid out as `_split` returns
        queries, as [B, T, heads * width].
        """
        size, heads, _, width = output.shape
        if span > 1:
            group = self._heads // heads
            output = output.view(size, heads, group, span, width).permute(0, 3, 1, 2, 4)
        return output.reshape(size, span, self._heads * width)

    def _normed(self, block: Block, joint: Tensor, split: Tensor) -> Tensor:
        """Queries and keys ``split`` [B, T, heads + key heads, width] of ``joint``, normed."""
        if block.query_norm is None or block.key_norm is None:
            return split
        first, width = self._heads * self._width, self._width
        last = first + self._key_heads * width
        parts = []
        for part, norm in (
            (joint[:, :, :first], block.query_norm),
            (joint[:, :, first:last], block.key_norm),
        ):
            over_all_heads = norm.weight.shape[0] == part.shape[-1]
            heads = (norm(part) if over_all_heads else part).unflatten(-1, (-1, width))
            parts.append(heads if over_all_heads else norm(heads))
        return torch.cat(parts, dim=2)

    def rotations(self, until: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least ``until`` positions, [positions, width].

        The sines of the first half of the channels are negated, so that a roll replaces the swap of
        the two halves of the channels (Su et al. 2021, equation 34).
        """
        if len(self._rotations[0]) < until:
            most = 1 << (until - 1).bit_length()
            cos, sin = self._rotary(self._norm.weight, torch.arange(most, device=self.device)[None])
            sin = torch.cat((-sin[0, :, : self._width // 2], sin[0, :, self._width // 2 :]), dim=1)
            self._rotations = (cos[0], sin)
        return self._rotations

    def _slots(self, columns: Tensor, width: int) -> Tensor:
        """Flat indices of columns [B, T] in tables of ``width`` columns: [B * T * heads], the heads
        of a token in turn.
        """
        size, heads = len(columns), self._key_heads
        first = torch.arange(size * heads, device=columns.device).view(size, 1, heads) * width
        return (first + columns[:, :, None]).flatten()

    def _mask(self, columns: Tensor, width: int) -> Tensor:
        """Added to scores: -inf where a token does not attend; repeated for query heads that share
        keys. Its shape is what `attend` takes.
        """
        masked = torch.arange(width, device=columns.device) > columns[:, None, :, None]
        zero = torch.zeros((), dtype=self._norm.weight.dtype, device=columns.device)
        mask = torch.where(masked, -torch.inf, zero)
        group = self._heads // self._key_heads
        if group > 1:
            mask = mask.repeat(1, 1, group, 1)
        if not _is_plain(mask):
            return mask
        return mask.expand(-1, self._key_heads, -1, -1).flatten(0, 1)
