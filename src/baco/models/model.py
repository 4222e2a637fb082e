"""One half of a pair: a causal language model, its tokenizer, and what it may be asked."""

import contextlib
import inspect
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from baco.errors import BacoError, DamagedLogitsError, prompt_too_long
from baco.kv_cache.batched import BatchedKVCache, Forward, prefill_chunk
from baco.kv_cache.protocol import KVCache, RowSize, finish
from baco.kv_cache.slots import SlotCache
from baco.models.caches.long_rope import LongRopeKVCache
from baco.models.caches.per_row import PerRowKVCache
from baco.models.caches.uncached import NoKVCache
from baco.models.context import context_of, text_config
from baco.models.forward.compiled import CompiledForward
from baco.models.forward.cuda_graphs import CudaGraphForward
from baco.models.forward.llama import LlamaForward, prepare
from baco.models.forward.masked import MaskedForward, MaskForm, has_own_window
from baco.models.forward.packed_linear import weights
from baco.models.loading import explained
from baco.models.rope import LongRope
from baco.models.size import Size
from baco.models.trial import (
    VOCABULARY,
    Readings,
    architecture,
    close,
    reads_right,
    small_model,
)

log = logging.getLogger("baco")
progress = logging.getLogger("baco.compiling")

# What was found of architectures that were tried.
_TRIED: dict[tuple[str | None, bool], Readings] = {}
# Nats between a plain forward and another that is right: rounding gives some hundredths.
_SANE = 0.5
# Token ids that a message names.
_NAMED = 5
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
class PairModel:
    """A model that ``transformers`` loads as a causal LM.

    Attributes:
        name: hub id or folder, for messages.
        model: the ``transformers`` (or PEFT) model, in evaluation mode.
        tokenizer: its own tokenizer.
        bare: run a PEFT model without its adapter, as the base half that shares its weights.
        width: V, rows of logits are cut or filled up to the pair's common vocabulary.
        unknown: bool [V], ids this half does not have.
        first_rows: of its embedding, where an adapter that is not its own added rows.
    """

    name: str
    model: Any
    tokenizer: Any
    bare: bool = False
    width: int = 0
    unknown: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    first_rows: int | None = None

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

    @cached_property
    def context(self) -> int:
        """Context window in tokens; `baco.models.context.UNBOUNDED` where nothing limits it."""
        return context_of(self.model.config, self.model)

    @cached_property
    def long_rope(self) -> LongRope | None:
        """The rotary embeddings whose factors depend on the length of a text, if it has such."""
        return LongRope.of(self.model)

    def check_prompt(self, name: str, ids: Collection[int], context: float = math.inf) -> None:
        """Refuse a prompt that the model cannot read, or that leaves no room for an answer.

        Args:
            name: ``base`` or ``aligned``, for the message.
            ids: the prompt.
            context: of the model, where it is shorter than its own.

        Raises:
            BacoError: the prompt fills the context window, or has a token without an embedding.
        """
        self.check_length(name, len(ids), context)
        missing = self.without_embedding.intersection(ids) if self.without_embedding else ()
        if missing:
            raise BacoError(
                f"the prompt, as the {name} model reads it, has tokens without an embedding: "
                f"{self.spelled(missing)}; the model has {self.rows} rows, so leave them out"
            )

    def check_length(self, name: str, length: int, context: float = math.inf) -> None:
        """The first half of `check_prompt`, for a prompt of this many tokens."""
        context = min(context, self.context)
        if length >= context:
            raise prompt_too_long(length, name, int(context))

    @cached_property
    def without_embedding(self) -> frozenset[int]:
        """Ids that its own tokenizer has and the model has no embedding for."""
        ids = self.tokenizer.get_vocab().values()
        return frozenset(token for token in ids if token >= self.rows)

    def spelled(self, ids: Collection[int]) -> str:
        """Some token ids and their names, for a message."""
        some = sorted(ids)[:_NAMED]
        names = zip(some, self.tokenizer.convert_ids_to_tokens(some), strict=True)
        more = [f"{len(ids) - len(some)} more"] if len(ids) > len(some) else []
        return ", ".join([*(f"{token} {name!r}" for token, name in names), *more])

    @cached_property
    def size(self) -> Size:
        """What a forward reads and multiplies; embeddings that are only looked up do not count."""
        sizes = [(size, stored) for _, size, stored in weights(self.model)]
        config = text_config(self.model.config)
        tied = getattr(config, "tie_word_embeddings", True)
        looked_up = 0 if tied else self.rows * config.hidden_size
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
        with explained("the end tokens of", self.name):
            return frozenset(int(end) for end in found)

    def on(self, width: int, unknown: Tensor) -> "PairModel":
        """The same half, its rows of logits on a vocabulary of ``width`` ids."""
        return replace(self, width=width, unknown=unknown.to(self.device))

    def fit(self, logits: Tensor) -> Tensor:
        """Raw logits [..., any] on the common vocabulary: float32 [..., V], -inf where unknown."""
        logits = logits[..., : min(self.width, self.first_rows or self.width)].float()
        missing = self.width - logits.shape[-1]
        if missing > 0:
            logits = torch.nn.functional.pad(logits, (0, missing), value=-math.inf)
        if self._some_unknown:
            logits = logits.masked_fill(self.unknown, -math.inf)
        return logits

    def fit_checked(self, logits: Tensor) -> Tensor:
        """As `fit`, checked as by `check`."""
        rows = self.fit(logits)
        self.check(rows.amax(dim=-1))
        return rows

    def check(self, greatest: Tensor) -> None:
        """Check rows of logits by the greatest of each [...], for who waits for the device anyway.

        Raises:
            DamagedLogitsError: a row holds NaN, +inf or nothing but -inf.
        """
        if not bool(greatest.isfinite().all()):
            raise DamagedLogitsError(self.damage)

    @property
    def damage(self) -> str:
        """What to tell where its logits are NaN or infinite: why that may be, and what to do."""
        held = str(self.model.dtype).removeprefix("torch.")
        if getattr(self.model, "is_quantized", False):
            advice = "quantised weights may be damaged: load it without --quantize"
        elif self.model.dtype == torch.float16:
            advice = "float16 overflows in some models: load it in bfloat16 or float32 (--dtype)"
        elif self.model.dtype == torch.float32:
            advice = "its weights may be damaged: download it again"
        else:
            advice = "its weights may be damaged: download it again, or try --dtype float32"
        return f"the logits of {self.name} are NaN or infinite, held in {held}; {advice}"

    @cached_property
    def _some_unknown(self) -> bool:
        return bool(self.unknown.any())

    @torch.inference_mode()
    def score(self, ids: Sequence[int] | Tensor) -> Tensor:
        """One plain forward over a text: raw logits after each of its T ids, float32 [T, V].

        Raises:
            DamagedLogitsError: logits are NaN or infinite.
        """
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=self.device).reshape(1, -1)
        return self.fit_checked(self.run(input_ids=tokens, use_cache=False).logits[0])

    def run(self, **inputs: Any) -> Any:
        """The model's own output for its own inputs, without its adapter where the half is bare."""
        inputs["input_ids"] = self.replace_unknown_ids(inputs["input_ids"])
        with self._speaking():
            return self.model(**inputs)

    def replace_unknown_ids(self, ids: Tensor) -> Tensor:
        """Token ids [...] with those this half has no embedding for read as its end of text.

        Only the other half says such a token, a turn's mark of its own say.
        """
        if self.rows >= self.width:
            return ids
        return ids.where(ids < self.rows, self._known_end)

    @cached_property
    def _known_end(self) -> int:
        return min((end for end in self.end_ids if end < self.rows), default=0)

    @cached_property
    def rows(self) -> int:
        """How many tokens the model has an embedding for."""
        return embedding_rows(self.model) if self.first_rows is None else self.first_rows

    @property
    def prefill_chunk(self) -> int:
        """Tokens of one chunk of a prompt."""
        return prefill_chunk(self.device)

    @property
    def reads_in_pieces(self) -> bool:
        """Can a prompt be read in pieces? Not by a state that takes one token at a time."""
        return self._forward is not None or (self._state_is_apart and self._readings.in_pieces)

    @property
    def rows_of_logits(self) -> int:
        """Entries of a row of logits as the model gives it."""
        return max(self.width, self.rows)

    @property
    def can_roll_back(self) -> bool:
        """Can its cache take back what was read, so that drafting costs no second reading?"""
        return self._forward is not None

    def new_cache(self) -> KVCache:
        """A fresh cache for this half: one batched forward a step where the architecture can."""
        forward = self._forward
        if isinstance(forward, ClampedForward) and isinstance(forward.forward, CudaGraphForward):
            return forward.forward.new_cache(forward)
        if forward is not None:
            return self._batched(forward)
        runner = _Runner(self)
        if not self._state_is_apart:
            return NoKVCache(runner)
        return PerRowKVCache(runner, self.prefill_chunk if self._readings.in_pieces else None)

    @cached_property
    @torch.inference_mode()
    def row_size(self) -> RowSize:
        """What a row of its cache takes. Measured, as architectures keep very different things."""
        if self._forward is not None:
            return self._batched(self._forward).row_size()
        return self.new_cache().row_size()

    @cached_property
    def forward_size(self) -> ForwardSize:
        """What a forward's own tensors take, estimated from the model's configuration."""
        config = text_config(self.model.config)
        hidden, inner, heads = (_most(config, names) for names in (_HIDDEN, _INNER, _HEADS))
        width = _most(config, ("head_dim", "v_head_dim")) or hidden // max(1, heads)
        inner = max(inner, _most(config, ("moe_intermediate_size",)) * _most(config, _CHOSEN))
        token = _HELD * (12 * max(hidden, heads * width) + 4 * (inner or 4 * hidden))
        scores = 4 * _HELD * heads  # as they are, scaled, masked, and their softmax
        lean, alone = isinstance(self._forward, ClampedForward), self._forward is None
        if not lean:
            eager = getattr(config, "_attn_implementation", None) != "sdpa"
            many = few = scores if eager else 0 if alone else 2 * _HELD
        else:
            group = heads // max(1, _most(config, ("num_key_value_heads",)))
            many = 2 * _HELD * (group + 1)  # the mask
            few = max(many, scores)
        repeated = 0 if lean else 2 * _HELD * heads * width
        return ForwardSize(token, few, many, repeated, alone)

    def _batched(self, forward: Forward) -> KVCache:
        if self.long_rope is not None:
            return LongRopeKVCache(forward, self.long_rope, chunk=self.prefill_chunk)
        lean = isinstance(forward, ClampedForward) and isinstance(forward.forward, LlamaForward)
        return BatchedKVCache(forward, shares=lean, chunk=self.prefill_chunk)

    def compile(self) -> str | None:
        """Decode without Python in the forward, where that can be: compiled for a CPU
        (:mod:`baco.models.forward.compiled`), recorded on a CUDA device
        (:mod:`baco.models.forward.cuda_graphs`).

        Returns:
            Why it cannot; it then decodes as before.
        """
        plain = self._forward
        if not isinstance(plain, ClampedForward) or not isinstance(plain.forward, LlamaForward):
            return f"{type(self.model).__name__} runs as it is in transformers"
        lean, kind = plain.forward, self.device.type
        if kind not in ("cpu", "cuda"):
            return f"forwards are compiled on a CPU and recorded on a CUDA device, not on {kind}"
        if kind == "cpu":
            progress.info("compiling %s, which takes a minute the first time", self.name)
        try:
            made = CompiledForward(lean) if kind == "cpu" else CudaGraphForward(lean)
            made.warm()
        except Exception as error:  # whatever a compiler, and what it calls, has to say
            return next(iter(str(error).splitlines()), type(error).__name__)
        self._forward = ClampedForward(self, made)
        return None

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        with self.model.disable_adapter() if self.bare else contextlib.nullcontext():
            yield

    @cached_property
    @torch.inference_mode()
    def _forward(self) -> Forward | None:
        """The fastest forward with which rows of different lengths read as they do alone.

        Tried out rather than deduced: the architectures are many, and one that reads its mask or
        its positions another way must not decode wrongly in silence.
        """
        for candidate in self._forwards():
            if _kind(candidate) in self._readings.batched and self._is_sane(candidate):
                return candidate
        return None

    @property
    def path(self) -> str:
        """How its rows are read, for a user; the fastest way that fits its architecture."""
        if isinstance(self._forward, ClampedForward):
            return "BACo's own forward, all rows at once"
        if self._forward is not None:
            return "the forward of transformers, all rows at once"
        if self._state_is_apart:
            return "its own cache, one row at a time and without drafts"
        return "reading each text anew at every token, without drafts"

    @cached_property
    def _readings(self) -> Readings:
        """How its rows can be read, tried once for every architecture."""
        own = LlamaForward.of(self.model) is not None
        key = (architecture(self.model), own)
        if key in _TRIED:
            return _TRIED[key]
        small = small_model(self.model)
        if small is not None:
            if own:
                prepare(small)
            tried = PairModel(self.name, small, self.tokenizer, width=VOCABULARY)._try_out()
            if tried:
                _TRIED[key] = tried
                return tried
        # It does not take a smaller configuration.
        return self._try_out()

    @torch.inference_mode()
    def _try_out(self) -> Readings:
        """Try every way to read rows."""
        forwards = list(self._forwards())
        batched = {_kind(one) for one in forwards if self._reads_right(self._batched(one))}
        per_row = self.long_rope is None and self._reads_right(PerRowKVCache(_Runner(self)))
        return Readings(frozenset(batched), per_row, per_row and self._state_reads_on())

    def _reads_right(self, cache: KVCache) -> bool:
        rounding = 0.005 if self.model.dtype == torch.float32 else 0.1
        try:
            return reads_right(cache, self.score, self.fit, rounding)
        except Exception as error:
            log.debug("%s does not go with %s: %s", self.name, type(cache).__name__, error)
            return False

    def _state_reads_on(self) -> bool:
        """Does a state take several more tokens at a time? Some models begin anew instead."""
        text = list(range(1, 8))
        whole = self.fit(PerRowKVCache(_Runner(self))._read({}, text)[0])[0]
        try:
            *_, last = PerRowKVCache(_Runner(self), 3).score(text, 3)
        except Exception as error:
            log.debug("%s reads prompts whole: %s", self.name, error)
            return False
        return close(whole, self.fit(last)[-1], 1e-3)

    @torch.inference_mode()
    def _is_sane(self, forward: Forward) -> bool:
        """Does a forward that is right for the architecture read these weights about right?"""
        # Ids from the middle: the first ones are often tokens that were never trained.
        start = self.rows // 3
        texts = [[start + token for token in text] for text in ([0, 1, 2, 3, 4], [5, 6])]
        # The trial's own error says that this forward does not fit; one here, that no reading will.
        with explained("the model", self.name):
            alone = [self.score(text)[-1] for text in texts]
        cache = self._batched(forward)
        try:
            for text in texts:
                cache.copy_prefix(finish(cache.prefill(text[:-1])), 1)
            last = torch.tensor([[text[-1]] for text in texts])
            together = self.fit(cache.extend(last, [1, 1], 1)[:, 0])
        except Exception as error:
            log.debug("%s does not go with %s: %s", self.name, type(forward).__name__, error)
            return False
        return all(_divergence(a, b) < _SANE for a, b in zip(alone, together, strict=True))

    @cached_property
    def _state_is_apart(self) -> bool:
        """Does the model hand its state out, so that rows can take turns?"""
        apart = self._readings.per_row
        anew = "its texts are read anew, one by one, at every token"
        if apart:
            how = "takes no batch of rows of different lengths: its rows are decoded one by one"
        elif self.long_rope is None:
            how = f"hands out no state from which a text can be read on: {anew}"
        else:
            length = self.long_rope.original_length
            how = f"has other rotary factors beyond {length} tokens: {anew}"
        log.warning("%s (%s) %s", self.name, type(self.model).__name__, how)
        return apart

    @cached_property
    def keeps(self) -> bool:
        """Can the model be told of how many last tokens the logits are wanted?"""
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        return "logits_to_keep" in inspect.signature(model.forward).parameters

    def _forwards(self) -> Iterator[Forward]:
        """What may be a forward over many rows, the fastest first."""
        lean = LlamaForward.of(self.model)
        if lean is not None:
            yield ClampedForward(self, lean)
        form, rope = MaskForm.of(self.model.config), self.long_rope
        if form is None or has_own_window(self.model) or (rope is not None and not rope.modules):
            return
        for candidate in (form, replace(form, mapping=not form.mapping)):
            yield MaskedForward(_Runner(self), candidate, self.context, rope)


class _Runner:
    """The half's model as a cache store calls it: adapter off where the half is the bare one."""

    def __init__(self, half: PairModel) -> None:
        self._half = half
        self.device, self.dtype = half.model.device, half.model.dtype

    def __call__(self, **inputs: Any) -> Any:
        if not self._half.keeps:
            inputs.pop("logits_to_keep", None)
        return self._half.run(**inputs)


@dataclass(frozen=True, slots=True)
class ClampedForward:
    """A lean forward, or one made of it, given only tokens the half has an embedding for."""

    half: PairModel
    forward: Forward

    def __call__(self, tokens: Tensor, cache: SlotCache, keep: int) -> Tensor:
        return self.forward(self.half.replace_unknown_ids(tokens), cache, keep)


def embedding_rows(model: Any) -> int:
    """How many tokens a model has an embedding for; an adapter may be wrapped around it."""
    module = model.get_input_embeddings()
    while not hasattr(module, "num_embeddings"):
        wrapped = hasattr(module, "get_base_layer")
        module = module.get_base_layer() if wrapped else module.original_module
    return int(module.num_embeddings)


def compile_models(halves: Iterable[PairModel]) -> None:
    """Compile what can be; one warning says of the others why they cannot."""
    refused: dict[str, list[str]] = {}
    for half in halves:
        reason = half.compile()
        if reason is not None:
            refused.setdefault(reason, []).append(half.name)
    for reason, names in refused.items():
        log.warning("not compiled: %s (%s)", reason, ", ".join(names))


def _kind(forward: Forward) -> str:
    """What `Readings.batched` calls a forward."""
    if isinstance(forward, MaskedForward):
        return "a mask for each kind of layer" if forward.form.mapping else "one mask"
    return "own"


def _divergence(a: Tensor, b: Tensor) -> float:
    """Kullback-Leibler divergence of the distributions of two rows of logits [V], in nats."""
    first, second = (row.double().log_softmax(dim=-1) for row in (a, b))
    terms = first.exp() * (first - second)
    return float(terms[first > -math.inf].sum())


def _most(config: Any, names: Iterable[str]) -> int:
    """The largest number that a configuration gives under any of some names, 0 for none."""
    found: list[int] = [0]
    for name in names:
        value = getattr(config, name, None)
        found += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]
    return max(found)
