"""Architectures beyond the four that other tests use, with the caches that they need."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from baco import Baco, BacoError
from tests.pairs import PairFolder
from tests.test_engine import reference, rules, tokens_and_sources, without_turn_cut

# Beyond the window of every model in here that has one.
PROMPT = "Where should I go this summer, when the sea is warm and I have only little time?"
SHAPE: dict[str, Any] = {
    "bos_token_id": None,
    "eos_token_id": 397,
    "pad_token_id": 397,
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
HEADS = {"head_dim": 8}

# Keys and values in a table: rows of any lengths in one forward, drafts taken back.
ROLLED_BACK: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding window": ("Mistral", {"sliding_window": 16}),
    "sliding window, tied": ("Gemma3Text", {**HEADS, "sliding_window": 16, "layer_types": None}),
    "windows here and there": (
        "Gemma3Text",
        {
            **HEADS,
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "tied embeddings": ("Qwen2", {"tie_word_embeddings": True}),
    "one key head": ("Llama", {"num_key_value_heads": 1}),
    "fused projections": ("Phi3", {}),
    "parallel residual": ("Cohere", {}),
    "partial rotary": ("StableLm", {}),
    "experts": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "learned positions": ("GPT2", {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "rotary, no groups": ("GPTNeoX", {}),
}
# Recurrent states, beside such tables or alone, that are saved before drafts.
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "state space": ("Mamba", {"state_size": 8}),
    "state space 2": (
        "Mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    ),
    "hybrid of both": (
        "Jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "linear attention": (
        "Qwen3Next",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "short convolutions": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
}
# Positions or windows that a model computes itself, for a whole batch.
OWN_POSITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ALiBi": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "ALiBi in masks": (
        "Falcon",
        {"alibi": True, "new_decoder_architecture": False, "num_hidden_layers": 2},
    ),
    "a window inside the model": (
        "GPTNeo",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 16,
        },
    ),
    "chunks, queries scaled by position": (
        "Llama4Text",
        {
            **HEADS,
            "num_hidden_layers": 4,
            "attention_chunk_size": 16,
            "floor_scale": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
        },
    ),
}
# A state of another form.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "a state of its own": ("Rwkv", {"context_length": 256, "attention_hidden_size": 32}),
}

# A state that stays inside the model.
KEPT = (
    "RecurrentGemma",
    {
        "num_hidden_layers": 3,
        "attention_window_size": 64,
        "lru_width": 32,
        "head_dim": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
)


@pytest.fixture
def load(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> Callable[[str, dict[str, Any]], Baco]:
    """A pair of such an architecture with random weights, from disk."""

    def make(name: str, changes: dict[str, Any]) -> Baco:
        kind = getattr(transformers, f"{name}Config")
        config: PreTrainedConfig = kind(**{**SHAPE, **changes})
        for seed, source in enumerate(("base", "aligned")):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.save_pretrained(tmp_path / source)
            tokenizer = AutoTokenizer.from_pretrained(getattr(random_pair("llama"), source))
            tokenizer.save_pretrained(tmp_path / source)
        return without_turn_cut(Baco.load(str(tmp_path), dtype="float32"))

    return make


def check_against_the_naive_loop(baco: Baco) -> None:
    sources: set[str] = set()
    for router in ("Rand:0.5", "Base", "Aligned"):
        settings: dict[str, Any] = {"seed": 5, "temperature": 1.0, "max_tokens": 20}
        answers = baco.generate(PROMPT, router=router, n=3, **settings)
        rule = rules(baco.pair)[router]
        for answer in answers[1:]:
            expected = reference(baco, PROMPT, rule, sample=answer.sample, **settings)
            assert tokens_and_sources(answer) == expected, router
            sources |= set(map(str, answer.sources))
    assert sources == {"base", "aligned"}


@pytest.mark.parametrize("case", [*ROLLED_BACK, *RECURRENT, *OWN_POSITIONS])
def test_rows_of_any_lengths_share_a_forward_and_agree_with_the_naive_loop(
    load: Callable[..., Baco], case: str
) -> None:
    baco = load(*(ROLLED_BACK | RECURRENT | OWN_POSITIONS)[case])
    assert baco.pair.base.can_roll_back
    assert baco.pair.aligned.can_roll_back
    check_against_the_naive_loop(baco)


@pytest.mark.parametrize("case", PLAIN)
def test_a_cache_that_cannot_roll_back_is_decoded_row_by_row_with_one_warning(
    load: Callable[..., Baco], case: str, caplog: pytest.LogCaptureFixture
) -> None:
    baco = load(*PLAIN[case])
    check_against_the_naive_loop(baco)
    assert not baco.pair.base.can_roll_back
    warnings = [record.message for record in caplog.records if "one by one" in record.message]
    assert len(warnings) == len(set(warnings)) == 2  # one for each model


def test_a_model_that_keeps_state_inside_rereads_every_text_with_a_warning(
    load: Callable[..., Baco], caplog: pytest.LogCaptureFixture
) -> None:
    baco = load(*KEPT)
    check_against_the_naive_loop(baco)
    assert caplog.text.count("every step reads the whole text of each row again") == 2


def test_an_answer_ends_with_length_at_the_end_of_the_shorter_context(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama")
    model = AutoModelForCausalLM.from_pretrained(folder.base)
    model.config.max_position_embeddings = 100
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder.base).save_pretrained(tmp_path)
    baco = Baco.load(base=str(tmp_path), aligned=str(folder.aligned), dtype="float32")
    rendered = baco.pair.renderer.render(PROMPT)
    never = dict.fromkeys(baco.pair.end_ids, -100.0)
    settings: dict[str, Any] = {"n": 2, "max_tokens": 10_000, "logit_bias": never}
    # A router that never reads the base model has the aligned one's window.
    lengths = {"P:0.5": 100 - len(rendered.base_ids), "Aligned": 256 - len(rendered.aligned_ids)}
    for router, length in lengths.items():
        for answer in without_turn_cut(baco).generate(PROMPT, router=router, **settings):
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == length
    with pytest.raises(BacoError, match=r"prompt of \d+ tokens, as the base model .*window is 100"):
        baco.generate("sea " * 60, router="P:0.5")
