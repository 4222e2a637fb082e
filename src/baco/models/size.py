"""How large a model is, and how much memory one of its forwards takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from baco.models.context import text_config
from baco.models.forward.packed_linear import weights

# What configurations call the width of a layer, the width inside its MLP, and its heads.
_HIDDEN = ("hidden_size", "d_model")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "mlp_hidden_size")
_HEADS = ("num_attention_heads",)
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_topk")
# Tokens of a row up to which attention may hold the scores of all heads at once.
_SHORT_SPAN = 32
# Bytes of a number inside a forward: sums are often taken in float32.
_NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a forward reads and multiplies.

    Attributes:
        layers: of the model.
        parameters: the number of weights that every token is multiplied with.
        bytes: the bytes that these weights take.
        recurrent: the share of these bytes in recurrent layers, which read the tokens of a row one
            after the other.
    """

    layers: int
    parameters: int
    bytes: int
    recurrent: float = 0.0


@dataclass(frozen=True, slots=True)
class ForwardSize:
    """An upper estimate of the bytes of a forward's own tensors, without its logits.

    Attributes:
        token: for each token that is read.
        short, long: for each pair of a token that is read and a token that it attends to, where few
            tokens of a row are read and where many are.
        repeated: for each row and each token that it attends to: keys and values laid out anew.
        row_by_row: rows are read one after the other.
    """

    token: int
    short: int
    long: int
    repeated: int
    row_by_row: bool = False

    def bytes(self, rows: int, span: int, columns: int) -> int:
        """Bytes of a forward that reads ``span`` tokens of each row over ``columns`` tokens."""
        rows = min(rows, 1) if self.row_by_row else rows
        score = self.short if span <= _SHORT_SPAN else self.long
        return rows * (span * (self.token + score * columns) + self.repeated * columns)


def model_size(model: Any, embedding_rows: int) -> ModelSize:
    """The size of a ``transformers`` model; embeddings that are only looked up do not count."""
    sizes = [(size, stored) for _, size, stored in weights(model)]
    config = text_config(model.config)
    tied = getattr(config, "tie_word_embeddings", True)
    looked_up = 0 if tied else embedding_rows * config.hidden_size
    parameters, stored = (sum(column) for column in zip(*sizes, strict=True))
    share = 1 - looked_up / max(1, parameters)
    layers = int(getattr(config, "num_hidden_layers", 1))
    return ModelSize(layers, int(parameters * share), int(stored * share))


def bits_per_weight(model: Any) -> float:
    """Mean bits that a weight of a quantised model is stored in."""
    sizes = [(size, stored) for _, size, stored in weights(model)]
    return 8 * sum(stored for _, stored in sizes) / sum(size for size, _ in sizes)


def forward_size(config: Any, *, dense: bool, row_by_row: bool) -> ForwardSize:
    """The size of a forward, estimated from a model's configuration.

    Args:
        config: of the model.
        dense: its forward is `baco.models.forward.dense.DenseForward`.
        row_by_row: rows are read one after the other.
    """
    config = text_config(config)
    hidden, inner, heads = (_largest(config, names) for names in (_HIDDEN, _INNER, _HEADS))
    width = _largest(config, ("head_dim", "v_head_dim")) or hidden // max(1, heads)
    experts = _largest(config, ("moe_intermediate_size",)) * _largest(config, _ACTIVE_EXPERTS)
    inner = max(inner, experts)
    token = _NUMBER_BYTES * (12 * max(hidden, heads * width) + 4 * (inner or 4 * hidden))
    scores = 4 * _NUMBER_BYTES * heads  # plain, scaled, masked, and their softmax
    if dense:
        group = heads // max(1, _largest(config, ("num_key_value_heads",)))
        masks = max(1, len(set(getattr(config, "layer_types", None) or ())))
        mask = 2 * _NUMBER_BYTES * (group + 1) * masks
        scores += _NUMBER_BYTES * heads * (masks - 1)
        if getattr(config, "attn_logit_softcapping", None) is None:
            return ForwardSize(token, max(mask, scores), mask, 0, row_by_row)
        scores += _NUMBER_BYTES * heads
        return ForwardSize(token, max(mask, scores), mask + scores, 0, row_by_row)
    if getattr(config, "_attn_implementation", None) != "sdpa":  # eager
        score = scores
    else:
        score = 0 if row_by_row else 2 * _NUMBER_BYTES
    return ForwardSize(token, score, score, 2 * _NUMBER_BYTES * heads * width, row_by_row)


def _largest(config: Any, names: Iterable[str]) -> int:
    """The largest number that a configuration gives under any of some names, 0 for none."""
    values: list[int] = [0]
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # it differs between layers
            value = [getattr(layer, name, None) for layer in config.per_layer_config]
        values += [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)]
    return max(values)
