"""A model of the pair: a causal language model with its tokenizer, its limits and its logits."""

import contextlib
import logging
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from baco.errors import BacoError, DamagedLogitsError, prompt_too_long
from baco.kv_cache.batched import Forward, prefill_chunk
from baco.kv_cache.protocol import KVCache, RowSize
from baco.models.caches.per_row import PerRowKVCache
from baco.models.caches.uncached import NoKVCache
from baco.models.context import UNBOUNDED, context_of
from baco.models.forward.accelerated import accelerated
from baco.models.forward.compiled import CompiledForward
from baco.models.forward.cuda_graphs import CudaGraphForward
from baco.models.forward.dense import DenseForward
from baco.models.forward.recurrent import RecurrentForward
from baco.models.forward.selection import (
    ClampedForward,
    ModelCall,
    batched_cache,
    fastest_forward,
    find_readings,
    warn_of_slow_reading,
    why_not_dense,
    why_not_together,
)
from baco.models.hidden_states import HeadWithHiddenStates
from baco.models.loading import explain_errors
from baco.models.rope import LongRope
from baco.models.size import ForwardSize, ModelSize, bits_per_weight, forward_size, model_size
from baco.models.trial import VOCABULARY, Readings

log = logging.getLogger("baco")

# The number of token ids that a message lists.
_LISTED = 5
# Two models of a pair may share a head, and two threads may decode with one model.
_CHANGING_HEAD = Lock()


@dataclass
class PairModel:
    """A model that ``transformers`` loads as a causal LM.

    Attributes:
        name: hub id or folder, for messages.
        model: the ``transformers`` (or PEFT) model, in evaluation mode.
        tokenizer: its own tokenizer.
        adapter_off: run a PEFT model without its adapter. The base model of a pair whose aligned
            model is an adapter is run so; the weights are held once.
        vocab_size: V, the size of the pair's common vocabulary, which rows of logits are cut or
            padded to.
        unknown_ids: bool [V], ids that this model does not have.
        rows_without_adapter: rows of its embedding, where the other model's adapter added more.
    """

    name: str
    model: Any
    tokenizer: Any
    adapter_off: bool = False
    vocab_size: int = 0
    unknown_ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    rows_without_adapter: int | None = None

    # --- properties of the model ------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def weights_format(self) -> str:
        """The number format of its weights and their device, as in ``bfloat16 on cpu``."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        if getattr(self.model, "is_quantized", False):
            dtype = f"{bits_per_weight(self.model):.1f} bits a weight, {dtype} sums"
        return f"{dtype} on {self.device}"

    @cached_property
    def context(self) -> int:
        """Context window in tokens; `baco.models.context.UNBOUNDED` where nothing limits it."""
        return context_of(self.model.config, self.model)

    @cached_property
    def long_rope(self) -> LongRope | None:
        """The rotary embeddings whose factors depend on a text's length, if it has such."""
        return LongRope.of(self.model)

    @cached_property
    def size(self) -> ModelSize:
        """What a forward reads and multiplies."""
        size = model_size(self.model, self.embedding_rows)
        if isinstance(self._forward, RecurrentForward):
            return replace(size, recurrent=self._forward.weight_bytes / size.bytes)
        return size

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text for this model."""
        ids: set[Any] = set()
        sources = getattr(self.model, "generation_config", None), self.model.config, self.tokenizer
        for source in sources:
            ends = getattr(source, "eos_token_id", None)
            ids |= set(ends if isinstance(ends, list | tuple) else [ends]) - {None}
        with explain_errors("the end tokens of", self.name):
            return frozenset(int(end) for end in ids)

    @cached_property
    def embedding_rows(self) -> int:
        """The number of tokens that the model has an embedding for."""
        if self.rows_without_adapter is not None:
            return self.rows_without_adapter
        return count_embedding_rows(self.model)

    @cached_property
    def ids_without_embedding(self) -> frozenset[int]:
        """Ids that its tokenizer has and its embedding has no row for."""
        ids = self.tokenizer.get_vocab().values()
        return frozenset(token for token in ids if token >= self.embedding_rows)

    def list_tokens(self, ids: Collection[int]) -> str:
        """Some token ids and their names, for a message."""
        listed = sorted(ids)[:_LISTED]
        names = zip(listed, self.tokenizer.convert_ids_to_tokens(listed), strict=True)
        more = [f"{len(ids) - len(listed)} more"] if len(ids) > len(listed) else []
        return ", ".join([*(f"{token} {name!r}" for token, name in names), *more])

    # --- prompts ----------------------------------------------------------------------------------

    def check_prompt(self, name: str, ids: Collection[int], context: float = math.inf) -> None:
        """Refuse a prompt that the model cannot read, or that leaves no room for an answer.

        Args:
            name: ``base`` or ``aligned``, for the message.
            ids: the prompt.
            context: a context window shorter than the model's own.

        Raises:
            BacoError: the prompt fills the context window, or has a token without an embedding.
        """
        self.check_length(name, len(ids), context)
        without = self.ids_without_embedding
        missing = without.intersection(ids) if without else ()
        if missing:
            raise BacoError(
                f"the prompt, as the {name} model reads it, has tokens without an embedding: "
                f"{self.list_tokens(missing)}; the model has {self.embedding_rows} rows, so leave "
                "them out"
            )

    def check_length(self, name: str, length: int, context: float = math.inf) -> None:
        """The check of the context window alone, for a prompt of ``length`` tokens."""
        context = min(context, self.context)
        if length >= context:
            raise prompt_too_long(length, name, int(context))

    # --- logits -----------------------------------------------------------------------------------

    def with_common_vocab(self, vocab_size: int, unknown_ids: Tensor) -> "PairModel":
        """The same model with its logits on a vocabulary of ``vocab_size`` ids."""
        return replace(self, vocab_size=vocab_size, unknown_ids=unknown_ids.to(self.device))

    def to_common_vocab(self, logits: Tensor) -> Tensor:
        """Raw logits [..., any] on the common vocabulary: float32 [..., V], -inf where unknown."""
        if (head := self._wide_head) is not None:
            logits = logits[..., : head.vocabulary]
        own = min(self.vocab_size, self.rows_without_adapter or self.vocab_size)
        logits = logits[..., :own].float()
        missing = self.vocab_size - logits.shape[-1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-math.inf)
        if self._has_unknown_ids:
            logits = logits.masked_fill(self.unknown_ids, -math.inf)
        return logits

    def checked_logits(self, logits: Tensor) -> Tensor:
        """As `to_common_vocab`, checked as by `check_logits`."""
        rows = self.to_common_vocab(logits)
        self.check_logits(rows.amax(dim=-1))
        return rows

    def check_logits(self, maxima: Tensor) -> None:
        """Check rows of logits by their maxima [...]. It waits for the device.

        Raises:
            DamagedLogitsError: a row holds NaN, +inf or nothing but -inf.
        """
        if not bool(maxima.isfinite().all()):
            raise DamagedLogitsError(self.damage_message)

    @property
    def damage_message(self) -> str:
        """The error for logits that are NaN or infinite: the likely cause, and what to do."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        if getattr(self.model, "is_quantized", False):
            advice = "quantised weights may be damaged: load it without --quantize"
        elif self.model.dtype == torch.float16:
            advice = "float16 overflows in some models: load it in bfloat16 or float32 (--dtype)"
        elif self.model.dtype == torch.float32:
            advice = "its weights may be damaged: download it again"
        else:
            advice = "its weights may be damaged: download it again, or try --dtype float32"
        return f"the logits of {self.name} are NaN or infinite, held in {dtype}; {advice}"

    @cached_property
    def _has_unknown_ids(self) -> bool:
        return bool(self.unknown_ids.any())

    @property
    def logits_width(self) -> int:
        """Entries of a row of logits as the model returns it."""
        return max(self.vocab_size, self.embedding_rows + self.hidden_width)

    @torch.inference_mode()
    def score(self, ids: Sequence[int] | Tensor) -> Tensor:
        """One plain forward over a text: raw logits after each of its T ids, float32 [T, V].

        Raises:
            DamagedLogitsError: logits are NaN or infinite.
        """
        return self.checked_logits(self._read_text(ids))

    @torch.inference_mode()
    def score_with_hidden_states(self, ids: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """As `score`, and the hidden states that the logits are of, float32 [T, D]."""
        self.keep_hidden_states()
        logits = self._read_text(ids)
        return self.checked_logits(logits), self.hidden_states(logits)

    def _read_text(self, ids: Sequence[int] | Tensor) -> Tensor:
        """The raw logits [T, width] of a plain forward over a text, without a cache."""
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.device).reshape(1, -1)
        logits: Tensor = self.run(input_ids=tokens, use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def keep_hidden_states(self) -> int:
        """From now on, return the last hidden states behind the logits of every forward.

        Returns:
            Their width.

        Raises:
            BacoError: the model does not return them.
        """
        with _CHANGING_HEAD:
            if not self.hidden_width:
                self._check_uncompiled()
                head = self._head
                plain, width = getattr(head, "forward", None), self._read_text([0]).shape[-1]
                if plain is not None:
                    head.forward = HeadWithHiddenStates(plain)
                    wider = self._read_text([0]).shape[-1]
                    if not self.hidden_width or wider != width + self.hidden_width:
                        head.forward = plain
                if not self.hidden_width:
                    raise self._without_hidden_states("its head is not one layer")
            return self.hidden_width

    def _check_uncompiled(self) -> None:
        forward = self._forward
        accelerated = CompiledForward | CudaGraphForward
        if isinstance(forward, ClampedForward) and isinstance(forward.forward, accelerated):
            raise self._without_hidden_states("it is compiled: load the pair without --compile")

    def _without_hidden_states(self, reason: str) -> BacoError:
        return BacoError(f"{self.name} returns no hidden states for routers to read: {reason}")

    @property
    def hidden_width(self) -> int:
        """D, the width of the hidden states behind its logits; 0 where it returns none."""
        return 0 if self._wide_head is None else self._wide_head.width

    def hidden_states(self, logits: Tensor) -> Tensor:
        """The hidden states behind raw logits [..., V + D]: float32 [..., D]."""
        assert self._wide_head is not None
        return logits[..., self._wide_head.vocabulary :].float()

    @property
    def _wide_head(self) -> HeadWithHiddenStates | None:
        """The forward of its head, where that returns hidden states too."""
        forward = None if self._head is None else self._head.__dict__.get("forward")
        return forward if isinstance(forward, HeadWithHiddenStates) else None

    @cached_property
    def _head(self) -> Any:
        find = getattr(self.model, "get_output_embeddings", None)
        return None if find is None else find()

    def run(self, **inputs: Any) -> Any:
        """The output of the ``transformers`` model, without its adapter where that is off."""
        inputs["input_ids"] = self.replace_unknown_ids(inputs["input_ids"])
        with self.model.disable_adapter() if self.adapter_off else contextlib.nullcontext():
            return self.model(**inputs)

    def replace_unknown_ids(self, ids: Tensor) -> Tensor:
        """Replace ids outside this model's embedding by its end-of-text id.

        They occur only for special tokens that the other model alone has.
        """
        if self.embedding_rows >= self.vocab_size:
            return ids
        return ids.where(ids < self.embedding_rows, self._known_end)

    @cached_property
    def _known_end(self) -> int:
        return min((end for end in self.end_ids if end < self.embedding_rows), default=0)

    # --- decoding ---------------------------------------------------------------------------------

    @property
    def forward(self) -> Forward | None:
        """The forward that reads many rows at once; None where there is none."""
        return self._forward

    @property
    def can_roll_back(self) -> bool:
        """Can its cache remove tokens that were read, so that drafts need no second reading?"""
        return self._forward is not None

    @property
    def max_rows(self) -> int:
        """How many rows its cache holds at most."""
        return UNBOUNDED

    @property
    def library_bytes(self) -> int:
        """Bytes that its cache holds for forwards, whatever they read."""
        return 0

    @property
    def kernels(self) -> str:
        """What multiplies its weights, as `baco.engine.speculative.cost_model` knows it."""
        return self.device.type

    @property
    def prefill_chunk(self) -> int:
        """Tokens of one chunk of a prompt."""
        return prefill_chunk(self.device)

    @property
    def prefills_in_chunks(self) -> bool:
        """Can a prompt be read in chunks? Not by a state that takes one token at a time."""
        if isinstance(self._forward, RecurrentForward):
            return self._forward.continues
        return self._forward is not None or (self._reads_per_row and self._readings.in_chunks)

    def new_cache(self) -> KVCache:
        """An empty cache for this model: one batched forward per step where that is possible."""
        forward = self._forward
        if isinstance(forward, ClampedForward) and isinstance(forward.forward, CudaGraphForward):
            return forward.forward.new_cache(forward)
        if forward is not None:
            return batched_cache(self, forward)
        call = ModelCall(self)
        if not self._reads_per_row:
            return NoKVCache(call)
        return PerRowKVCache(call, self.prefill_chunk if self._readings.in_chunks else None)

    @cached_property
    @torch.inference_mode()
    def row_size(self) -> RowSize:
        """Bytes of a row of its cache, measured: architectures keep very different states."""
        cache = batched_cache(self, self._forward) if self._forward else self.new_cache()
        return cache.row_size()

    @cached_property
    def forward_size(self) -> ForwardSize:
        """Bytes of a forward's own tensors, estimated from the model's configuration."""
        dense, row_by_row = isinstance(self._forward, ClampedForward), self._forward is None
        return forward_size(self.model.config, dense=dense, row_by_row=row_by_row)

    def compile(self) -> str | None:
        """Decode without Python in the forward where that is possible; experimental.

        Returns:
            Why it is not possible; decoding is then as before.
        """
        plain = self._forward
        if hasattr(self.model, "peft_config"):
            return f"{type(self.model).__name__} has an adapter"
        if not isinstance(plain, ClampedForward) or not isinstance(plain.forward, DenseForward):
            return f"{type(self.model).__name__} runs as it is in transformers"
        forward = accelerated(plain.forward, self.name)
        if isinstance(forward, str):
            return forward
        self._forward = ClampedForward(self, forward)
        return None

    @property
    def path(self) -> str:
        """How its rows are read, for a user: the fastest way that fits its architecture."""
        if isinstance(self._forward, ClampedForward):
            return "BACo's own forward, all rows at once"
        if isinstance(self._forward, RecurrentForward):
            return (
                "the forward of transformers, all rows at once, with a recurrent state for each row"
            )
        if self._forward is not None:
            reason = why_not_dense(self)
            return (
                "the forward of transformers, all rows at once (BACo's own does not fit: the model "
                f"{reason})"
            )
        reason = why_not_together(self, self._reads_per_row)
        if self._reads_per_row:
            return f"its own cache, one row at a time and without drafts ({reason})"
        return f"reading each text anew at every token, without drafts ({reason})"

    def small(self, model: Any) -> "PairModel":
        """A small model of the same architecture, for trials."""
        return PairModel(self.name, model, self.tokenizer, vocab_size=VOCABULARY)

    @cached_property
    def _readings(self) -> Readings:
        return find_readings(self)

    @cached_property
    def _forward(self) -> Forward | None:
        return fastest_forward(self, self._readings)

    @cached_property
    def _reads_per_row(self) -> bool:
        """Whether rows are read one at a time from the model's own cache, else without a cache."""
        warn_of_slow_reading(self, self._readings.per_row)
        return self._readings.per_row


def count_embedding_rows(model: Any) -> int:
    """The number of rows of a model's embedding, which an adapter may wrap."""
    module = model.get_input_embeddings()
    while not hasattr(module, "num_embeddings"):
        wrapped = hasattr(module, "get_base_layer")
        module = module.get_base_layer() if wrapped else module.original_module
    return int(module.num_embeddings)


def compile_models(models: Iterable[PairModel]) -> None:
    """Compile what can be compiled; one warning per reason names the models that cannot."""
    reasons: dict[str, list[str]] = {}
    for model in models:
        reason = model.compile()
        if reason is not None:
            reasons.setdefault(reason, []).append(model.name)
    for reason, names in reasons.items():
        log.warning("not compiled: %s (%s)", reason, ", ".join(names))
