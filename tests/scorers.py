"""Tiny models that score answers, with random weights, saved in the hub's format: no downloads.

Real architectures through the real loading code: BERT for natural language inference, DeBERTa-v2
(the family of NoveltyBench's classifier) for similarity, a Llama with one output for a reward.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.pairs import CHAT_TEMPLATE, CONTEXT, END, SIZE, train_tokenizer, wrapped

WINDOW = 48
SPECIAL = ("[CLS]", "[SEP]", "[PAD]")
NLI_LABELS = ("ENTAILMENT", "NEUTRAL", "CONTRADICTION")  # not the order that BACo counts in


def _reading_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that joins two texts as BERT's does."""
    backend = train_tokenizer()
    backend.add_special_tokens(list(SPECIAL))
    first, last = (backend.token_to_id(token) for token in SPECIAL[:2])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", first), ("[SEP]", last)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_max_length=WINDOW,
    )


def _shape() -> dict[str, object]:
    return {
        "vocab_size": SIZE + len(SPECIAL),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.4,
        "max_position_embeddings": 300,
    }


def _save(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    stretch: float = 8,
) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
    # An untrained head says nearly the same of every text; stretched, it says yes and no.
    head = getattr(model, "classifier", None) or model.score
    with torch.no_grad():
        head.weight *= stretch
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_nli(folder: Path, labels: tuple[str, ...] = NLI_LABELS) -> str:
    """A BERT that classifies two texts by `labels`."""
    config = BertConfig(**_shape(), id2label=dict(enumerate(labels)), num_labels=len(labels))
    return _save(folder, config, _reading_tokenizer())


def save_similarity(folder: Path) -> str:
    """A DeBERTa-v2 in the shape of version 3: relative positions alone, two classes."""
    config = DebertaV2Config(
        **_shape(),
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        type_vocab_size=0,
        num_labels=2,
    )
    return _save(folder, config, _reading_tokenizer(), stretch=2)


def save_reward(folder: Path, *, pads: bool = True, template: bool = True) -> str:
    """A Llama with one output; ``pads=False`` pads with the end of text that ends its turns."""
    backend: Tokenizer = train_tokenizer()
    tokenizer = wrapped(backend, aligned=True)
    if not pads:
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    if not template:
        tokenizer.chat_template = None
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
        pad_token_id=backend.token_to_id(END),
        num_labels=1,
    )
    return _save(folder, config, tokenizer)
