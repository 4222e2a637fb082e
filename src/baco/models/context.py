"""The context window of a model, in tokens.

Configurations give this limit many names. A table of positions is a limit too: a forward beyond its
last row fails.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

# The context window of a model that has no limit, such as a recurrent one.
UNBOUNDED = 2**30

# Names of the limit; where a configuration has several, the lowest counts.
_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
    "max_target_positions",
    "context_length",
)
# Overrides the others: Command R has max_position_embeddings 8192 and reads 131072 tokens.
_FIRST = "model_max_length"
# A limit only where a configuration has no other: elsewhere it is the size of attention blocks.
_LAST = "block_size"


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the model that writes text."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several parts qualify
        return config


def context_of(config: Any, model: nn.Module | None = None) -> int:
    """The most tokens of one text, prompt and answer together; UNBOUNDED where nothing limits it.

    Args:
        config: of the model.
        model: where it is loaded, its tables of positions count too.
    """
    text = text_config(config)
    limits = [limit for name in _NAMES if (limit := _limit(text, name))]
    first, last = _limit(text, _FIRST), _limit(text, _LAST)
    named = first or min(limits, default=last or UNBOUNDED)
    tables: list[int] = [] if model is None else list(_position_rows(model))
    return min(named, *tables) if tables else named


def _limit(config: Any, name: str) -> int | None:
    """A limit in a configuration; None where it is missing or means that there is none."""
    limit = getattr(config, name, None)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < UNBOUNDED:
        return None
    return int(limit)


def _position_rows(model: Any) -> Iterator[int]:
    """The number of usable rows of each table of positions of the model that writes text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for path, module in decoder.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("position" in name or name == "wpe"):
            continue
        if any(part in path for part in ("image", "vision", "audio")):
            continue
        # BART, OPT and others skip their first rows; RoBERTa and others begin after padding.
        padding = module.padding_idx
        unused = getattr(module, "offset", 0 if padding is None else padding + 1)
        yield module.num_embeddings - int(unused)
