"""Trials of the ways to read rows, on a small random model of an architecture.

Real weights cannot tell a right forward from a wrong one: in bfloat16 two right ones differ by more
than rounding, and some models have tokens with huge activations. A small model in float32 can. Its
windows, chunks and original rotary lengths are short, so that a text of a few dozen tokens crosses
all of them.
"""

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baco.kv_cache.protocol import KVCache, finish
from baco.models.context import text_config

log = logging.getLogger("baco")

# Tokens of the longest text, of a window, and up to which a rotary embedding is the original one.
CONTEXT, WINDOW, ORIGINAL = 64, 8, 16
VOCABULARY = 128
# Lengths of texts, shorter and longer than these, and of their prefixes that are read as prompts.
_TEXTS, _PREFIXES = (12, 40, 26), (5, 31, 18)
_HEAD = 16  # width of a head
_MOST_PARAMETERS = 20_000_000
_HIDDEN = ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim")
_INNER = ("intermediate_size", "ffn_hidden_size", "d_ff", "ffn_dim", "n_inner", "mlp_hidden_size")
_INNER_OF_EXPERTS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
)
_CONTEXTS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "model_max_length",
    "max_target_positions",
    "context_length",
)
# Names of three numbers of recurrent layers: the factor that widens the hidden size, the number of
# heads, and the width of a head. Number × width = factor × hidden size.
_RECURRENT = (
    ("expand", "num_heads", "head_dim"),
    ("expand", "mamba_num_heads", "mamba_head_dim"),
    ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
    ("mamba_expand", "n_mamba_heads", "mamba_headdim"),
)
_GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")
# One layer of each kind is tried; these lists give the kinds.
_KINDS = ("layer_types", "no_rope_layers", "layers_block_type", "block_types", "mlp_layer_types")


@dataclass(frozen=True, slots=True)
class Readings:
    """The ways to read rows that are right for an architecture.

    Attributes:
        batched: the kinds of forwards that read rows of different lengths at once.
        per_row: the model returns its state, so that rows can be read one after the other.
        in_chunks: such a state can be continued by several tokens at once.
    """

    batched: frozenset[str]
    per_row: bool
    in_chunks: bool

    def __bool__(self) -> bool:
        """Is any way right?"""
        return bool(self.batched) or self.per_row


def reads_right(
    cache: KVCache,
    score: Callable[[Sequence[int]], Tensor],
    to_common_vocab: Callable[[Tensor], Tensor],
    rounding: float,
) -> bool:
    """Do rows of different lengths in one cache read as their texts do alone?

    Args:
        cache: an empty one of a small model.
        score: logits after each token of a text, by a plain forward: [T, V].
        to_common_vocab: logits [..., any] → those of the vocabulary.
        rounding: the share of their spread by which logits may differ.

    Raises:
        Exception: whatever a model raises that does not work with the cache.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in _TEXTS
    ]
    for text, prefix in zip(texts, _PREFIXES, strict=True):
        cache.copy_prefix(finish(cache.prefill(text[:prefix])), 1)
    lengths = list(_PREFIXES)

    def reads_on(counts: Sequence[int]) -> bool:
        span = max(counts)
        rows = zip(texts, lengths, counts, strict=True)
        new = [text[length : length + count] for text, length, count in rows]
        tokens = torch.tensor([[row[0]] * (span - len(row)) + row for row in new])
        logits = to_common_vocab(cache.extend(tokens, list(counts), 1)[:, -1])
        lengths[:] = [length + count for length, count in zip(lengths, counts, strict=True)]
        read = zip(logits, texts, lengths, strict=True)
        return all(close(score(text[:length])[-1], row, rounding) for row, text, length in read)

    if not (reads_on([1, 1, 1]) and reads_on([3, 1, 2])):
        return False
    if cache.can_roll_back:
        lengths = [length - more for length, more in zip(lengths, (2, 0, 1), strict=True)]
        cache.roll_back(lengths)
        if not reads_on([1, 2, 1]):
            return False
    cache.drop(kept=[2, 0])
    texts, lengths = [texts[2], texts[0]], [lengths[2], lengths[0]]
    return reads_on([1, 1])


def close(a: Tensor, b: Tensor, share: float) -> bool:
    """Do two rows of logits differ by less than a share of their spread?"""
    known = a > -math.inf
    spread = float(a[known].std()) + 1e-6
    return bool((a[known] - b[known]).abs().max() < share * spread)


def small_model(model: nn.Module) -> nn.Module | None:
    """A model of the same class with few layers of small width, and unruly random weights.

    Args:
        model: of ``transformers``, or an adapter around one.

    Returns:
        In float32 on the CPU, in evaluation mode; None where its configuration cannot be shrunk.
    """
    whole = without_adapter(model)
    try:
        with _quiet():
            config = small_config(whole.config)
            with torch.device("meta"):
                parameters = sum(weight.numel() for weight in type(whole)(config).parameters())
        if parameters > _MOST_PARAMETERS:
            log.debug("%s stays too large to be tried small", type(whole).__name__)
            return None
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small: nn.Module = type(whole)(copy.deepcopy(config)).to(torch.float32).eval()
            _make_unruly(small)
    except Exception as error:  # whatever a configuration, or custom code, raises
        log.debug("%s cannot be tried small: %r", type(whole).__name__, error)
        return None
    return small


def architecture(model: nn.Module) -> str | None:
    """A key of a model's class and small configuration; None where it cannot be shrunk."""
    whole = without_adapter(model)
    try:
        with _quiet():
            config = small_config(whole.config)
        kind, attention = type(whole), getattr(text_config(config), "_attn_implementation", None)
        fields = json.dumps(config.to_dict(), sort_keys=True, default=str)
    except Exception as error:
        log.debug("%s cannot be tried small: %r", type(whole).__name__, error)
        return None
    return f"{kind.__module__}.{kind.__qualname__} {attention} {fields}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers logs about a small configuration, which is not the user's."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def without_adapter(model: Any) -> Any:
    """The model that a PEFT adapter is put over; a model without one itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def small_config(config: Any) -> Any:
    """A smaller configuration: two layers or one of each kind, heads in the same ratio."""
    small = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(small, name):
            delattr(small, name)
    small.dtype = torch.float32
    text = text_config(small)
    layers = _first(text, _LAYERS)
    kept = _kept_layers(text, layers)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and layers and len(value) == layers:
            setattr(text, name, [value[layer] for layer in kept])
    _set(text, _LAYERS, len(kept))
    # Of two layers the second one attends, where a configuration gives the place of such layers.
    _set(text, ("attn_layer_period",), 2)
    _set(text, ("attn_layer_offset",), 1)
    if getattr(text, "attn_layer_indices", None):
        text.attn_layer_indices = [1]
    heads, kv_heads = _first(text, _HEADS), _first(text, _KV_HEADS)
    group = heads // kv_heads if kv_heads and heads % kv_heads == 0 else 1
    small_kv_heads = 1 if kv_heads == 1 else 2
    small_heads = min(group, 16) * small_kv_heads if kv_heads else 4
    _set(text, _HEADS, small_heads)
    _set(text, _KV_HEADS, small_kv_heads if kv_heads != heads else small_heads)
    hidden = small_heads * _HEAD
    _set(text, _HIDDEN, hidden)
    _set(text, _INNER, 2 * hidden)
    _set(text, _INNER_OF_EXPERTS, hidden)
    latent = hasattr(text, "kv_lora_rank")  # attention with compressed keys and values
    _set(text, ("head_dim",), _HEAD // 2 if latent else _HEAD)
    _set(text, ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), _HEAD // 2)
    _set(text, ("qk_head_dim", "q_lora_rank", "kv_lora_rank"), _HEAD)
    for expand, number, width in _RECURRENT:
        if _first(text, (expand,)) and _first(text, (number,)):
            _set(text, (width,), _HEAD)
            _set(text, (number,), _first(text, (expand,)) * hidden // _HEAD)
            _set(text, ("mamba_d_ssm",), _first(text, (expand,)) * hidden)
    _set(text, _GROUPS, min(2, _first(text, _GROUPS)))
    _set(text, _EXPERTS, 4)
    _set(text, _EXPERTS_PER_TOKEN, min(2, _first(text, _EXPERTS_PER_TOKEN)))
    _set(text, _WINDOWS, WINDOW)
    _set(text, ("floor_scale",), WINDOW)  # positions after which queries are scaled anew
    _set(text, _CONTEXTS, CONTEXT)
    _set(text, ("vocab_size",), VOCABULARY)
    for at, name in enumerate(("bos_token_id", "eos_token_id", "pad_token_id")):
        if getattr(text, name, None) is not None:
            setattr(text, name, at)
    _set(text, ("original_max_position_embeddings",), ORIGINAL)
    rotated = int(_HEAD * float(getattr(text, "partial_rotary_factor", None) or 1))
    # transformers 4 called them rope_scaling; the name still works and warns.
    rope = next((name for name in ("rope_parameters", "rope_scaling") if name in vars(text)), None)
    if rope is not None and isinstance(getattr(text, rope), Mapping):
        setattr(text, rope, _small_rope(getattr(text, rope), rotated))
    return small


def _small_rope(rope: Mapping[str, Any], rotated: int) -> dict[str, Any]:
    """Parameters of a rotary embedding with ``rotated`` channels, or of one per kind of layer."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            small[name] = _small_rope(value, rotated)
        elif name in ("short_factor", "long_factor") and value:
            small[name] = list(value)[: rotated // 2]
        elif name == "original_max_position_embeddings" and value:
            small[name] = ORIGINAL
        else:
            small[name] = value
    return small


def _kept_layers(text: Any, layers: int) -> list[int]:
    """The first layer of every kind; two where there are no kinds."""
    lists = [getattr(text, name, None) for name in _KINDS]
    per_layer = [kind for kind in lists if isinstance(kind, list | tuple) and len(kind) == layers]
    kinds: dict[Any, int] = {}
    for layer in range(layers):
        kinds.setdefault(tuple(str(kind[layer]) for kind in per_layer), layer)
    first = sorted(kinds.values())
    return first if len(first) > 1 else [0, min(1, max(0, layers - 1))]


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first number that a configuration gives under any of some names; 0 for none."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _set(config: Any, names: tuple[str, ...], value: int) -> None:
    """Set the numbers that a configuration has under any of some names."""
    for name in names:
        if type(getattr(config, name, None)) is int:
            with suppress(AttributeError):  # a property computed from others
                setattr(config, name, value)


@torch.no_grad()
def _make_unruly(model: nn.Module) -> None:
    """Give weights large norms and some channels that outweigh the others, as real ones have."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and float(weight.std()) > 0:
            weight.mul_(0.15 / weight.std())
            weight[..., ::13] *= 3
        elif name.endswith(("norm.weight", "ln_f.weight", "bias")) or "norm" in name:
            weight.add_(torch.randn_like(weight) * 0.2)
