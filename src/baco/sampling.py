"""How a token is drawn from a row of logits: parameters, truncation, the replayable noise.

It knows rows of logits and numbers; it knows nothing of models, routers or text. A draw is a pure
function of the row and of (seed, sample, position): no generator, no state, so the batch a row
happens to stand in cannot change it.
"""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from baco.errors import BacoError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What to draw for one prompt. Every field is checked when the object is made.

    Args:
        n: samples per prompt, at least 1.
        seed: 0 … 2**63 - 1; None draws a fresh one, which the results record.
        temperature: 0 takes the most likely token; at most 100.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        min_p: keep tokens at least this fraction of the most likely one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            speaking model's prompt or in the answer (Keskar et al. 2019); 1 is off.
        max_tokens: length of an answer, in tokens.
        stop: strings that end an answer; they are cut off.
        logprobs: also return this many most likely tokens per position, at most 20.

    Raises:
        BacoError: a value out of its range.
    """

    n: int = 1
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise BacoError(f"stop is {self.stop!r}: give a string or a list of non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        _whole("n", self.n, 1, 65_536)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        _number("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise BacoError("top_p is 0: give a number above 0 and up to 1 (1 keeps every token)")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, 20)

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """A copy with ``changes``; BacoError for a name that is no sampling parameter."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise BacoError(
                    f"unknown sampling parameter {name!r}: known are {', '.join(known)}"
                )
        return replace(self, **changes)

    def seeded(self) -> Self:
        """A copy that has a seed: its own, or a fresh one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**31))


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BacoError(f"{name} is {value!r}: give a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BacoError(f"{name} is {value!r}: give a number from {low:g} to {high:g}")


# --- the replayable noise -------------------------------------------------------------------------

_WORD = 0xFFFFFFFF
# A uniform is an odd multiple of 2**-24, exact in float32 and never 0 or 1, so that the Gumbel
# noise made of it lies between these two bounds.
GUMBEL_MAX = 24 * math.log(2)
GUMBEL_MIN = -math.log(24 * math.log(2))
# The "token" whose uniform decides for routers that toss a coin (no vocabulary is that large).
COIN = _WORD


def _mix(x: "Tensor") -> "Tensor":
    """Avalanche 32-bit words held in int64 (lowbias32, C. Wellons 2018); any shape."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def noise_keys(seed: "Tensor", sample: "Tensor", position: "Tensor") -> "Tensor":
    """The two 32-bit words that stand for (seed, sample, position): int64 [..., 2]."""
    import torch

    low, high = seed & _WORD, (seed >> 32) & _WORD
    first = _mix(_mix(_mix(_mix(low) ^ high) ^ (sample & _WORD)) ^ (position & _WORD))
    second = _mix(first ^ 0x9E3779B9 ^ _mix(low + 0x85EBCA6B & _WORD))
    return torch.stack((first, second), dim=-1)


def uniform(keys: "Tensor", token: "Tensor") -> "Tensor":
    """Uniforms in (0, 1), float32: ``keys`` [..., 2] and ``token`` ids [...] broadcast."""
    bits = _mix(_mix((token ^ keys[..., 0]) & _WORD) ^ keys[..., 1]) >> 9  # 23 bits
    return (2 * bits + 1).float() * 2.0**-24


def gumbel(keys: "Tensor", token: "Tensor") -> "Tensor":
    """Standard Gumbel noise, float32, a pure function of (seed, sample, position, token id)."""
    return -(-uniform(keys, token).log()).log()


# --- one draw per row -----------------------------------------------------------------------------


@dataclass(slots=True)
class DrawTable:
    """The sampling parameters of a batch, one entry per row [B], on the logits' device.

    The flags say whether any row uses a step, so that a batch pays only for what it asked for.
    """

    temperature: "Tensor"  # float32
    top_k: "Tensor"  # int64, 0 keeps all
    top_p: "Tensor"  # float32
    min_p: "Tensor"  # float32
    repetition_penalty: "Tensor"  # float32
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool

    @classmethod
    def of(cls, params: "list[SamplingParams]", device: Any) -> Self:
        import torch

        def column(name: str, dtype: Any) -> "Tensor":
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        return cls(
            temperature=column("temperature", torch.float32),
            top_k=column("top_k", torch.int64),
            top_p=column("top_p", torch.float32),
            min_p=column("min_p", torch.float32),
            repetition_penalty=column("repetition_penalty", torch.float32),
            any_top_k=any(p.top_k > 0 for p in params),
            any_top_p=any(p.top_p < 1 for p in params),
            any_min_p=any(p.min_p > 0 for p in params),
            any_penalty=any(p.repetition_penalty != 1 for p in params),
        )


def penalise(logits: "Tensor", seen: "Tensor", penalty: "Tensor") -> "Tensor":
    """Apply the repetition penalty [B] to the logits [B, V] of tokens ``seen`` [B, V] (bool)."""
    strength = penalty[:, None]
    return logits.where(~seen, (logits * strength).where(logits < 0, logits / strength))


def truncate(logits: "Tensor", table: DrawTable) -> "Tensor":
    """Set to -inf what top-k, top-p and min-p leave out, in that order; logits [B, V].

    Each step looks at the distribution the steps before it left, as in ``transformers``.
    """
    if table.any_top_k:
        widest = min(int(table.top_k.max()), logits.shape[-1])
        best = logits.topk(widest, dim=-1).values  # [B, widest]
        kth = best.gather(1, (table.top_k.clamp(1, widest) - 1)[:, None])
        logits = logits.masked_fill((logits < kth) & (table.top_k > 0)[:, None], -math.inf)
    if table.any_top_p:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens
        drop = (before >= table.top_p[:, None]).scatter(1, order, before >= table.top_p[:, None])
        drop &= (table.top_p < 1)[:, None]
        drop.scatter_(1, order[:, :1], False)
        logits = logits.masked_fill(drop, -math.inf)
    if table.any_min_p:
        floor = logits.amax(dim=-1, keepdim=True) + table.min_p.log()[:, None]
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits


def draw(logits: "Tensor", table: DrawTable, keys: "Tensor") -> "Tensor":
    """Draw one token per row: argmax of truncated logits / temperature + Gumbel noise.

    Args:
        logits: float32 [B, V]; -inf where a token may not be said.
        table: the rows' sampling parameters (penalties already applied to ``logits``).
        keys: int64 [B, 2] from :func:`noise_keys`.

    Returns:
        Token ids, int64 [B]. At temperature 0 the plain argmax.
    """
    import torch

    greedy = logits.argmax(dim=-1)
    cold = table.temperature == 0
    warm = logits / table.temperature.masked_fill(cold, 1.0)[:, None]
    warm = truncate(warm, table)
    if logits.device.type == "cpu":
        # Noise is bounded, so a token further below the best than the bounds lie apart cannot win.
        floor = warm.amax(dim=-1, keepdim=True) - (GUMBEL_MAX - GUMBEL_MIN)
        row, token = (warm >= floor).nonzero(as_tuple=True)
        score = torch.full_like(warm, -math.inf)
        score[row, token] = warm[row, token] + gumbel(keys[row], token)
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device)
        score = warm + gumbel(keys[:, None, :], ids)
    return torch.where(cold, greedy, score.argmax(dim=-1))
