"""The forward of a ``transformers`` model over rows of different lengths, by 4-D masks."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from baco.kv_cache.slots import ForwardPlan, SlotCache
from baco.models.context import text_config
from baco.models.forward.own_positions import OwnPositions
from baco.models.rope import LongRope


@dataclass(frozen=True, slots=True)
class MaskForm:
    """The form of the 4-D masks that a model takes.

    Attributes:
        kinds: of attention in the model: ``full_attention``, ``sliding_attention``,
            ``chunked_attention``.
        window: of sliding attention, in tokens.
        chunk: of chunked attention, in tokens.
        mapping: a dict with one mask per kind, else a single mask.
        additive: added to the scores (eager attention), else a bool per pair (SDPA).
    """

    kinds: tuple[str, ...]
    window: int | None
    chunk: int | None
    mapping: bool
    additive: bool

    @classmethod
    def of(cls, config: Any, kinds: tuple[str, ...] = ()) -> Self | None:
        """From a model's configuration; None where its attention is of another kind.

        Args:
            config: of the model.
            kinds: of its attention layers, where others have masks of no kind.
        """
        text = text_config(config)
        implementation = getattr(text, "_attn_implementation", None)
        window = getattr(text, "sliding_window", None)
        layers = kinds or getattr(text, "layer_types", None)
        kinds = tuple(dict.fromkeys(layers or [f"{'sliding' if window else 'full'}_attention"]))
        if implementation not in ("sdpa", "eager"):
            return None
        chunk = getattr(text, "attention_chunk_size", None)
        known = {"full_attention", "sliding_attention"} | (
            {"chunked_attention"} if chunk else set()
        )
        if not set(kinds) <= known:
            return None
        return cls(kinds, window, chunk, layers is not None, implementation == "eager")

    def masks(self, plan: ForwardPlan, device: Any, dtype: torch.dtype) -> Any:
        """The cached columns that each new token attends to: [B, 1, T, width] or a dict of such."""
        position = plan.columns.to(device)[:, None, :, None]  # [B, 1, T, 1]
        column = torch.arange(plan.width, device=device)
        causal = column <= position
        masks: dict[str, Tensor] = {}
        for kind in self.kinds:
            mask = causal
            if kind == "sliding_attention" and self.window is not None:
                mask = causal & (column > position - self.window)
            elif kind == "chunked_attention" and self.chunk is not None:
                mask = causal & (column // self.chunk == position // self.chunk)
            if self.additive:
                lowest = torch.finfo(dtype).min
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
            masks[kind] = mask
        return masks if self.mapping else masks[self.kinds[0]]


def has_own_window(model: Any) -> bool:
    """Does a layer of a model have its own mask table, with a window in it?

    GPT-Neo's local layers do. They index the table from the end of the longest row, so no mask that
    a model is given makes a window for a shorter row.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    tables = [table for table in decoder.buffers() if table.dtype in (torch.bool, torch.uint8)]
    square = [table for table in tables if table.dim() > 1 and table.shape[-1] == table.shape[-2]]
    # Without a window the last position attends to the first one.
    return any(not bool(table[..., -1, 0].all()) for table in square)


@dataclass(frozen=True, slots=True)
class MaskedForward:
    """A model's own forward over the rows of a cache.

    Attributes:
        model: called as ``transformers`` calls a causal LM.
        form: of its masks.
        context: the number of its positions.
        rope: its rotary embeddings, where their factors depend on a text's length.
        own_positions: its parts that compute positions of their own.
    """

    model: Any
    form: MaskForm
    context: int = 2**30
    rope: LongRope | None = None
    own_positions: OwnPositions | None = None

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        plan, device = cache.plan, self.model.device
        rope = self.rope.per_row(plan.long) if self.rope else nullcontext()
        own = self.own_positions
        with rope, own.per_row(plan, device) if own else nullcontext():
            output = self.model(
                input_ids=tokens.to(device),
                # Padding may be beyond the end of a table of positions.
                position_ids=plan.columns.clamp(max=self.context - 1).to(device),
                attention_mask=self.form.masks(plan, device, self.model.dtype),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: Tensor = output.logits[:, -keep:]
        return logits
