"""`DenseForward` gives the logits of the model's own forward, and is used only where it does."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    ArceeConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    GraniteConfig,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from baco import Baco
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import KVCache, finish
from baco.models.caches.long_rope import LongRopeKVCache
from baco.models.forward.decoder_layers import Description, describe, fuse_layers, is_fused
from baco.models.forward.dense import DenseForward
from baco.models.forward.fused_linear import Part
from baco.models.forward.packed_linear import PackedLinear, pack
from baco.models.pair import lay_out
from baco.models.rope import LongRope
from tests.pairs import PairFolder

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
WINDOW = {"sliding_window": 8}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW}
KNOWN = {
    "llama": LlamaConfig(**SIZES),
    "llama, with biases and tied": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, positions scaled": LlamaConfig(**SIZES, rope_parameters=SCALED),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=24),
    "llama, another activation": LlamaConfig(**SIZES, hidden_act="gelu"),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral, windows": MistralConfig(**SIZES, **WINDOW),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, windows": Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3, windows": Qwen3Config(**SIZES, head_dim=8, use_sliding_window=True, **TWO_KINDS),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma 2": Gemma2Config(
        **SIZES,
        **TWO_KINDS,
        head_dim=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma 3": Gemma3TextConfig(**SIZES, **TWO_KINDS, head_dim=8, query_pre_attn_scalar=5),
    "olmo 2": Olmo2Config(**SIZES),
    "olmo 3": Olmo3Config(**SIZES, **TWO_KINDS),
    "phi 3": Phi3Config(**SIZES),
    "phi 4": Phi3Config(**SIZES, **WINDOW, partial_rotary_factor=0.5),
    "smollm 3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
    "granite": GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        attention_multiplier=0.5,
        residual_multiplier=0.7,
        logits_scaling=2.0,
    ),
}
LONG_ROPE: dict[str, Any] = {
    "original_max_position_embeddings": 10,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 4.0],
        "original_max_position_embeddings": 10,
        "partial_rotary_factor": 0.5,
    },
}
UNKNOWN = {
    "rotary embeddings of type dynamic": LlamaConfig(
        **SIZES, rope_parameters={**SCALED, "rope_type": "dynamic"}
    ),
    "an MLP of": ArceeConfig(**SIZES),
    "another kind of norm": StableLmConfig(**SIZES),
    "other parameters: sinks": GptOssConfig(**SIZES, head_dim=8),
    "experts": MixtralConfig(**SIZES),
}


def model_of(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide them
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


class Rows:
    """Rows of one cache, read in several steps, and the logits of each row's text alone.

    Prompts are shorter and longer than the windows. Drafts and roll-backs cross the windows' edges.
    """

    steps = ((1, 4, 2), (3, 1, 1), (2, 0, 5))
    rolled_back = (2, 3, 1)

    def __init__(self, shared: int = 0) -> None:
        """Rows whose prompts differ, or share their first ``shared`` tokens."""
        generator = torch.Generator().manual_seed(1)
        self.texts = torch.randint(1, 90, (3, 24), generator=generator).tolist()
        self.lengths, self.shared = (5, 12, 7), shared
        if shared:
            self.lengths = (shared,) * 3
            self.texts = [self.texts[0][:shared] + text[shared:] for text in self.texts]

    def together(self, cache: KVCache) -> torch.Tensor:
        """Logits after every step, [steps, rows, V]."""
        if self.shared:
            prompt = self.texts[0][: self.shared]
            cache.copy_prefix(finish(cache.prefill(prompt, samples=10_000)), 3)
            assert cache.shares_prefix(len(prompt), 10_000)
        else:
            for text, length in zip(self.texts, self.lengths, strict=True):
                cache.copy_prefix(finish(cache.prefill(text[:length])), 1)
        return torch.stack([self._read(cache, counts) for counts in self.steps])

    def _read(self, cache: KVCache, counts: Sequence[int]) -> torch.Tensor:
        span, before = max(counts), list(cache.lengths)
        tokens = torch.zeros(3, span, dtype=torch.int64)
        for row, count in enumerate(counts):
            new = self.texts[row][before[row] : before[row] + count]
            tokens[row, span - count :] = torch.tensor(new)
        logits = cache.extend(tokens, list(counts), 1)[:, 0]
        # Other tokens are read as drafts, and rejected.
        cache.extend(torch.full((3, 3), 9), self.rolled_back, 1)
        cache.roll_back([start + count for start, count in zip(before, counts, strict=True)])
        return logits

    def alone(self, model: torch.nn.Module) -> torch.Tensor:
        """The model's own logits after the same texts, [steps, rows, V]."""
        lengths, rows = list(self.lengths), []
        for counts in self.steps:
            lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
            rows += [
                model(input_ids=torch.tensor([text[:length]]), use_cache=False).logits[0, -1]
                for text, length in zip(self.texts, lengths, strict=True)
            ]
        return torch.stack(rows).view(len(self.steps), 3, -1)


def dense(model: torch.nn.Module) -> DenseForward:
    fuse_layers(model)
    forward = DenseForward.of(model)
    assert forward is not None
    return forward


@pytest.mark.parametrize("kind", KNOWN)
@torch.inference_mode()
def test_rows_of_different_lengths_read_as_the_model_reads_them_alone(kind: str) -> None:
    model, rows = model_of(KNOWN[kind]), Rows()
    alone = rows.alone(model)
    together = rows.together(BatchedKVCache(dense(model), chunk=6))
    read = torch.tensor(rows.steps) > 0
    torch.testing.assert_close(together[read], alone[read], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shared", [3, 11])
@pytest.mark.parametrize("kind", ["llama", "mistral, windows", "gemma 2", "gemma 3", "phi 4"])
@torch.inference_mode()
def test_a_shared_prompt_is_read_as_a_copied_one(kind: str, shared: int) -> None:
    model, rows = model_of(KNOWN[kind]), Rows(shared)
    alone = rows.alone(model)
    together = rows.together(BatchedKVCache(dense(model), shares=True, chunk=6))
    read = torch.tensor(rows.steps) > 0
    torch.testing.assert_close(together[read], alone[read], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_every_row_has_the_rotary_factors_of_its_own_length() -> None:
    """Phi 4 mini: LongRoPE on a part of the channels."""
    model, rows = model_of(Phi3Config(**SIZES, **LONG_ROPE)), Rows()
    alone = rows.alone(model)
    forward, rope = dense(model), LongRope.of(model)
    assert rope is not None
    together = rows.together(LongRopeKVCache(forward, rope, chunk=6))
    read = torch.tensor(rows.steps) > 0
    torch.testing.assert_close(together[read], alone[read], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_columns_outside_of_all_windows_are_not_read() -> None:
    model = model_of(KNOWN["mistral, windows"])
    texts = torch.randint(1, 90, (2, 45), generator=torch.Generator().manual_seed(1))
    alone = [
        model(input_ids=text[None, :length]).logits[0, -1]
        for text, length in zip(texts, (42, 45), strict=True)
    ]
    cache = BatchedKVCache(dense(model))
    for text, length in zip(texts.tolist(), (40, 43), strict=True):
        cache.copy_prefix(finish(cache.prefill(text[:length])), 1)
    for layer in cache.cache.initialized():
        layer.keys[:, :, :33] = layer.values[:, :, :33] = torch.nan  # 40 tokens and a window of 8
    together = cache.extend(torch.stack([texts[0, 40:42], texts[1, 43:45]]), [2, 2], 1)[:, 0]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KNOWN)
@torch.inference_mode()
def test_other_number_formats_differ_by_rounding_alone(kind: str, dtype: torch.dtype) -> None:
    """Not farther from sums in float32 than the model's own forward is, by and large."""
    model, rows = model_of(KNOWN[kind]).to(dtype), Rows()
    read = torch.tensor(rows.steps) > 0
    exact = rows.alone(copy.deepcopy(model).float())[read]
    alone = rows.alone(model).float()[read]
    forward = dense(model)
    pack(model)
    together = rows.together(BatchedKVCache(forward, chunk=6)).float()[read]
    own, others = ((logits - exact).square().mean() for logits in (together, alone))
    assert own < 2 * others


@pytest.mark.parametrize("reason", UNKNOWN)
def test_unknown_architectures_are_not_taken(reason: str) -> None:
    model = model_of(UNKNOWN[reason])
    before = [type(module) for module in model.modules()]
    description = describe(model)
    assert isinstance(description, str)
    assert reason in description
    lay_out(model)
    assert DenseForward.of(model) is None
    assert [type(module) for module in model.modules() if not isinstance(module, PackedLinear)] == [
        kind for kind in before if kind is not torch.nn.Linear
    ]


def test_a_model_of_the_same_parts_that_computes_something_else_is_not_taken() -> None:
    """Helium rotates neighbouring channels, not halves."""
    model = model_of(HeliumConfig(**SIZES))
    assert not isinstance(describe(model), str)
    lay_out(model)
    assert DenseForward.of(model) is None


def each_layer(**changes: Any) -> Callable[[Description], Description]:
    """Change every layer of a description."""
    return lambda whole: replace(
        whole, layers=tuple(replace(layer, **changes) for layer in whole.layers)
    )


MISTAKES: dict[str, tuple[str, Callable[[Description], Description]]] = {
    "no window": ("mistral, windows", each_layer(window=None)),
    "a window too long by one": ("mistral, windows", each_layer(window=9)),
    "windows in all layers": ("qwen3, windows", each_layer(window=8)),
    "the other theta": ("gemma 3", each_layer(rope="full_attention")),
    "rotation in all layers": ("smollm 3", each_layer(rope="")),
    "no soft cap of scores": ("gemma 2", lambda whole: replace(whole, softcap=None)),
    "no soft cap of logits": ("gemma 2", lambda whole: replace(whole, logits_softcap=None)),
    "the usual scale": ("granite", lambda whole: replace(whole, scale=0.25)),
    "no multiplier": ("granite", lambda whole: replace(whole, residual_multiplier=1.0)),
    "plain embeddings": ("granite", lambda whole: replace(whole, embedding_multiplier=1.0)),
    "plain logits": ("granite", lambda whole: replace(whole, logits_divisor=1.0)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_trial_notices_a_wrong_description(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, change = MISTAKES[mistake]

    def wrong(model: Any) -> Any:
        right = describe(model)
        return right if isinstance(right, str) else change(right)

    for described, expected in ((describe, True), (wrong, False)):
        monkeypatch.setattr("baco.models.forward.selection._TRIED", {})
        monkeypatch.setattr("baco.models.forward.dense.describe", described)
        model = model_of(KNOWN[kind])
        lay_out(model)
        assert is_fused(model) is expected


@torch.inference_mode()
def test_fused_weights_are_held_once_and_the_model_still_works() -> None:
    model = model_of(KNOWN["qwen2"])
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    size = sum(weight.numel() for weight in model.parameters())
    fuse_layers(model)
    assert sum(weight.numel() for weight in model.parameters()) == size
    parts = [module for module in model.modules() if isinstance(module, Part)]
    assert len(parts) == 3 * 5
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_pair_decodes_with_it(loaded_pair: Callable[..., Baco]) -> None:
    def forward(architecture: str) -> str:
        store = loaded_pair(architecture, noise=0.3).pair.base.new_cache()
        assert isinstance(store, BatchedKVCache)
        return type(store.forward).__name__

    kinds = {forward(kind) for kind in ("llama", "olmo2", "qwen3", "gemma2")}
    assert kinds == {"ClampedForward"}
    assert forward("starcoder2") == "MaskedForward"


def test_a_forward_with_wrong_logits_is_not_used(
    random_pair: Callable[..., PairFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_pair("llama")
    read = DenseForward.read
    monkeypatch.setattr(
        DenseForward, "read", lambda self, ids, at, *rest: read(self, ids, at // 2, *rest)
    )
    store = Baco.load(base=str(folder.base), aligned=str(folder.aligned)).pair.base.new_cache()
    assert isinstance(store, BatchedKVCache)
    assert type(store.forward).__name__ == "MaskedForward"


@torch.inference_mode()
def test_a_long_row_that_leaves_gives_its_room_back_and_disturbs_no_other() -> None:
    model = model_of(KNOWN["llama"])
    lean = dense(model)
    long, short = list(range(1, 90)) * 4, [3, 1, 4, 1, 5]
    alone, together = BatchedKVCache(lean), BatchedKVCache(lean)
    together.copy_prefix(finish(together.prefill(long)), 1)
    for store in (alone, together):
        store.copy_prefix(finish(store.prefill(short)), 2)
    room = together.cache.columns
    together.drop(kept=[2, 1])
    next_ = torch.tensor([[9], [2]])
    torch.testing.assert_close(together.extend(next_, [1, 1], 1), alone.extend(next_, [1, 1], 1))
    assert together.cache.columns < room / 4
