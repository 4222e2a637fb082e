"""What `transformers` is told of a pair: sizes and ids."""

from typing import Any

from transformers import PreTrainedConfig

from baco.models.context import text_config
from baco.models.pair import Pair
from baco.routing.router import Router


class BacoConfig(PreTrainedConfig):
    """What `transformers` and harnesses ask of a configuration: sizes and ids."""

    model_type = "baco"


def config_of(pair: Pair, router: Router) -> BacoConfig:
    """Sizes and ids that both halves can keep to."""
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
