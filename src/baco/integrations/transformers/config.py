"""The `transformers` configuration of a pair: sizes and ids."""

from typing import Any

from transformers import PreTrainedConfig

from baco.models.context import text_config
from baco.models.pair import Pair
from baco.routing.router import Router


class BacoConfig(PreTrainedConfig):
    """The sizes and ids that `transformers` and evaluation harnesses read from a configuration."""

    model_type = "baco"


def config_of(pair: Pair, router: Router) -> BacoConfig:
    """The configuration of a pair; its sizes hold for both models."""
    settings: dict[str, Any] = {
        "vocab_size": pair.vocabulary.size,
        "max_position_embeddings": min(pair.base.context, pair.aligned.context),
        "bos_token_id": text_config(pair.aligned.model.config).bos_token_id,
        "eos_token_id": list(pair.end_ids),
        "pad_token_id": pair.tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "architectures": ["BacoForCausalLM"],
    }
    config = BacoConfig(**settings)
    config.name_or_path = f"{pair.name}/{router.spelling}"
    return config
