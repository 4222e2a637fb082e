"""Tiny pairs with random weights, saved in the hub's format: real architectures, no downloads.

Each architecture also has one property of real pairs: the same vocabulary in both models (llama),
rows of logits beyond the tokenizer's ids (qwen3), special tokens of the aligned model alone
(olmo2), embeddings shared with the output and soft-capped logits (gemma2), no forward of BACo's
own (starcoder2).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Starcoder2Config,
)

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SIZE = 400  # entries of the tokenizer; the three special ones stand last
FIRST_SPECIAL = SIZE - 3
CONTEXT = 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words, numbers, punctuation, Markdown, several scripts: enough for a few hundred merges.
TEXT = """\
The summer is long and the sea is warm, so we walk along the shore of Lisbon every evening.
In the winter of 1998, Anna and her brother took the night train to Prague; it cost 42 euros!
A good answer is short, clear and kind. A beautiful garden needs water, sun and a little time.
# Plans
- Swim in the lake, then eat bread with cheese.
- Read "The Old Man and the Sea", or write a letter (to a friend).
What do you recommend for a rainy day? I would visit a museum, because museums are quiet.
Question: Where should I go this summer?
Answer: You could go to the island of Naxos. It isn't far, and the food's wonderful…
Für München und Zürich: schöne Grüße! Où est la bibliothèque? ¿Dónde está el café?
夏天去海边。春の海 終日のたり。Привет, мир! 🌊🏖️ 🎉
"""


@dataclass(frozen=True)
class PairFolder:
    """The folders of a pair."""

    base: Path
    aligned: Path


def _shape(rows: int) -> dict[str, Any]:
    return {
        "bos_token_id": None,
        "eos_token_id": FIRST_SPECIAL,
        "pad_token_id": FIRST_SPECIAL,
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }


def _llama(rows: int) -> PreTrainedConfig:
    return LlamaConfig(**_shape(rows), tie_word_embeddings=False)


def _qwen3(rows: int) -> PreTrainedConfig:
    return Qwen3Config(**_shape(rows + 27), head_dim=8, tie_word_embeddings=False)


def _olmo2(rows: int) -> PreTrainedConfig:
    return Olmo2Config(**_shape(rows), tie_word_embeddings=False)


def _gemma2(rows: int) -> PreTrainedConfig:
    shape = _shape(rows) | {"initializer_range": 0.1}  # tied embeddings this small repeat less
    return Gemma2Config(**shape, head_dim=8, query_pre_attn_scalar=8, sliding_window=16)


def _starcoder2(rows: int) -> PreTrainedConfig:
    return Starcoder2Config(**_shape(rows), sliding_window=None)


CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "olmo2": _olmo2,
    "gemma2": _gemma2,
    "starcoder2": _starcoder2,
}
ARCHITECTURES = tuple(CONFIGS)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of :data:`SIZE` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=FIRST_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([END, TURN_START, TURN_END])
    return tokenizer


def _without_turn_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a base model: end of text is its only special token."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] == END]
    return Tokenizer.from_str(json.dumps(state))


def wrapped(backend: Tokenizer, *, aligned: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of `transformers` around a backend; the aligned model's has a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END if aligned else END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=CONTEXT,
    )
    if aligned:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(config: PreTrainedConfig, seed: int, peak: float) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        # Untrained logits are nearly flat; stretched, they say yes and no as a real model's do,
        # so that routers with a threshold in the middle choose both models.
        stretch = peak / model(torch.arange(64)[None]).logits.std()
        norm = model.get_decoder().norm.weight
        offset = 1 if config.model_type.startswith("gemma") else 0  # Gemma scales by 1 + weight
        norm.copy_((norm + offset) * stretch - offset)
        model.get_output_embeddings().weight[SIZE:] = 0  # ids that no text has are never said
    return model


def save_byte_fallback_pair(folder: Path) -> PairFolder:
    """A pair with Llama 2's spelling that mostly writes bytes that are not a character."""
    from tests.kinds import llama

    tokenizer = llama(clean_up_tokenization_spaces=False)
    shape = _shape(len(tokenizer)) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = LlamaConfig(**shape, tie_word_embeddings=False)
    for name, seed in (("base", 0), ("aligned", 1)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder / name)
        if name == "aligned":
            tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        tokenizer.save_pretrained(folder / name)
    return PairFolder(folder / "base", folder / "aligned")


def save_pair(
    folder: Path,
    architecture: str = "llama",
    *,
    noise: float | None = 0.05,
    peak: float = 3.5,
    seed: int = 0,
) -> PairFolder:
    """Make a pair and save it as ``folder/base`` and ``folder/aligned``.

    Args:
        folder: where to write; created if missing.
        architecture: one of :data:`ARCHITECTURES`.
        noise: the aligned weights are the base's plus Gaussian noise of this share of each
            matrix's own deviation, so that the two models often agree; None draws them afresh.
        peak: standard deviation of the base's logits; the larger, the more confident both models.
        seed: of the weights.
    """
    backend = train_tokenizer()
    extra = architecture == "olmo2"  # only its aligned model has the two turn tokens
    base = _model(CONFIGS[architecture](SIZE), seed, peak)
    aligned = _model(CONFIGS[architecture](SIZE), seed + 1, peak)
    if noise is not None:
        aligned.load_state_dict(base.state_dict())
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed + 2)
            for weight in aligned.parameters():
                if weight.dim() == 2:
                    weight.add_(torch.randn_like(weight), alpha=noise * weight.std().item())
    if extra:
        base.resize_token_embeddings(SIZE - 2)
    ends = [backend.token_to_id(TURN_END), backend.token_to_id(END)]
    aligned.config.eos_token_id = ends[0]
    aligned.generation_config.eos_token_id = ends
    base_backend = _without_turn_tokens(backend) if extra else backend
    for name, model, tokens in (("base", base, base_backend), ("aligned", aligned, backend)):
        model.save_pretrained(folder / name)
        wrapped(tokens, aligned=name == "aligned").save_pretrained(folder / name)
    return PairFolder(folder / "base", folder / "aligned")


def save_adapter(folder: PairFolder, target: Path, **options: Any) -> dict[str, Any]:
    """Save a random adapter over the base model of a pair; return the models' folders."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder.base), LoraConfig(**config))
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder.aligned).save_pretrained(target)
    return {"base": str(folder.base), "aligned": str(target)}
