"""One forward for both models of a pair that share their weights.

One model under two prompts, and a base model with its adapter, multiply with the same weights. Rows
of both in one forward read these weights once.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from baco.kv_cache.batched import Forward
from baco.kv_cache.joint import JointKVCache
from baco.kv_cache.slots import SlotCache
from baco.models.caches.llama_cpp import JointLlamaCppKVCache
from baco.models.forward.adapted import why_not_mixed
from baco.models.forward.cuda_graphs import CudaGraphForward
from baco.models.forward.masked import MaskedForward
from baco.models.forward.selection import ClampedForward, shares_prompts
from baco.models.llama_cpp_model import LlamaCppModel
from baco.models.model import PairModel


@dataclass(frozen=True, slots=True)
class JointForward:
    """The forward of both models over rows of the base model, followed by rows of the aligned one.

    Attributes:
        base, aligned: the models.
        forward: of their weights.
    """

    base: PairModel
    aligned: PairModel
    forward: Forward

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        base, aligned = tokens[: cache.plan.split], tokens[cache.plan.split :]
        known = self.base.replace_unknown_ids(base), self.aligned.replace_unknown_ids(aligned)
        if known[0] is not base or known[1] is not aligned:
            tokens = torch.cat(known)
        return self.forward(tokens, cache, keep)

    def new_cache(self) -> JointKVCache:
        """An empty cache for rows of both models."""
        alone = self.base.forward, self.aligned.forward
        assert alone[0] is not None
        assert alone[1] is not None
        shares, chunk = shares_prompts(self.forward), self.base.prefill_chunk
        return JointKVCache((alone[0], alone[1]), self, shares=shares, chunk=chunk)


@dataclass(frozen=True, slots=True)
class LlamaCppJoint:
    """One model of llama.cpp under two prompts.

    Attributes:
        base, aligned: the models.
    """

    base: LlamaCppModel
    aligned: LlamaCppModel

    def new_cache(self) -> JointLlamaCppKVCache:
        """An empty cache for rows of both models."""
        return self.base.new_joint_cache(self.aligned)


class MixedCall:
    """A PEFT model as forwards call it, with its adapter for the rows behind a plan's split."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device, self.dtype = model.device, model.dtype
        (self._name,) = model.peft_config

    def __call__(self, **inputs: Any) -> Any:
        rows, cache = len(inputs["input_ids"]), inputs["past_key_values"]
        split = cache.plan.split
        names = ["__base__"] * split + [self._name] * (rows - split)
        return self._model(adapter_names=names, **inputs)


def joint_forward(base: PairModel, aligned: PairModel) -> JointForward | LlamaCppJoint | str:
    """The forward of both models; where there is none, the reason, for a user."""
    if base.model is not aligned.model:
        return "each model has its own weights"
    if isinstance(base, LlamaCppModel) and isinstance(aligned, LlamaCppModel):
        if not base.can_roll_back:
            return "rows of a recurrent model are read one by one"
        return LlamaCppJoint(base, aligned)
    if base.forward is None or aligned.forward is None:
        return "rows are not read in one batch"
    if base.long_rope is not None:
        return "rows are read again where they grow beyond the original context"
    forward = aligned.forward
    if isinstance(forward, ClampedForward):
        forward = forward.forward
        if isinstance(forward, CudaGraphForward):
            return "CUDA graphs are recorded for the rows of one model"
    elif base.adapter_off:
        reason = why_not_mixed(base.model)
        if reason is not None:
            return f"the adapter {reason}"
        assert isinstance(forward, MaskedForward)
        forward = replace(forward, model=MixedCall(base.model))
    return JointForward(base, aligned, forward)
