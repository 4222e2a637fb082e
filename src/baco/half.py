"""One half of a pair: a causal language model, its tokenizer, and what it may be asked."""

import contextlib
import inspect
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from baco.compiled import Compiled
from baco.engine.cache import CacheSize, SlotCache
from baco.engine.masks import Masked, MaskForm
from baco.engine.native import NativeStore
from baco.engine.reread import RereadStore
from baco.engine.speculation import Size
from baco.engine.store import Forward, SlotStore, Store, piece_for
from baco.lean import Lean
from baco.packing import weights
from baco.recorded import Recorded

log = logging.getLogger("baco")
progress = logging.getLogger("baco.compiling")

# The context window of a model that names none.
UNBOUNDED = 2**30
# What configurations call the width of a layer, what is in the middle of it, and its heads.
_HIDDEN = ("hidden_size", "d_model")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "mlp_hidden_size")
_HEADS = ("num_attention_heads",)
# Tokens of a row up to which attention may keep the scores of all heads.
_FEW = 32
_CHOSEN = ("num_experts_per_tok", "moe_topk")
# Bytes of a number while a forward works on it: sums are often taken in float32.
_HELD = 4


@dataclass(frozen=True, slots=True)
class ForwardSize:
    """About how many bytes a forward's own tensors take at most, without its logits.

    Attributes:
        token: for each token that is read.
        few, many: for each of them and each token that it looks at, where few tokens of a row are
            read and where many are.
        repeated: for each row and each token that it looks at: keys and values laid out anew.
        alone: rows are read one after the other.
    """

    token: int
    few: int
    many: int
    repeated: int
    alone: bool = False

    def bytes(self, rows: int, span: int, columns: int) -> int:
        """Of so many rows, of each of which ``span`` tokens are read that look at ``columns``."""
        rows = min(rows, 1) if self.alone else rows
        look = self.few if span <= _FEW else self.many
        return rows * (span * (self.token + look * columns) + self.repeated * columns)


@dataclass
class Half:
    """A model that ``transformers`` loads as a causal LM.

    Attributes:
        name: hub id or folder, for messages.
        model: the ``transformers`` (or PEFT) model, in evaluation mode.
        tokenizer: its own tokenizer.
        bare: run a PEFT model without its adapter, as the base half that shares its weights.
        width: V, rows of logits are cut or filled up to the pair's common vocabulary.
        unknown: bool [V], ids this half does not have.
    """

    name: str
    model: Any
    tokenizer: Any
    bare: bool = False
    width: int = 0
    unknown: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def held(self) -> str:
        """In which numbers its weights are held, and where: ``bfloat16 on cpu``."""
        numbers = str(self.model.dtype).removeprefix("torch.")
        if getattr(self.model, "is_quantized", False):
            sizes = [(size, stored) for _, size, stored in weights(self.model)]
            bits = 8 * sum(stored for _, stored in sizes) / sum(size for size, _ in sizes)
            numbers = f"{bits:.1f} bits a weight, {numbers} sums"
        return f"{numbers} on {self.device}"

    @property
    def context(self) -> int:
        """Context window in tokens; UNBOUNDED where the model names none."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
        return next((int(v) for n in names if (v := getattr(config, n, None))), UNBOUNDED)

    @cached_property
    def size(self) -> Size:
        """What a forward reads and multiplies; embeddings that are only looked up do not count."""
        sizes = [(size, stored) for _, size, stored in weights(self.model)]
        config = self.model.config.get_text_config()
        looked_up = 0 if config.tie_word_embeddings else self._rows * config.hidden_size
        parameters, stored = (sum(column) for column in zip(*sizes, strict=True))
        share = 1 - looked_up / max(1, parameters)
        layers = int(getattr(config, "num_hidden_layers", 1))
        return Size(layers, int(parameters * share), int(stored * share))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a text for this model."""
        found: set[Any] = set()
        places = (getattr(self.model, "generation_config", None), self.model.config, self.tokenizer)
        for place in places:
            ends = getattr(place, "eos_token_id", None)
            found |= set(ends if isinstance(ends, list | tuple) else [ends]) - {None}
        return frozenset(int(end) for end in found)

    def on(self, width: int, unknown: Tensor) -> "Half":
        """The same half, its rows of logits on a vocabulary of ``width`` ids."""
        return replace(self, width=width, unknown=unknown.to(self.device))

    def fit(self, logits: Tensor) -> Tensor:
        """Raw logits [..., any] on the common vocabulary: float32 [..., V], -inf where unknown."""
        logits = logits[..., : self.width].float()
        missing = self.width - logits.shape[-1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-math.inf)
        if self._some_unknown:
            logits = logits.masked_fill(self.unknown, -math.inf)
        return logits

    @cached_property
    def _some_unknown(self) -> bool:
        return bool(self.unknown.any())

    @torch.inference_mode()
    def score(self, ids: Sequence[int] | Tensor) -> Tensor:
        """One plain forward over a text: raw logits after each of its T ids, float32 [T, V]."""
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.device).reshape(1, -1)
        return self.fit(self.run(input_ids=tokens, use_cache=False).logits[0])

    def run(self, **inputs: Any) -> Any:
        """The model's own output for its own inputs, without its adapter where the half is bare."""
        inputs["input_ids"] = self.legible(inputs["input_ids"])
        with self._speaking():
            return self.model(**inputs)

    def legible(self, ids: Tensor) -> Tensor:
        """Token ids [...] with those this half has no embedding for read as its end of text.

        Only the other half says such a token, a turn's mark of its own say.
        """
        if self._rows >= self.width:
            return ids
        return ids.where(ids < self._rows, min(self.end_ids, default=0))

    @cached_property
    def _rows(self) -> int:
        """How many tokens the model has an embedding for."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def piece(self) -> int:
        """Tokens of a prompt that are read at once."""
        return piece_for(self.device)

    @property
    def rows_of_logits(self) -> int:
        """Entries of a row of logits as the model gives it."""
        return max(self.width, self._rows)

    @property
    def rewinds(self) -> bool:
        """Can its cache take back what was read, so that drafting costs no second reading?"""
        return self._forward is not None

    def store(self) -> Store:
        """A fresh cache for this half: one batched forward a step where the architecture can."""
        forward = self._forward
        if isinstance(forward, Legible) and isinstance(forward.forward, Recorded):
            return forward.forward.store(forward)
        if forward is not None:
            lean = isinstance(forward, Legible) and isinstance(forward.forward, Lean)
            return SlotStore(forward, shares=lean, piece=self.piece)
        runner = _Runner(self)
        if not self._state_is_apart:
            return RereadStore(runner)
        return NativeStore(runner, self.piece if self._state_reads_on else None)

    @cached_property
    @torch.inference_mode()
    def cache_size(self) -> CacheSize:
        """What a row of its cache takes. Measured, as architectures keep very different things."""
        if self._forward is not None:
            return SlotStore(self._forward).size()
        return self.store().size()

    @cached_property
    def forward_size(self) -> ForwardSize:
        """What a forward's own tensors take, estimated from the model's configuration."""
        config = self.model.config.get_text_config()
        hidden, inner, heads = (_most(config, names) for names in (_HIDDEN, _INNER, _HEADS))
        width = _most(config, ("head_dim", "v_head_dim")) or hidden // max(1, heads)
        inner = max(inner, _most(config, ("moe_intermediate_size",)) * _most(config, _CHOSEN))
        token = _HELD * (12 * max(hidden, heads * width) + 4 * (inner or 4 * hidden))
        scores = 4 * _HELD * heads  # as they are, scaled, masked, and their softmax
        lean = isinstance(self._forward, Legible)
        if not lean:
            eager = getattr(config, "_attn_implementation", None) != "sdpa"
            many = few = scores if eager else 2 * _HELD
        else:
            group = heads // max(1, _most(config, ("num_key_value_heads",)))
            many = 2 * _HELD * (group + 1)  # the mask
            few = max(many, scores)
        repeated = 0 if lean else 2 * _HELD * heads * width
        return ForwardSize(token, few, many, repeated, alone=self._forward is None)

    def compile(self) -> str | None:
        """Decode without Python in the forward, where that can be: compiled for a CPU
        (:mod:`baco.compiled`), recorded on a CUDA device (:mod:`baco.recorded`).

        Returns:
            Why it cannot; it then decodes as before.
        """
        plain = self._forward
        if not isinstance(plain, Legible) or not isinstance(plain.forward, Lean):
            return f"{type(self.model).__name__} runs as it is in transformers"
        lean, kind = plain.forward, self.device.type
        if kind not in ("cpu", "cuda"):
            return f"forwards are compiled on a CPU and recorded on a CUDA device, not on {kind}"
        if kind == "cpu":
            progress.info("compiling %s, which takes a minute the first time", self.name)
        try:
            made = Compiled(lean) if kind == "cpu" else Recorded(lean)
            made.warm()
        except Exception as error:  # whatever a compiler, and what it calls, has to say
            return next(iter(str(error).splitlines()), type(error).__name__)
        self._forward = Legible(self, made)
        return None

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        with self.model.disable_adapter() if self.bare else contextlib.nullcontext():
            yield

    @cached_property
    @torch.inference_mode()
    def _forward(self) -> Forward | None:
        """The fastest forward with which rows of different lengths read as they do alone.

        Tried out on a few tokens rather than deduced: the architectures are many, and one that
        reads its mask or its positions another way must not decode wrongly in silence.
        """
        for candidate in self._forwards():
            if self._reads_right(SlotStore(candidate)):
                return candidate
        return None

    @cached_property
    @torch.inference_mode()
    def _state_is_apart(self) -> bool:
        """Does the model hand its state out, so that rows can take turns? Tried out too."""
        apart = self._reads_right(NativeStore(_Runner(self)))
        how = (
            "does not take a batch of rows of different lengths: its rows are decoded one by one"
            if apart
            else "keeps its state to itself: its texts are read anew, one by one, at every token"
        )
        log.warning("%s (%s) %s", self.name, type(self.model).__name__, how)
        return apart

    @cached_property
    @torch.inference_mode()
    def _state_reads_on(self) -> bool:
        """Does a state take several more tokens at a time? Some models begin anew instead."""
        text = list(range(1, 8))
        whole = self.fit(NativeStore(_Runner(self))._read({}, text)[0])[0]
        try:
            *_, last = NativeStore(_Runner(self), 3).after_each(text, 3)
        except Exception as error:
            log.debug("%s reads prompts whole: %s", self.name, error)
            return False
        share = 1e-3 if self.model.dtype == torch.float32 else 0.05
        return _close(whole, self.fit(last)[-1], share)

    @cached_property
    def keeps(self) -> bool:
        """Can the model be told of how many last tokens the logits are wanted?"""
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        return "logits_to_keep" in inspect.signature(model.forward).parameters

    def _reads_right(self, store: Store) -> bool:
        """Do two rows of different lengths in one cache read as they do alone?"""
        texts = [[1, 2, 3, 4, 5], [6, 7]]
        alone = [self.score(text)[-1] for text in texts]
        try:
            for text in texts:
                store.admit(store.prefill(text[:-1]), 1)
            last = torch.tensor([[text[-1]] for text in texts])
            together = self.fit(store.read(last, [1, 1], 1)[:, 0])
        except Exception as error:
            log.debug("%s does not go with %s: %s", self.name, type(store).__name__, error)
            return False
        share = 0.02 if self.model.dtype == torch.float32 else 0.1
        return all(_close(a, b, share) for a, b in zip(alone, together, strict=True))

    def _forwards(self) -> Iterator[Forward]:
        """What may be a forward over many rows, the fastest first."""
        lean = Lean.of(self.model)
        if lean is not None:
            yield Legible(self, lean)
        form = MaskForm.of(self.model.config)
        if form is not None:
            for candidate in (form, replace(form, mapping=not form.mapping)):
                yield Masked(_Runner(self), candidate, self.context)


class _Runner:
    """The half's model as a cache store calls it: adapter off where the half is the bare one."""

    def __init__(self, half: Half) -> None:
        self._half = half
        self.device, self.dtype = half.model.device, half.model.dtype

    def __call__(self, **inputs: Any) -> Any:
        if not self._half.keeps:
            inputs.pop("logits_to_keep", None)
        return self._half.run(**inputs)


@dataclass(frozen=True, slots=True)
class Legible:
    """A lean forward, or one made of it, given only tokens the half has an embedding for."""

    half: Half
    forward: Forward

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        return self.forward(self.half.legible(tokens), cache, keep)


def compile_halves(halves: Iterable[Half]) -> None:
    """Compile what can be; one warning says of the others why they cannot."""
    refused: dict[str, list[str]] = {}
    for half in halves:
        reason = half.compile()
        if reason is not None:
            refused.setdefault(reason, []).append(half.name)
    for reason, names in refused.items():
        log.warning("not compiled: %s (%s)", reason, ", ".join(names))


def _close(a: Tensor, b: Tensor, share: float) -> bool:
    """Equal up to the rounding of the model's arithmetic, a share of the spread of the logits."""
    known = a > -math.inf
    spread = float(a[known].std()) + 1e-6
    return bool((a[known] - b[known]).abs().max() < share * spread)


def _most(config: Any, names: Iterable[str]) -> int:
    """The largest number that a configuration gives under any of some names, 0 for none."""
    found: list[int] = [0]
    for name in names:
        value = getattr(config, name, None)
        found += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]
    return max(found)
