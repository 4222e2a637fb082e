"""The replayable noise: a pure function of (seed, sample, position, token), no generator, no state.

It knows numbers only. The same noise is added whichever model speaks and in whatever batch a row
happens to stand, so that a draw cannot depend on either.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# A uniform is an odd multiple of 2**-24, exact in float32 and never 0 or 1, so that the Gumbel
# noise made of it lies between these two bounds.
GUMBEL_MAX = 24 * math.log(2)
GUMBEL_MIN = -math.log(24 * math.log(2))
# The "token" whose uniform decides for routers that toss a coin (no vocabulary is that large).
COIN = _WORD
# The hash is spelled once, for tensors and for plain numbers.
_Whole = TypeVar("_Whole", int, Tensor)


def _mix(x: _Whole) -> _Whole:
    """Avalanche 32-bit words (lowbias32, C. Wellons 2018): int64 of any shape, or plain numbers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def noise_keys(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """The two 32-bit words that stand for (seed, sample, position): int64 [..., 2]."""
    return torch.stack(_words(seed, sample, position), dim=-1)


def _words(seed: _Whole, sample: _Whole, position: _Whole) -> tuple[_Whole, _Whole]:
    low, high = seed & _WORD, (seed >> 32) & _WORD
    first = _mix(_mix(_mix(_mix(low) ^ high) ^ (sample & _WORD)) ^ (position & _WORD))
    return first, _mix(first ^ 0x9E3779B9 ^ _mix(low + 0x85EBCA6B & _WORD))


def _bits(first: _Whole, second: _Whole, token: _Whole) -> _Whole:
    """The odd numerator of a uniform, of 24 bits."""
    return 2 * (_mix(_mix((token ^ first) & _WORD) ^ second) >> 9) + 1


def uniform(keys: Tensor, token: Tensor) -> Tensor:
    """Uniforms in (0, 1), float32: ``keys`` [..., 2] and ``token`` ids [...] broadcast."""
    return _bits(keys[..., 0], keys[..., 1], token).float() * 2.0**-24


def gumbel(keys: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, a pure function of (seed, sample, position, token id)."""
    return -(-uniform(keys, token).log()).log()


def gumbel_of(seed: int, sample: int, position: int, token: int) -> float:
    """The same noise for one token, in plain numbers."""
    return -math.log(-math.log(_bits(*_words(seed, sample, position), token) * 2.0**-24))
