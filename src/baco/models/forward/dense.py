"""A forward of decoder-only transformers with nothing in it but what decoding needs.

With a small model, `transformers` spends more time in Python than in arithmetic. Here the same
weights compute the same function over BACo's own cache, in as few calls as possible. How a model
differs from others is read off the model (`baco.models.forward.decoder_layers`). This forward is
used only if it agrees with the model's own one on a small model of the architecture
(`baco.models.forward.selection`), so that a variant that is not understood is not decoded wrongly.
"""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from baco.device import tensor_on
from baco.kv_cache.shared_prefix import (
    PrefixGroup,
    PrefixPart,
    attend_with_prefixes,
    softly_capped,
)
from baco.kv_cache.slots import SlotCache, columns_for
from baco.models.forward.decoder_layers import (
    Description,
    Layer,
    Norm,
    describe,
    is_fused,
)
from baco.models.rope import LongRope

# Cosines and sines of positions for every kind of layer that has its own, [positions, width] each;
# with LongRoPE those of the short factors, followed by as many of the long ones.
Rotations = dict[str, Tensor]
# Tokens [B, T], their columns, rotations, keys and values of every layer.
Inputs = tuple[Tensor, Tensor, Rotations, list[Tensor], list[Tensor]]
# Queries of a row up to which plain matrix products are faster than attention kernels.
_MAX_PLAIN = 32
# The share of columns outside of windows from which they are skipped.
_MIN_SKIPPED = 0.125


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a few tokens over many: softmax(scale · Q Kᵀ + mask) V (Vaswani et al. 2017,
    equation 1).

    Args:
        query: [B, heads, L, width].
        keys, values: [B, heads, columns, width], contiguous.
        mask: added to scores: [B * heads, L, columns] where products are plain (`_is_plain`), else
            [B, 1, L, columns].
        scale: of the scores.
        softcap: the bound of the scores, as in `softly_capped`; None for none.

    Returns:
        [B, heads, L, width].
    """
    if not _is_plain(query):
        if softcap is None:
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
        scores = softly_capped((query * scale) @ keys.transpose(2, 3), softcap) + mask
        return scores.softmax(dim=-1) @ values
    # Torch's own attention is made for many queries: on a CPU it takes up to ten times as long.
    _, _, span, width = query.shape
    flat, keys, values = query.reshape(-1, span, width), keys.flatten(0, 1), values.flatten(0, 1)
    if query.dtype == torch.float32 and softcap is None:
        scores = torch.baddbmm(mask, flat, keys.transpose(1, 2), alpha=scale)
    else:  # oneDNN reads such a matrix faster without a transpose
        scores = (keys @ (flat * scale).transpose(1, 2)).transpose(1, 2)
        scores = softly_capped(scores, softcap) + mask
    return torch.bmm(scores.softmax(dim=-1), values).view(query.shape)


def _is_plain(query: Tensor) -> bool:
    """Is attention of query [B, heads, L, width] computed by plain products?"""
    return query.device.type == "cpu" and query.shape[2] <= _MAX_PLAIN


class DenseForward:
    """The forward of one model; implements `baco.kv_cache.batched.Forward`.

    Args:
        model: its linear layers were fused (`baco.models.forward.decoder_layers.fuse_layers`).
        description: of the model.
    """

    def __init__(self, model: Any, description: Description) -> None:
        decoder = description.decoder
        self._layers = [
            Layer.of(layer, own, description)
            for layer, own in zip(decoder.layers, description.layers, strict=True)
        ]
        self._embed: Any = decoder.embed_tokens
        norm = Norm.of(decoder, "norm")
        assert norm is not None
        self._norm = norm
        self._like: Tensor = decoder.norm.weight.detach()  # of the weights' dtype and device
        self._zero = self._like.new_zeros(())
        self._head: Any = model.lm_head
        self._rotary: Any = decoder.rotary_emb
        self._long_rope = LongRope.of(model)
        self._heads, self._key_heads = description.heads, description.key_heads
        self._width = description.width
        self._scale, self._softcap = description.scale, description.softcap
        self._embedding_multiplier = description.embedding_multiplier
        self._residual_multiplier = description.residual_multiplier
        self._logits_divisor = description.logits_divisor
        self._logits_softcap = description.logits_softcap
        self._ropes = sorted({layer.rope for layer in self._layers if layer.rope is not None})
        self._windows = list(dict.fromkeys(layer.window for layer in self._layers))
        self._rotations: Rotations = {}
        self._positions = 0  # that these are of
        # Channels of a head that are rotated.
        self._rotated = self._turns(self._ropes[0], 1)[0].shape[1] if self._ropes else self._width

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The forward of a model; None where it is not supported, or its layers are not fused."""
        description = describe(model)
        if isinstance(description, str) or not is_fused(model):
            return None
        return cls(model, description)

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers, in order."""
        return self._layers

    def with_layers(self, layers: Sequence[Layer]) -> Self:
        """The same forward through other layers of the same kinds."""
        forward = copy.copy(self)
        forward._layers = list(layers)
        return forward

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._like.device

    def uses_plain_products(self, span: int) -> bool:
        """Is attention of ``span`` tokens of a row computed by plain products?"""
        return self.device.type == "cpu" and span * self._heads // self._key_heads <= _MAX_PLAIN

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        """Read tokens [B, T] into the cache; return the raw logits after the last ``keep``."""
        plan, width = cache.plan, None
        if self.device.type != "cpu" or not self.uses_plain_products(tokens.shape[1]):
            width = min(columns_for(plan.width), cache.columns)
        shortest = min(plan.lengths, default=0)
        long = tensor_on(self.device, plan.long, torch.int64) if any(plan.long) else None
        return self.read(
            *self.inputs(tokens, cache),
            keep,
            plan.prefix_lengths,
            plan.shared_prefixes,
            width,
            shortest,
            long,
        )

    def tables(self, cache: SlotCache) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer."""
        like = self._like.new_empty(1, self._key_heads, 0, self._width)
        return cache.tables(len(self._layers), like)

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
        rotations: Rotations,
        keys: list[Tensor],
        values: list[Tensor],
        keep: int,
        prefix_lengths: Tensor | None = None,
        shared_prefixes: Sequence[PrefixGroup] = (),
        width: int | None = None,
        shortest: int = 0,
        long: Tensor | None = None,
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
            shortest: the fewest tokens that a row held before; windows are read from there.
            long: 1 for each row that is read with the long factors of LongRoPE, else 0, int64 [B];
                None where none is.

        Returns:
            Raw logits [B, keep, vocabulary].
        """
        size, span = tokens.shape
        positions = columns if prefix_lengths is None else columns + prefix_lengths[:, None]
        turns = {}
        for kind, table in rotations.items():
            at = positions if long is None else positions + long[:, None] * (len(table) // 2)
            turns[kind] = table[at.reshape(-1)].unbind(1)
        last = width or keys[0].shape[2]
        starts = {window: _first_column(window, shortest, last) for window in self._windows}
        masks = self._masks(columns, starts, last)
        visible = {
            window: [self._visible(group, positions, window) for group in shared_prefixes]
            for window in self._windows
        }
        slots = self._slots(columns, keys[0].shape[2])
        multiplier = self._residual_multiplier
        plain = multiplier == 1  # then the operator starts sooner
        hidden = self._embed(
            tokens.reshape(-1)
        )  # [B * T, hidden]: products of matrices start sooner
        if self._embedding_multiplier != 1:
            hidden = hidden * self._embedding_multiplier
        for index, (layer, own_keys, own_values) in enumerate(
            zip(self._layers, keys, values, strict=True)
        ):
            attn_in = hidden if layer.before_attention is None else layer.before_attention(hidden)
            turn = None if layer.rope is None else turns[layer.rope]
            query, new_keys, new_values = self._split(layer, layer.qkv(attn_in), turn, span)
            own_keys.view(-1, self._width).index_copy_(0, slots, new_keys)
            own_values.view(-1, self._width).index_copy_(0, slots, new_values)
            if own_keys.shape[0] > size:
                own_keys, own_values = own_keys[:size], own_values[:size]  # noqa: PLW2901
            start = starts[layer.window]
            if start or width is not None:
                own_keys = own_keys[:, :, start:width]  # noqa: PLW2901
                own_values = own_values[:, :, start:width]  # noqa: PLW2901
            attention = (query, own_keys, own_values, masks[layer.window], self._scale)
            if shared_prefixes:
                shared = [
                    PrefixPart(g.rows, g.keys[index][:, first:], g.values[index][:, first:], mask)
                    for g, (first, mask) in zip(shared_prefixes, visible[layer.window], strict=True)
                ]
                heads = attend_with_prefixes(*attention, shared, self._softcap)
            else:
                heads = attend(*attention, self._softcap)
            attn_out = layer.out(self._joined(heads, span))
            if layer.after_attention is not None:
                attn_out = layer.after_attention(attn_out)
            hidden = hidden + attn_out if plain else hidden.add(attn_out, alpha=multiplier)
            mlp_in = hidden if layer.before_mlp is None else layer.before_mlp(hidden)
            gate, up = layer.gate_up(mlp_in).chunk(2, dim=-1)
            mlp_out = layer.down(layer.activation(gate).mul_(up))
            if layer.after_mlp is not None:
                mlp_out = layer.after_mlp(mlp_out)
            hidden = hidden + mlp_out if plain else hidden.add(mlp_out, alpha=multiplier)
        hidden = hidden.view(size, span, -1)
        return self._logits(hidden if keep in (0, span) else hidden[:, -keep:])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Raw logits [B, T, vocabulary] from the output of the last layer."""
        logits: Tensor = self._head.forward(self._norm(hidden))
        if self._logits_divisor != 1:
            logits = logits / self._logits_divisor
        return softly_capped(logits, self._logits_softcap)

    def _split(
        self, layer: Layer, joint: Tensor, turn: Sequence[Tensor] | None, span: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer from the output of its fused product, [B * T, …],
        for ``span`` tokens per row.

        Returns:
            Queries [B, key heads, group * T, width], where query heads that share keys follow one
            another as if they were tokens; keys and values [B * T * key heads, width].
        """
        tokens, width = joint.shape[0], self._width
        queries, heads = self._heads, self._key_heads
        # One split takes half as long as two slices.
        split = joint.view(tokens, -1, width)
        unrotated, values = split.split_with_sizes((queries + heads, heads), 1)
        rotated = self._normed(layer, joint, unrotated)
        if turn is not None:
            cos, sin = turn
            rotated = torch.addcmul(rotated * cos, self._swapped(rotated), sin)
            if rotated.dtype != joint.dtype:
                rotated = rotated.to(joint.dtype)
        query, key = rotated.split_with_sizes((queries, heads), 1)
        if span > 1:
            query = query.reshape(tokens // span, span, heads, -1, width).permute(0, 2, 3, 1, 4)
        return (
            query.reshape(tokens // span, heads, -1, width),
            key.reshape(-1, width),
            values.reshape(-1, width),
        )

    def _joined(self, output: Tensor, span: int) -> Tensor:
        """The output of all heads for ``span`` tokens per row, laid out as `_split` returns
        queries, as [B * T, heads * width].
        """
        size, heads, _, width = output.shape
        if span > 1:
            group = self._heads // heads
            output = output.view(size, heads, group, span, width).permute(0, 3, 1, 2, 4)
        return output.reshape(size * span, self._heads * width)

    def _swapped(self, heads: Tensor) -> Tensor:
        """Heads [..., width] with the two halves of their rotated channels swapped."""
        rotated, half = self._rotated, self._rotated // 2
        if rotated == self._width:
            return heads.roll(half, -1)
        parts = heads[..., half:rotated], heads[..., :half], heads[..., rotated:]
        return torch.cat(parts, dim=-1)

    def _normed(self, layer: Layer, joint: Tensor, split: Tensor) -> Tensor:
        """Queries and keys ``split`` [B * T, heads + key heads, width] of ``joint``, normed."""
        if layer.head_norm is not None:
            return layer.head_norm(split)
        if layer.query_norm is None or layer.key_norm is None:
            return split
        first = self._heads * self._width
        last = first + self._key_heads * self._width
        parts = layer.query_norm(joint[:, :first]), layer.key_norm(joint[:, first:last])
        return torch.cat(parts, dim=1).view(split.shape)

    def rotations(self, until: int) -> Rotations:
        """Cosines and sines of at least ``until`` positions, by kind: [positions, 2, 1, width].

        The sines of the first half of the channels are negated, so that swapping the halves
        replaces their rotation (Su et al. 2021, equation 34). Channels that are not rotated have
        cosine 1 and sine 0.
        """
        if until > self._positions:
            self._positions = 1 << (until - 1).bit_length()
            self._rotations = {kind: self._table(kind, self._positions) for kind in self._ropes}
        return self._rotations

    def _table(self, kind: str, most: int) -> Tensor:
        cos, sin = self._turns(kind, most)
        half, rest = self._rotated // 2, self._width - self._rotated
        sin = torch.cat((-sin[:, :half], sin[:, half:]), dim=1)
        return torch.stack((F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))), 1)[:, :, None]

    def _turns(self, kind: str, most: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``most`` positions as the model computes them, then those with the
        long factors of LongRoPE, [positions, rotated channels].
        """
        positions = torch.arange(most, device=self.device)[None]
        if self._long_rope is None:
            cos, sin = self._rotary(self._like, positions, *([kind] if kind else []))
            return cos[0], sin[0]
        parts = []
        for long in (False, True):
            with self._long_rope.per_row([long]):
                parts.append(self._rotary(self._like, positions))
        return torch.cat([cos[0] for cos, _ in parts]), torch.cat([sin[0] for _, sin in parts])

    def _slots(self, columns: Tensor, width: int) -> Tensor:
        """Flat indices of columns [B, T] in tables of ``width`` columns: [B * T * heads], the heads
        of a token in turn.
        """
        size, heads = columns.shape[0], self._key_heads
        first = torch.arange(0, size * heads * width, width, device=columns.device)
        return (first.view(size, 1, heads) + columns[:, :, None]).flatten()

    def _visible(
        self, group: PrefixGroup, positions: Tensor, window: int | None
    ) -> tuple[int, Tensor | None]:
        """The first token of a shared prompt that a window can reach, and the mask from there on as
        in `PrefixPart`. Positions are those of all rows' tokens, [B, T].
        """
        if window is None:
            return 0, None
        first = max(0, group.length - window + 1)
        token = torch.arange(first, group.length, device=positions.device)
        masked = token <= positions[group.rows][:, None, :, None] - window
        lowest = torch.finfo(torch.float32).min / 2
        mask = torch.zeros(masked.shape, device=masked.device).masked_fill_(masked, lowest)
        heads = self._heads // self._key_heads
        return first, mask.expand(-1, heads, -1, -1).reshape(-1, len(token))

    def _masks(
        self, columns: Tensor, starts: dict[int | None, int], width: int
    ) -> dict[int | None, Tensor]:
        """The mask of each kind of layer, by its window; from its first column to ``width``."""
        # Compiled functions serve any width.
        longest = width if not torch.compiler.is_compiling() else 2**63
        shorter = {w: None if w is None or w >= longest else w for w in self._windows}
        masks = {w: self._mask(columns, starts.get(w, 0), width, w) for w in {*shorter.values()}}
        return {w: masks[shorter[w]] for w in self._windows}

    def _mask(self, columns: Tensor, start: int, width: int, window: int | None) -> Tensor:
        """Added to scores: -inf where a token does not attend; repeated for query heads that share
        keys. Its shape is what `attend` takes.
        """
        column = torch.arange(start, width, device=columns.device)
        own = columns[:, None, :, None]
        masked = column > own
        if window is not None:
            masked |= column <= own - window
        mask = torch.where(masked, -torch.inf, self._zero)
        heads, group = self._key_heads, self._heads // self._key_heads
        if not self.uses_plain_products(columns.shape[1]):
            return mask.repeat(1, 1, group, 1) if group > 1 else mask
        repeated = mask[:, :, None].expand(-1, heads, group, -1, -1)
        return repeated.reshape(mask.shape[0] * heads, -1, mask.shape[3])


def _first_column(window: int | None, shortest: int, width: int) -> int:
    """The first column that layers with a window read, where every row holds ``shortest`` tokens.

    Slices of a table are a little slower to read than the table, so a few columns more are read.
    """
    first = 0 if window is None else max(0, shortest - window + 1)
    return first if first >= _MIN_SKIPPED * width else 0
