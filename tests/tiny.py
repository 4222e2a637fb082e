"""Every causal LM of the installed `transformers`, tiny, with random weights.

Windows, chunks and contexts are short, so that a text of some dozen tokens exceeds all of them.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baco import Baco
from baco.models.size import ModelSize
from tests.pairs import FIRST_SPECIAL, SIZE, train_tokenizer, wrapped

CONTEXT = 64
# What a configuration gets of each name that it has.
_SMALL: dict[str, Any] = {
    "vocab_size": SIZE,
    "bos_token_id": 0,
    "eos_token_id": FIRST_SPECIAL,
    "pad_token_id": 1,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "d_ff", "ffn_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), 8),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size", "floor_scale"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    "mamba_expand": 2,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    "lru_width": 32,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
_CONTEXTS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    *("model_max_length", "max_target_positions", "context_length"),
)
_DECODER = {"is_decoder": True}
_MLA = {"num_key_value_heads": 4}
_FOUR_LAYERS = {"num_hidden_layers": 4}
_TWO_HYBRIDS = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# What some need beside that.
_CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "electra"), _DECODER),
    **dict.fromkeys(("data2vec-text", "ernie", "megatron-bert", "rembert", "roberta"), _DECODER),
    **dict.fromkeys(
        ("roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"), _DECODER
    ),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _MLA),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"), _MLA),
    **dict.fromkeys(("minicpm3", "youtu"), _MLA),
    **dict.fromkeys(("lfm3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"), _FOUR_LAYERS),
    # The fourth layer of Llama 4 has no rotary embedding, and scales its queries by position.
    **dict.fromkeys(("llama4", "llama4_text", "qwen3_5_text", "qwen3_next"), _FOUR_LAYERS),
    "bailing_hybrid": {**_MLA, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": SIZE,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [64, 64],
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": SIZE,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 0,
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "moshi": {"sliding_window": CONTEXT},  # its full forward has no window, only its cache has
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "reformer": {
        **_DECODER,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, CONTEXT // 8],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 64,
        "local_attn_chunk_length": 4,
        "attention_head_size": 8,
    },
    "roc_bert": {
        **_DECODER,
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xlm": {"causal": True},
    "xmod": {**_DECODER, "default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {**_TWO_HYBRIDS, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": _TWO_HYBRIDS,
    "zaya": {"num_experts_per_tok": 1},
}
# Not built here: large at any setting, of several models, or no model of text alone.
_LEFT_OUT = {
    "blt", "cohere_compass_text", "cpmant", "dots3_note", "emu3", "gemma3n", "gemma4",
    "gemma4_assistant", "gemma4_unified_assistant", "git", "got_ocr2", "kimi_linear", "mllama",
    "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen4_exp",
    "qwen4_exp_text", "xlstm",
}  # fmt: skip
EVERY = tuple(sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - _LEFT_OUT))


def tiny_config(model_type: str, *, context: int = CONTEXT, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration; ``changes`` apply to its text part."""
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    text = usual.get_text_config(decoder=True)
    known = usual.to_dict()
    whole = {k: v for k, v in _CHANGES.get(model_type, {}).items() if k in known}
    nested = "text_config" in known
    names = text.to_dict() if nested else known
    # The choice of an index among near ties would make every comparison a matter of luck.
    lengths = {**dict.fromkeys(_CONTEXTS, context), "index_topk": 2 * context}
    small = {name: value for name, value in (_SMALL | lengths).items() if name in names}
    if not nested:
        config: PreTrainedConfig = kind(**small | _CHANGES.get(model_type, {}) | changes)
        return config
    own = {k: v for k, v in _CHANGES.get(model_type, {}).items() if k not in known}
    part = small | own | changes | {"model_type": text.model_type}
    nested_config: PreTrainedConfig = kind(**whole, text_config=part)
    return nested_config


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random weights that are large enough for all of them to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        assert sum(weight.numel() for weight in model.parameters()) < 4_000_000
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2 and float(weight.std()) > 0:
                weight.mul_(0.15 / weight.std())
    return model.eval()


def drafting(baco: Baco) -> Baco:
    """The same pair with the sizes of large models, so that its planner drafts."""
    for model in (baco.pair.base, baco.pair.aligned):
        model.__dict__["size"] = ModelSize(80, 80 * 10**8, 80 * 10**8)
    return baco


def save_tiny_pair(
    folder: Path, model_type: str, *, noise: float | None = None, **changes: Any
) -> Path:
    """A pair of an architecture as ``folder/base`` and ``folder/aligned``.

    Args:
        folder: for both models.
        model_type: of the architecture.
        noise: the models differ by random numbers of this share of each weight's spread; None for
            unrelated weights.
        changes: see `tiny_config`.
    """
    backend = train_tokenizer()
    for seed, source in enumerate(("base", "aligned")):
        model = tiny_model(tiny_config(model_type, **changes), seed if noise is None else 0)
        if noise is not None and source == "aligned":
            perturb(model, noise)
        model.save_pretrained(folder / source)
        wrapped(backend, aligned=source == "aligned").save_pretrained(folder / source)
    return folder


@torch.no_grad()
def perturb(model: PreTrainedModel, noise: float) -> None:
    """Add random numbers of this share of each weight's spread."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            change = torch.randn(weight.shape, generator=generator)
            weight.add_(change * weight.std() * noise)
