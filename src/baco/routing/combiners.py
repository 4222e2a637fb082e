"""Combiners: one row of logits out of the rows of both models.

A router picks one model's row; a combiner makes a row of its own, at every token. A combiner is
named wherever a router is named: ``Ensemble:0.3``. To add a built-in one, write a function at the
end of this file.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.plugins import register_plugins
from baco.routing.router import BOTH
from baco.routing.rules import RULES
from baco.routing.signals import Signals
from baco.sampling.parameters import Parameter, first_line, parameters_of, read_numbers, spelled
from baco.source import Source

# The provenance of a row.
MIXED, ALIGNED, BASE = -1, 0, 1

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Combined:
    """Rows that a combiner made.

    Attributes:
        logits: float [N, V]; -inf for tokens that may not be written.
        source: where each row comes from, int64 [N]: ``BASE``, ``ALIGNED``, or ``MIXED`` where it
            depends on both models' rows.
    """

    logits: Tensor
    source: Tensor


@dataclass(frozen=True, slots=True)
class Combiner:
    """A combiner that can be named.

    Attributes:
        name: one word.
        function: ``(base [N, V], aligned [N, V], *numbers) → logits [N, V]`` or ``Combined``.
        help: one sentence.
        parameters: the numbers it takes, in order.
    """

    name: str
    function: Callable[..., Tensor | Combined] = field(repr=False)
    help: str
    parameters: tuple[Parameter, ...]

    @property
    def example(self) -> str:
        """How a user writes it."""
        return spelled(self.name, [parameter.example for parameter in self.parameters])

    def __call__(self, base: Tensor, aligned: Tensor, *numbers: float) -> Combined:
        """The combined rows.

        Tokens that neither model may write (-inf) stay so. A row in which no token would be left,
        or that would hold NaN or inf, is the aligned model's.

        Args:
            base, aligned: log-probabilities in nats, float32 [N, V].
            numbers: one for each parameter.

        Raises:
            BacoError: the function returns another shape or type.
        """
        result = self.function(base.clone(), aligned.clone(), *numbers)
        if isinstance(result, Tensor):
            mixed = torch.full(base.shape[:1], MIXED, dtype=torch.int64, device=base.device)
            result = Combined(result, mixed)
        if (
            not isinstance(result, Combined)
            or result.logits.shape != base.shape
            or result.source.shape != base.shape[:1]
        ):
            raise BacoError(
                f"combiner {self.name} returned {_shape(result)} for logits {tuple(base.shape)}: "
                "return logits of the same shape, or Combined with a source for each row"
            )
        impossible = (base == -math.inf) & (aligned == -math.inf)
        logits = result.logits.to(base.dtype).masked_fill(impossible, -math.inf)
        usable = logits.amax(dim=-1).isfinite()
        return Combined(
            logits.where(usable[:, None], aligned), result.source.where(usable, ALIGNED)
        )


def _shape(result: object) -> str:
    logits = result.logits if isinstance(result, Combined) else result
    if not isinstance(logits, Tensor):
        return type(result).__name__
    source = f" and sources {tuple(result.source.shape)}" if isinstance(result, Combined) else ""
    return f"{tuple(logits.shape)}{source}"


@dataclass(frozen=True, slots=True)
class Combination:
    """A combiner with its numbers, in the place of a router."""

    combiner: Combiner
    numbers: tuple[float, ...]

    @property
    def spelling(self) -> str:
        return spelled(self.combiner.name, self.numbers)

    @property
    def only(self) -> Source | None:
        return None

    @property
    def reads(self) -> frozenset[Source]:
        return BOTH

    def __call__(self, signals: Signals) -> Tensor:
        """False everywhere: it picks no model, so penalties read the aligned model's prompt."""
        return torch.zeros(signals.aligned.shape[:1], dtype=torch.bool, device=signals.base.device)

    def combine(self, base: Tensor, aligned: Tensor) -> Combined:
        """The combined rows of log-probabilities [N, V] of both models."""
        return self.combiner(base, aligned, *self.numbers)

    def next_rows(
        self, signals: Signals, index: Tensor, banned: Tensor, ends: tuple[int, ...]
    ) -> Combined:
        """The rows that tokens are drawn from, as log-probabilities.

        Args:
            signals: both models' distributions at N positions.
            index: which of these positions, int64 [K].
            banned: tokens that are never drawn from the base model, bool [V].
            ends: the end tokens of both models.

        Returns:
            Logits [K, V] and sources [K].
        """
        base, aligned = signals.base, signals.aligned
        if signals.allowed is not None:  # first, so that the combiner leaves some allowed token
            base, aligned = (signals.allowed.mask(logits.clone()) for logits in (base, aligned))
        combined = self.combine(
            pooled_logprobs(base[index].masked_fill(banned, -math.inf), ends),
            pooled_logprobs(aligned[index], ends),
        )
        return Combined(combined.logits.log_softmax(dim=-1), combined.source)


_COMBINERS: dict[str, Combiner] = {}


def register_combiner(
    name: str, *, help: str | None = None, **ranges: tuple[float, float]
) -> Callable[[Callable[..., Tensor | Combined]], Combiner]:
    """Decorate a function so that its name can be given wherever routers are named.

    The function takes the log-probabilities of the base model and of the aligned model, float32
    [N, V] (its own copies), and then numbers with or without defaults. It returns logits [N, V],
    which need not be normalised; or ``Combined``, where some rows come from one model alone. All
    rows come at once, and the result for a row must depend on that row and the numbers alone. A
    number annotated ``int`` is a whole number.

    Args:
        name: letters, digits and ``_``; case is ignored when it is looked up.
        help: one sentence for ``baco combiners``; by default the docstring's first line.
        ranges: for each number (lowest, highest), both allowed.

    Raises:
        BacoError: a name that is taken or cannot be typed, or a function of another signature.
    """

    def decorate(function: Callable[..., Tensor | Combined]) -> Combiner:
        parameters = parameters_of(f"combiner {name!r}", "(base, aligned, …)", function, 2, ranges)
        return _add(Combiner(name, function, help or first_line(function), parameters))

    return decorate


def _add(combiner: Combiner) -> Combiner:
    if not _NAME.fullmatch(combiner.name):
        raise BacoError(f"combiner name {combiner.name!r}: use letters, digits and _")
    taken = {known.casefold() for known in (*_COMBINERS, *RULES, "Base", "Aligned")}
    if combiner.name.casefold() in taken:
        raise BacoError(f"combiner name {combiner.name!r} is taken: choose another")
    _COMBINERS[combiner.name] = combiner
    return combiner


def combiners() -> dict[str, Combiner]:
    """Every combiner by its name: built-in ones, those of installed packages, the user's own.

    Raises:
        BacoError: an installed package's combiner cannot be loaded or is not a combiner.
    """
    wanted = "a function of (base, aligned, …)"
    register_plugins("combiners", _COMBINERS, Combiner, _add, register_combiner, wanted)
    return _COMBINERS


def pooled_logprobs(logits: Tensor, ends: tuple[int, ...]) -> Tensor:
    """log_softmax of logits [N, V], with the probability of all end tokens on the first of them.

    The end tokens of both models are one event. Otherwise models with different end tokens would
    keep each other from ending.
    """
    logprobs = logits.log_softmax(dim=-1)
    if len(ends) < 2:
        return logprobs
    index = torch.tensor(sorted(ends), device=logits.device)
    end = logprobs[:, index].logsumexp(dim=-1, keepdim=True)
    return logprobs.index_fill(1, index, -math.inf).index_copy(1, index[:1], end)


def combination(combiner: Combiner, spelling: str) -> Combination:
    """The combiner with the numbers of a spelling.

    Raises:
        BacoError: a number that is missing, out of range or one too many.
    """
    numbers = read_numbers(
        "combiner", spelling, combiner.name, combiner.parameters, combiner.example
    )
    return Combination(combiner, numbers)


@register_combiner("Ensemble", weight=(0.0, 1.0))
def ensemble(base: Tensor, aligned: Tensor, weight: float = 0.5) -> Tensor:
    """both models' probabilities, averaged; the number is the base model's weight"""
    return torch.logaddexp(base + _log(weight), aligned + _log(1 - weight))


@register_combiner("LogitEnsemble", weight=(0.0, 1.0))
def logit_ensemble(base: Tensor, aligned: Tensor, weight: float = 0.5) -> Tensor:
    """both models' logits, averaged; the number is the base model's weight"""
    # A token that the base may not write has the aligned model's logit for both.
    base = base.where(base > -math.inf, aligned)
    # The weights 0 and 1 would make NaN of 0 · -inf.
    if weight in (0.0, 1.0):
        return base if weight else aligned
    return weight * base + (1 - weight) * aligned


@register_combiner("Contrast", strength=(0.0, 10.0), plausible=(0.0, 1.0))
def contrast(
    base: Tensor, aligned: Tensor, strength: float = 0.5, plausible: float = 0.1
) -> Tensor:
    """the aligned model's logits against the base model's (contrastive decoding)"""
    # O'Brien and Lewis 2023 (arXiv 2309.09117), equation 1: (1 + β) · expert - β · amateur over the
    # tokens that have at least α times the expert's highest probability. The expert is the aligned
    # model, β the strength, α ``plausible``.
    floor = aligned.amax(dim=-1, keepdim=True) + _log(plausible)
    # A token that the base may not write is neither raised nor lowered.
    base = base.where(base > -math.inf, aligned)
    row = (1 + strength) * aligned - strength * base
    return row.masked_fill((aligned < floor) | (aligned == -math.inf), -math.inf)


def _log(number: float) -> float:
    return math.log(number) if number else -math.inf


BUILT_IN_COMBINERS = frozenset(_COMBINERS)
