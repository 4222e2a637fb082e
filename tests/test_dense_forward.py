"""`DenseForward` gives the logits of the model's own forward, and is used only where it does."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from baco import Baco
from baco.kv_cache.batched import BatchedKVCache
from baco.kv_cache.protocol import finish
from baco.models.forward.dense import DenseForward, prepare
from baco.models.forward.fused_linear import Part
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
KNOWN = {
    "llama": LlamaConfig(**SIZES),
    "llama, with biases and tied": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama, positions scaled": LlamaConfig(**SIZES, rope_parameters=SCALED),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=24),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "olmo2": Olmo2Config(**SIZES),
}
UNKNOWN = {
    "windowed": MistralConfig(**SIZES, sliding_window=8),
    "another activation": LlamaConfig(**SIZES, hidden_act="gelu"),
    "positions that depend on the length": LlamaConfig(
        **SIZES, rope_parameters={**SCALED, "rope_type": "dynamic"}
    ),
}


def model_of(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # ones and zeros would hide them
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize("kind", KNOWN)
@torch.inference_mode()
def test_rows_of_different_lengths_read_as_the_model_reads_them_alone(kind: str) -> None:
    model = model_of(KNOWN[kind])
    texts = torch.randint(1, 90, (3, 20), generator=torch.Generator().manual_seed(1))
    lengths, more = [5, 12, 9], [1, 4, 2]
    alone = [
        model(input_ids=text[None, : length + new]).logits[0, -1]
        for text, length, new in zip(texts, lengths, more, strict=True)
    ]
    prepare(model)
    lean = DenseForward.of(model)
    assert lean is not None
    store = BatchedKVCache(lean)
    for text, length in zip(texts.tolist(), lengths, strict=True):
        store.copy_prefix(finish(store.prefill(text[:length])), 1)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    for row, (text, length, new) in enumerate(zip(texts, lengths, more, strict=True)):
        tokens[row, 4 - new :] = text[length : length + new]
    together = store.extend(tokens, more, 1)[:, 0]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_architectures_are_not_taken(kind: str) -> None:
    model = model_of(UNKNOWN[kind])
    before = [type(module) for module in model.modules()]
    prepare(model)
    assert DenseForward.of(model) is None
    assert [type(module) for module in model.modules()] == before


@torch.inference_mode()
def test_fused_weights_are_held_once_and_the_model_still_works() -> None:
    model = model_of(KNOWN["qwen2"])
    ids = torch.arange(1, 9)[None]
    before = model(input_ids=ids).logits
    size = sum(weight.numel() for weight in model.parameters())
    prepare(model)
    assert sum(weight.numel() for weight in model.parameters()) == size
    parts = [module for module in model.modules() if isinstance(module, Part)]
    assert len(parts) == 3 * 5
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_pair_decodes_with_it(loaded_pair: Callable[..., Baco]) -> None:
    def forward(architecture: str) -> str:
        store = loaded_pair(architecture, noise=0.3).pair.base.new_cache()
        assert isinstance(store, BatchedKVCache)
        return type(store.forward).__name__

    assert forward("llama") == forward("olmo2") == forward("qwen3") == "ClampedForward"
    assert forward("gemma2") == "MaskedForward"


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
    prepare(model)
    lean = DenseForward.of(model)
    assert lean is not None
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
