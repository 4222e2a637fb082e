"""A GGUF file that llama.cpp runs in this process, as a model of the pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from baco.kv_cache.batched import Forward
from baco.kv_cache.protocol import RowSize
from baco.models.caches.llama_cpp import JointLlamaCppKVCache, LlamaCppKVCache
from baco.models.llama_cpp.context import CPU_CHUNK, GPU_CHUNK, MAX_SEQUENCES, LlamaContext
from baco.models.llama_cpp.library import ENGINE
from baco.models.llama_cpp.weights import LlamaWeights
from baco.models.model import PairModel
from baco.models.size import ForwardSize, ModelSize

# Bytes of a number inside a forward.
_NUMBER_BYTES = 4
# Formats whose matrices llama.cpp lays out for batches on a CPU.
_BATCHED = ("Q4_0", "Q4_K", "IQ4_NL")
# Sequences that are kept free for prompts and texts beside the rows.
_PROMPTS = 32


@dataclass
class LlamaCppModel(PairModel):
    """A model of the pair whose logits llama.cpp computes.

    Attributes:
        model: its weights.
    """

    model: LlamaWeights

    @property
    def weights_format(self) -> str:
        device = "gpu" if self.model.on_gpu else "cpu"
        bits = f"{self.model.bits:.1f} bits a weight"
        return f"{self.model.format}, {bits}, by {ENGINE} on {device}"

    @cached_property
    def context(self) -> int:
        return self.model.context

    @cached_property
    def long_rope(self) -> None:
        return None

    @cached_property
    def size(self) -> ModelSize:
        return ModelSize(self.model.layers, self.model.parameters, self.model.bytes)

    @cached_property
    def embedding_rows(self) -> int:
        return self.model.vocabulary_size

    @property
    def damage_message(self) -> str:
        return (
            f"the logits of {self.name} are NaN or infinite, as llama.cpp computes them; its "
            "weights may be damaged: fetch the file again, or try --backend local"
        )

    @torch.inference_mode()
    def score(self, ids: Sequence[int] | Tensor) -> Tensor:
        tokens = torch.as_tensor(ids).reshape(-1).tolist()
        chunks = self.new_cache().score(tokens, self.prefill_chunk)
        return torch.cat([self.checked_logits(chunk).clone() for chunk in chunks])

    def keep_hidden_states(self) -> int:
        raise self._without_hidden_states("llama.cpp computes its logits; use --backend local")

    @property
    def forward(self) -> Forward | None:
        return None

    @property
    def can_roll_back(self) -> bool:
        return not self.model.recurrent

    @property
    def max_rows(self) -> int:
        return (MAX_SEQUENCES - _PROMPTS) // (2 if self.model.window else 1)

    @property
    def library_bytes(self) -> int:
        return self.forward_size.bytes(1, self.prefill_chunk, 1)

    @property
    def kernels(self) -> str:
        if self.model.on_gpu:
            return "cuda"
        return "llama.cpp, batches" if self.model.format.startswith(_BATCHED) else "llama.cpp"

    @property
    def prefill_chunk(self) -> int:
        return GPU_CHUNK if self.model.on_gpu else CPU_CHUNK

    @property
    def prefills_in_chunks(self) -> bool:
        return True

    def new_cache(self) -> LlamaCppKVCache:
        return LlamaCppKVCache(
            LlamaContext(self.model), self.replace_unknown_ids, size=self.row_size
        )

    def new_joint_cache(self, aligned: "LlamaCppModel") -> JointLlamaCppKVCache:
        """An empty cache for the rows of this model and of the same one under another prompt."""
        known = (self.replace_unknown_ids, aligned.replace_unknown_ids)
        return JointLlamaCppKVCache(LlamaContext(self.model), known, self.row_size)

    @cached_property
    def row_size(self) -> RowSize:
        return LlamaCppKVCache(LlamaContext(self.model), self.replace_unknown_ids).row_size()

    @cached_property
    def forward_size(self) -> ForwardSize:
        weights = self.model
        widest = max(weights.width, 4 * weights.number("feed_forward_length"))
        numbers = 12 * weights.width + widest + weights.vocabulary_size
        return ForwardSize(_NUMBER_BYTES * numbers, 0, 0, 0)

    def compile(self) -> str | None:
        return "llama.cpp runs it"

    @property
    def path(self) -> str:
        if self.model.recurrent:
            return "llama.cpp, one row at a time and without drafts"
        return "llama.cpp, all rows at once"
