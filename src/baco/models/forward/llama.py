"""A causal LM's forward with nothing in it but what decoding needs.

Where a model is small, `transformers` spends more time in Python than the model in arithmetic. Here
the same weights compute the same function over the engine's own cache, in as few calls as it takes.
It knows Llama and its closest relatives (`baco.models.forward.llama_layers`); who uses it tries it
against the model's own forward first (`baco.models.model`), so that a variant it does not know is
never decoded wrongly.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from baco.kv_cache.shared_prefix import PrefixGroup, attend_with_prefixes
from baco.kv_cache.slots import SlotCache, columns_for
from baco.models.forward.fused_linear import FUSED, Part, fuse
from baco.models.forward.llama_layers import Block, Layout, Linear, Norm, layout_of

# Tokens [B, T], their columns, rotations, keys and values of every layer.
Inputs = tuple[Tensor, Tensor, tuple[Tensor, Tensor], list[Tensor], list[Tensor]]
# Queries for which plain matrix products beat attention kernels.
_FEW = 32


def prepare(model: Any) -> None:
    """Fuse a model's products as `LlamaForward` wants them, where it is of a kind that it knows."""
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
        keys, values: [B, heads, columns, width], each in one piece.
        mask: added to scores: [B * heads, L, columns] where products are plain (`_plain`), else
            [B, 1, L, columns].
        scale: of the scores.

    Returns:
        [B, heads, L, width].
    """
    if not _plain(query):
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    # Torch's own attention is laid out for many queries: on a CPU it takes up to ten times as long.
    _, _, few, width = query.shape
    flat, keys, values = query.reshape(-1, few, width), keys.flatten(0, 1), values.flatten(0, 1)
    if query.dtype == torch.float32:
        scores = torch.baddbmm(mask, flat, keys.transpose(1, 2), alpha=scale)
    else:  # oneDNN reads such a matrix faster as it lies
        scores = (keys @ (flat * scale).transpose(1, 2)).transpose(1, 2) + mask
    return torch.bmm(scores.softmax(dim=-1), values).view(query.shape)


def _plain(query: Tensor) -> bool:
    """Is attention of query [B, heads, L, width] made of plain products?"""
    return query.device.type == "cpu" and query.shape[2] <= _FEW


class LlamaForward:
    """The forward of one model, as `baco.kv_cache.batched.Forward`.

    Args:
        model: prepared, of a known layout.
        layout: that.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        config = model.config
        self._blocks = [Block.of(block, layout) for block in model.model.layers]
        self._embed: Any = model.model.embed_tokens
        norm = Norm.of(model.model, "norm")
        assert norm is not None
        self._norm = norm
        self._head: Linear = model.lm_head.forward
        self._turn: Any = model.model.rotary_emb
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._scale: float = model.model.layers[0].self_attn.scaling
        self._rotations = (torch.empty(0), torch.empty(0))

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The lean forward of a model that was prepared, None where there is none."""
        layout = layout_of(model)
        if layout is None:
            return None
        blocks = model.model.layers
        whole = all(
            isinstance(part, Part)
            for block in blocks
            for part in (block.self_attn.q_proj, block.mlp.gate_proj)
        )
        return cls(model, layout) if whole else None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._norm.weight.device

    def multiplies(self, span: int) -> bool:
        """Is attention of so many tokens of a row made of plain products?"""
        return self.device.type == "cpu" and span * self._heads // self._key_heads <= _FEW

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; the raw logits after the last ``keep`` of them."""
        plan, width = cache.plan, None
        if self.device.type != "cpu" or not self.multiplies(tokens.shape[1]):
            width = min(columns_for(plan.width), cache.columns)
        return self.read(
            *self.inputs(tokens, cache), keep, plan.prefix_lengths, plan.shared_prefixes, width
        )

    def tables(self, cache: SlotCache) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer."""
        like = self._norm.weight.new_empty(1, self._key_heads, 0, self._width)
        return cache.tables(len(self._blocks), like)

    def inputs(self, tokens: Tensor, cache: SlotCache) -> Inputs:
        """What `read` works on, on the device of the weights."""
        keys, values = self.tables(cache)
        columns = cache.plan.columns.to(self.device, non_blocking=True)
        tokens = tokens.to(self.device, non_blocking=True)
        before = max((group.length for group in cache.plan.shared_prefixes), default=0)
        return tokens, columns, self.rotations(before + cache.columns), keys, values

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
        """The forward as a function of tensors alone; it can be compiled, and recorded.

        Args:
            tokens: [B, T].
            columns: where in a row's cache each goes, [B, T].
            rotations: as `rotations` gives them.
            keys, values: of every layer, [B or more, key heads, columns, width]; written to.
            keep: of how many last tokens the logits are wanted; 0 for all.
            prefix_lengths, shared_prefixes: as in `baco.kv_cache.slots.ForwardPlan`.
            width: how many first columns tokens may look at; None for all, which plain products
                on a CPU read sooner: a matrix that lies in one piece is not copied.

        Returns:
            Raw logits [B, keep, vocabulary].
        """
        size, span = tokens.shape
        places = columns if prefix_lengths is None else columns + prefix_lengths[:, None]
        cos, sin = (table[places][:, :, None] for table in rotations)
        mask = self._mask(columns, width or keys[0].shape[2])
        slots = self._slots(columns, keys[0].shape[2])
        rows = self._embed(tokens)  # [B, T, hidden]
        for layer, (block, own_keys, own_values) in enumerate(
            zip(self._blocks, keys, values, strict=True)
        ):
            read = rows if block.before_attention is None else block.before_attention(rows)
            query, new_keys, new_values = self._split(block, block.qkv(read), cos, sin)
            own_keys.view(-1, self._width).index_copy_(0, slots, new_keys)
            own_values.view(-1, self._width).index_copy_(0, slots, new_values)
            seen = (own_keys[:size], own_values[:size])
            if width is not None:
                seen = (seen[0][:, :, :width], seen[1][:, :, :width])
            own = (query, *seen, mask, self._scale)
            shared = [(g.rows, g.keys[layer], g.values[layer]) for g in shared_prefixes]
            said = attend_with_prefixes(*own, shared) if shared else attend(*own)
            heard = block.out(self._joined(said, span))
            rows = rows + (heard if block.after_attention is None else block.after_attention(heard))
            thought = rows if block.before_mlp is None else block.before_mlp(rows)
            gate, up = block.gate_up(thought).chunk(2, dim=-1)
            thought = block.down(F.silu(gate).mul_(up))
            rows = rows + (thought if block.after_mlp is None else block.after_mlp(thought))
        return self._head(self._norm(rows if keep in (0, span) else rows[:, -keep:]))

    def _split(
        self, block: Block, joint: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer, from what they are parts of, [B, T, …].

        Returns:
            Queries [B, key heads, group * T, width], where query heads that share keys stand behind
            one another as if they were tokens; keys and values [B * T * key heads, width].
        """
        size, span, _ = joint.shape
        heads, width = self._key_heads, self._width
        split = joint.view(size, span, -1, width)
        turning = self._normed(block, joint, split[:, :, : self._heads + heads])
        turned = torch.addcmul(turning * cos, turning.roll(width // 2, -1), sin)
        if turned.dtype != joint.dtype:
            turned = turned.to(joint.dtype)
        query = turned[:, :, : self._heads]
        if span > 1:
            query = query.reshape(size, span, heads, -1, width).permute(0, 2, 3, 1, 4)
        return (
            query.reshape(size, heads, -1, width),
            turned[:, :, self._heads :].reshape(-1, width),
            split[:, :, self._heads + heads :].reshape(-1, width),
        )

    def _joined(self, said: Tensor, span: int) -> Tensor:
        """What heads said of ``span`` tokens a row, laid out as `_split` gives queries, as
        [B, T, heads * width].
        """
        size, heads, _, width = said.shape
        if span > 1:
            group = self._heads // heads
            said = said.view(size, heads, group, span, width).permute(0, 3, 1, 2, 4)
        return said.reshape(size, span, self._heads * width)

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
            whole = norm.weight.shape[0] == part.shape[-1]
            apart = (norm(part) if whole else part).unflatten(-1, (-1, width))
            parts.append(apart if whole else norm(apart))
        return torch.cat(parts, dim=2)

    def rotations(self, until: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines at columns up to ``until`` and beyond, [columns, width]; the first
        half's sines turned round, so that a roll stands for the swap of halves (Su et al. 2021,
        equation 34).
        """
        if len(self._rotations[0]) < until:
            most = 1 << (until - 1).bit_length()
            cos, sin = self._turn(self._norm.weight, torch.arange(most, device=self.device)[None])
            sin = torch.cat((-sin[0, :, : self._width // 2], sin[0, :, self._width // 2 :]), dim=1)
            self._rotations = (cos[0], sin)
        return self._rotations

    def _slots(self, columns: Tensor, width: int) -> Tensor:
        """Places of columns [B, T] in tables of ``width`` columns laid end to end: [B * T * heads],
        the heads of a token in turn.
        """
        size, heads = len(columns), self._key_heads
        first = torch.arange(size * heads, device=columns.device).view(size, 1, heads) * width
        return (first + columns[:, :, None]).flatten()

    def _mask(self, columns: Tensor, width: int) -> Tensor:
        """What is added to scores, -inf where a token does not look; for every query head that
        shares keys with others, one after the other. Its shape is as `attend` wants it.
        """
        unseen = torch.arange(width, device=columns.device) > columns[:, None, :, None]
        zero = torch.zeros((), dtype=self._norm.weight.dtype, device=columns.device)
        mask = torch.where(unseen, -torch.inf, zero)
        group = self._heads // self._key_heads
        if group > 1:
            mask = mask.repeat(1, 1, group, 1)
        if not _plain(mask):
            return mask
        return mask.expand(-1, self._key_heads, -1, -1).flatten(0, 1)
