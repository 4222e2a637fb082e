"""A learned router: the probability that base should write a word, by a small model.

The model is a logistic regression or has one hidden layer. It reads the features below, which are
the signals of other rules: both models' distributions and the roles of their most likely tokens.
It may also read the models' last hidden states, as their projections on a few axes. It does not
read the position. Its file is JSON: see :func:`load`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.routing.signals import Signals
from baco.source import MODELS, Source
from baco.text.vocabulary import Role

FORMAT = "baco-learned-router"
VERSION = 1
FEATURES = (
    "max_base",
    "max_aligned",
    "entropy_base",
    "entropy_aligned",
    "agree",
    "logprob_base_of_top_aligned",
    "logprob_aligned_of_top_base",
    *(f"top_{model}_is_{role.name.lower()}" for model in ("base", "aligned") for role in Role),
)
# The lowest log-probability, in nats, that counts.
_MIN_LOGPROB = -30.0
_MAX_BYTES = 64 * 2**20
_MAX_HIDDEN = 1024
# The most axes that the hidden states of one model are projected on.
MAX_AXES = 64


def features(signals: Signals) -> Tensor:
    """The features at N positions, in the order of :data:`FEATURES`: float32 [N, F]."""
    base, aligned = signals.of("base"), signals.of("aligned")
    columns = [
        base.max,
        aligned.max,
        base.entropy,
        aligned.entropy,
        base.top == aligned.top,
        base.logprob(aligned.top).clamp_min(_MIN_LOGPROB),
        aligned.logprob(base.top).clamp_min(_MIN_LOGPROB),
    ]
    for distribution in (base, aligned):
        roles = signals.vocabulary.role[distribution.top]
        columns += [roles == role for role in Role]
    return torch.stack([column.float() for column in columns], dim=1)


def project(hidden_states: Tensor, axes: Tensor) -> Tensor:
    """Hidden states [N, D] on axes [A, D]: float32 [N, A]."""
    axes = axes.to(hidden_states.device)
    # A sum for each axis, not a product of matrices: the same for any number of rows.
    return torch.stack([(hidden_states * axis).sum(dim=-1) for axis in axes], dim=1)


def principal_axes(hidden_states: Tensor, count: int) -> Tensor:
    """The axes along which hidden states [N, D] vary most, float32 [at most count, D]."""
    centred = hidden_states - hidden_states.mean(dim=0)
    axes: Tensor = torch.linalg.svd(centred, full_matrices=False)[2]
    return axes[:count].clone()


@dataclass(frozen=True, eq=False)
class LearnedModel:
    """One or two layers over standardised features, tanh between them.

    Attributes:
        mean, scale: of the features, float32 [F].
        layers: (weight [out, in], bias [out]) of each; the last has one output.
        trained: how it was trained, plain JSON.
        axes: of each model whose hidden states it reads, float32 [A, D].
    """

    mean: Tensor
    scale: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    trained: dict[str, Any]
    axes: Mapping[Source, Tensor] = field(default_factory=dict)

    @property
    def hidden_widths(self) -> dict[Source, int]:
        """D of each model whose hidden states it reads."""
        return {source: axes.shape[1] for source, axes in self.axes.items()}

    def read(self, signals: Signals) -> Tensor:
        """What it reads at N positions, float32 [N, F]: :data:`FEATURES`, then the projections."""
        projected = [
            project(signals.hidden_states(source), axes) for source, axes in self.axes.items()
        ]
        return torch.cat((features(signals), *projected), dim=1)

    def probability(self, rows: Tensor) -> Tensor:
        """The probability that base should write the word: float32 [N, F] → [N]."""
        device = rows.device
        hidden = (rows - self.mean.to(device)) / self.scale.to(device)
        for number, (weight, bias) in enumerate(self.layers):
            hidden = hidden.tanh() if number else hidden
            # A sum for each output, not a product of matrices: the same for any number of rows.
            hidden = (hidden[:, None] * weight.to(device)).sum(dim=-1) + bias.to(device)
        return hidden[:, 0].sigmoid()

    def to_json(self) -> dict[str, Any]:
        """What its file holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "features": _names(self.axes),
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
            "layers": [{"weight": w.tolist(), "bias": b.tolist()} for w, b in self.layers],
            "trained": self.trained,
        } | ({"axes": {s: axes.tolist() for s, axes in self.axes.items()}} if self.axes else {})

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Read what a file holds; ValueError says what is wrong with it."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("it is no learned router")
        if value.get("version") != VERSION:
            raise ValueError(f"its version is {value.get('version')!r}, and {VERSION} is read here")
        axes = _axes(value.get("axes", {}))
        if value.get("features") != _names(axes):
            raise ValueError("its features are others than this version of BACo computes")
        width = len(value["features"])
        mean, scale = (_tensor(value.get(name), name, (width,)) for name in ("mean", "scale"))
        if bool((scale <= 0).any()):
            raise ValueError("a scale is not positive")
        given = value.get("layers")
        if not isinstance(given, list) or not 1 <= len(given) <= 2:
            raise ValueError("it needs one or two layers")
        layers = []
        for number, layer in enumerate(given):
            if not isinstance(layer, dict):
                raise ValueError("a layer is not an object")
            out = 1 if number == len(given) - 1 else len(layer.get("bias") or ())
            if not 1 <= out <= _MAX_HIDDEN:
                raise ValueError(f"a hidden layer has {out} units, from 1 to {_MAX_HIDDEN} fit")
            weight = _tensor(layer.get("weight"), "weight", (out, width))
            layers.append((weight, _tensor(layer.get("bias"), "bias", (out,))))
            width = out
        trained = value.get("trained")
        trained = trained if isinstance(trained, dict) else {}
        return cls(mean, scale, tuple(layers), trained, axes)


def load(path: str | None) -> LearnedModel:
    """A learned router's file, as ``baco router train`` writes it.

    Raises:
        BacoError: no file was named, or it cannot be read or is not a learned router.
    """
    advice = "give a file that 'baco router train RUN --out FILE' wrote"
    if path is None:
        raise BacoError(f"Learned needs a file, as in Learned:router.json: {advice}")
    try:
        if Path(path).stat().st_size > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        return LearnedModel.from_json(value)
    except OSError as error:
        raise BacoError(f"learned router {path!r} cannot be read: {advice}") from error
    except (ValueError, RecursionError) as error:
        why = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BacoError(f"learned router {path!r} cannot be used ({why}): {advice}") from error


def _names(axes: Mapping[Source, Tensor]) -> list[str]:
    """The names of everything that a model with these axes reads."""
    projected = [f"hidden_{source}_{i}" for source in axes for i in range(len(axes[source]))]
    return [*FEATURES, *projected]


def _axes(value: Any) -> dict[Source, Tensor]:
    if not isinstance(value, dict) or not value.keys() <= set(MODELS):
        raise ValueError("its axes are not those of base and aligned")
    axes: dict[Source, Tensor] = {}
    for source, rows in value.items():
        count = len(rows) if isinstance(rows, list) else 0
        if not 1 <= count <= MAX_AXES or not isinstance(rows[0], list) or not rows[0]:
            raise ValueError(f"the {source} model has no axes, or more than {MAX_AXES}")
        axes[source] = _tensor(rows, f"{source} axes", (count, len(rows[0])))
    return axes


def _tensor(value: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        tensor = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its {name} is not numbers") from error
    if tuple(tensor.shape) != shape:
        raise ValueError(f"its {name} has the shape {list(tensor.shape)}, not {list(shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"its {name} is not finite")
    return tensor


def standardised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the scale of features, each [F]; the scale of a constant feature is 1."""
    scale = rows.std(dim=0, correction=0)
    return rows.mean(dim=0), torch.where(scale > 1e-6, scale, torch.ones_like(scale))


def fit(
    rows: Tensor, is_base: Tensor, weight: Tensor, *, hidden: int = 0, decay: float = 1e-3
) -> LearnedModel:
    """Fit the sources of words by weighted cross-entropy, over all rows at once.

    Args:
        rows: features, float32 [N, F].
        is_base: the source of each word, bool [N].
        weight: of each word, float32 [N], not negative.
        hidden: units of the hidden layer; 0 is a logistic regression.
        decay: of the squared weights.
    """
    mean, scale = standardised(rows)
    values, labels = (rows - mean) / scale, is_base.float()
    generator = torch.Generator().manual_seed(0)
    widths = [rows.shape[1], hidden, 1] if hidden else [rows.shape[1], 1]
    layers = []
    for before, after in pairwise(widths):
        start = torch.randn(after, before, generator=generator) / math.sqrt(before)
        start = start if hidden else torch.zeros_like(start)
        layers.append((start.requires_grad_(), torch.zeros(after, requires_grad=True)))
    parameters = [parameter for layer in layers for parameter in layer]
    optimiser = torch.optim.LBFGS(parameters, max_iter=300, line_search_fn="strong_wolfe")
    share = weight / weight.sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        out = values
        for number, (matrix, bias) in enumerate(layers):
            out = (out.tanh() if number else out) @ matrix.T + bias
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            out[:, 0], labels, reduction="none"
        )
        loss = (share * losses).sum() + decay * sum((matrix**2).sum() for matrix, _ in layers)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    fitted = tuple((matrix.detach(), bias.detach()) for matrix, bias in layers)
    return LearnedModel(mean, scale, fitted, {})
