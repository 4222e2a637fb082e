"""Samplers by name, and the chain of samplers that a request names.

A sampler is a pure function of the logits at some positions, the answers' tokens before them, and
its parameters. A chain runs after penalties and ``logit_bias`` and before temperature, ``top_k``,
``top_p`` and ``min_p``. To add a built-in sampler, write a function at the end of this file.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from baco.errors import BacoError
from baco.plugins import register_plugins
from baco.sampling.noise import coin, max_drawn_entries
from baco.sampling.parameters import Parameter, first_line, parameters_of, read_numbers, spelled
from baco.sampling.top_p import outside_top_p

MAX_CHAIN = 16  # samplers of one request
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Context:
    """What a sampler reads beside the logits at N positions.

    Attributes:
        is_base: where the base model writes, bool [N]; False where a combiner mixes both models.
    """

    def __init__(self, tokens: Callable[[], Tensor], keys: Tensor, is_base: Tensor) -> None:
        """Create a context.

        Args:
            tokens: makes :attr:`tokens`, which few samplers read.
            keys: noise keys of the positions, int64 [N, 2].
            is_base: see the attribute.
        """
        self._make_tokens, self._keys, self.is_base = tokens, keys, is_base

    @cached_property
    def tokens(self) -> Tensor:
        """The answer's tokens before each position, drafts included: int64 [N, T].

        The last token is in the last column. Shorter answers begin with -1. The prompt is left out.
        """
        return self._make_tokens()

    def counts(self, size: int) -> Tensor:
        """How often each answer has each of ``size`` tokens: int64 [N, size]."""
        tokens = self.tokens.where(self.tokens >= 0, size)
        counts = tokens.new_zeros(len(tokens), size + 1)
        return counts.scatter_add_(1, tokens, torch.ones_like(tokens))[:, :size]

    def coin(self, stream: str) -> Tensor:
        """A uniform number in (0, 1) for each position: float32 [N].

        It depends on seed, prompt, sample, position and ``stream`` alone, so answers can be
        replayed. Give each use a stream name of its own, such as the sampler's name.
        """
        return coin(self._keys, stream)

    def rows(self, index: Tensor) -> "Context":
        """The context of the positions ``index``, int64 [M]."""
        return Context(lambda: self.tokens[index], self._keys[index], self.is_base[index])


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler that can be named.

    Attributes:
        name: one word.
        function: ``(logits [N, V], context, *numbers) → logits [N, V]``.
        help: one sentence.
        parameters: the numbers it takes, in order.
    """

    name: str
    function: Callable[..., Tensor] = field(repr=False)
    help: str
    parameters: tuple[Parameter, ...]

    @property
    def example(self) -> str:
        """How a user writes it."""
        return Step(self, tuple(parameter.example for parameter in self.parameters)).spelling

    def __call__(self, logits: Tensor, context: Context, *numbers: float) -> Tensor:
        """The logits [N, V] after this sampler.

        Tokens that may not be written (-inf) stay so. A row in which no token would be left, or
        that would hold NaN or inf, stays as it is.

        Raises:
            BacoError: the function returns another shape or type.
        """
        shaped = self.function(logits.clone(), context, *numbers)
        if not isinstance(shaped, Tensor) or shaped.shape != logits.shape:
            what = tuple(shaped.shape) if isinstance(shaped, Tensor) else type(shaped).__name__
            raise BacoError(
                f"sampler {self.name} returned {what} for logits {tuple(logits.shape)}: return "
                "logits of the same shape"
            )
        shaped = shaped.to(logits.dtype).masked_fill(logits == -math.inf, -math.inf)
        return shaped.where(shaped.amax(dim=-1, keepdim=True).isfinite(), logits)


@dataclass(frozen=True, slots=True)
class Step:
    """A sampler of a chain with its numbers."""

    sampler: Sampler
    numbers: tuple[float, ...]

    @property
    def spelling(self) -> str:
        """How it is written, with all its numbers."""
        return spelled(self.sampler.name, self.numbers)


Chain = tuple[Step, ...]
_SAMPLERS: dict[str, Sampler] = {}


def register_sampler(
    name: str, *, help: str | None = None, **ranges: tuple[float, float]
) -> Callable[[Callable[..., Tensor]], Sampler]:
    """Decorate a function so that its name can be given wherever samplers are named.

    The function takes logits [N, V] (float32, its own copy), a ``Context``, and then numbers
    with or without defaults. It returns logits [N, V]. All rows come at once, and the result for a
    row must depend on that row, its tokens and the numbers alone. A number annotated ``int`` is a
    whole number.

    Args:
        name: letters, digits and ``_``; case is ignored when it is looked up.
        help: one sentence for ``baco samplers``; by default the docstring's first line.
        ranges: for each number (lowest, highest), both allowed.

    Raises:
        BacoError: a name that is taken or cannot be typed, or a function of another signature.
    """

    def decorate(function: Callable[..., Tensor]) -> Sampler:
        return _add(
            Sampler(
                name,
                function,
                help or first_line(function),
                parameters_of(f"sampler {name!r}", "(logits, context, …)", function, 2, ranges),
            )
        )

    return decorate


def samplers() -> dict[str, Sampler]:
    """Every sampler by its name: built-in ones, those of installed packages, the user's own.

    Raises:
        BacoError: an installed package's sampler cannot be loaded or is not a sampler.
    """
    wanted = "a function of (logits, context, …)"
    register_plugins("samplers", _SAMPLERS, Sampler, _add, register_sampler, wanted)
    return _SAMPLERS


def parse_chain(spellings: Sequence[str]) -> Chain:
    """The samplers that spellings such as ``top_n_sigma:1.0`` name, in order.

    Raises:
        BacoError: no such sampler, a number that is missing or out of range, or too many samplers.
    """
    if len(spellings) > MAX_CHAIN:
        raise BacoError(f"{len(spellings)} samplers: name at most {MAX_CHAIN}")
    return tuple(map(_parse, spellings))


def apply_chains(
    logits: Tensor, chains: Sequence[Chain], which: Tensor, context: Context
) -> Tensor:
    """Run each position's chain.

    Args:
        logits: float32 [N, V], left as they are.
        chains: each distinct chain once; one may be empty.
        which: the number of each position's chain, int64 [N].
        context: of the N positions.

    Returns:
        float32 [N, V].
    """
    most = max(1, max_drawn_entries(logits.device.type) // logits.shape[-1])
    if len(chains) == 1 and len(logits) <= most:
        return _run(chains[0], logits, context)
    shaped = logits.clone()
    for number, chain in enumerate(chains):
        rows = (which == number).nonzero()[:, 0]
        for part in rows.split(most) if chain else ():
            shaped[part] = _run(chain, logits[part], context.rows(part))
    return shaped


def _run(chain: Chain, logits: Tensor, context: Context) -> Tensor:
    for step in chain:
        logits = step.sampler(logits, context, *step.numbers)
    return logits


def _parse(spelling: str) -> Step:
    if not isinstance(spelling, str):
        raise BacoError(f"sampler {spelling!r}: give a spelling such as top_n_sigma:1.0")
    name = spelling.partition(":")[0].strip()
    listed = {known.casefold(): sampler for known, sampler in samplers().items()}
    sampler = listed.get(name.casefold())
    if sampler is None:
        raise BacoError(
            f"unknown sampler {spelling!r}: use one of {', '.join(_SAMPLERS)} (see 'baco samplers')"
        )
    return Step(
        sampler,
        read_numbers("sampler", spelling, sampler.name, sampler.parameters, sampler.example),
    )


def _add(sampler: Sampler) -> Sampler:
    if not _NAME.fullmatch(sampler.name):
        raise BacoError(f"sampler name {sampler.name!r}: use letters, digits and _")
    if sampler.name.casefold() in {known.casefold() for known in _SAMPLERS}:
        raise BacoError(f"sampler name {sampler.name!r} is taken: choose another")
    _SAMPLERS[sampler.name] = sampler
    return sampler


@register_sampler("top_n_sigma", n=(0.0, 100.0))
def top_n_sigma(logits: Tensor, _: Context, n: float = 1.0) -> Tensor:
    """Keep logits within n standard deviations of the highest (Tang et al. 2024)."""
    allowed = logits > -math.inf
    count = allowed.sum(dim=-1, keepdim=True)
    mean = logits.where(allowed, 0).sum(dim=-1, keepdim=True) / count
    variance = ((logits - mean).where(allowed, 0) ** 2).sum(dim=-1, keepdim=True) / count
    floor = logits.amax(dim=-1, keepdim=True) - n * variance.sqrt()
    return logits.masked_fill(logits < floor, -math.inf)


@register_sampler("p_less")
def p_less(logits: Tensor, _: Context) -> Tensor:
    """Keep tokens at least as probable as two draws are to agree (Tan et al. 2025)."""
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < (probs**2).sum(dim=-1, keepdim=True), -math.inf)


@register_sampler("xtc", probability=(0.0, 1.0), threshold=(0.0, 1.0))
def xtc(
    logits: Tensor, context: Context, probability: float = 0.5, threshold: float = 0.1
) -> Tensor:
    """With a probability, of the tokens above a threshold keep only the least likely (XTC)."""
    probs = logits.softmax(dim=-1)
    above = (probs >= threshold) & (logits > -math.inf)
    least = probs.where(above, math.inf).amin(dim=-1, keepdim=True)
    excluded = above & (probs > least) & (context.coin("xtc") < probability)[:, None]
    return logits.masked_fill(excluded, -math.inf)


@register_sampler("base_top_p", p=(0.0, 1.0))
def base_top_p(logits: Tensor, context: Context, p: float = 0.9) -> Tensor:
    """Where the base model writes, keep the likeliest tokens up to this total probability."""
    drop = outside_top_p(logits, logits.new_full((len(logits),), p))
    return logits.masked_fill(drop & context.is_base[:, None], -math.inf)


@register_sampler("base_min_p", p=(0.0, 1.0))
def base_min_p(logits: Tensor, context: Context, p: float = 0.1) -> Tensor:
    """Where the base model writes, keep tokens with this fraction of the highest probability."""
    floor = logits.amax(dim=-1, keepdim=True) + (math.log(p) if p else -math.inf)
    return logits.masked_fill((logits < floor) & context.is_base[:, None], -math.inf)


@register_sampler("no_repeat_ngram", size=(1, math.inf))
def no_repeat_ngram(logits: Tensor, context: Context, size: int = 3) -> Tensor:
    """Keep an answer from repeating any of its n-grams of this many tokens (Paulus et al. 2017)."""
    tokens, vocabulary = context.tokens, logits.shape[-1]
    if tokens.shape[1] < size:
        return logits
    ngrams = tokens.unfold(1, size, 1)  # [N, T - size + 1, size]
    begun = tokens[:, tokens.shape[1] - size + 1 :]
    again = (ngrams[..., :-1] == begun[:, None]).all(dim=-1) & (ngrams >= 0).all(dim=-1)
    repeated = logits.new_zeros(len(logits), vocabulary + 1, dtype=torch.bool)
    repeated.scatter_(1, ngrams[..., -1].where(again, vocabulary), True)
    return logits.masked_fill(repeated[:, :vocabulary], -math.inf)
