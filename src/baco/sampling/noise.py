"""The replayable noise: a pure function of (seed, prompt, sample, position, token), without state.

It knows numbers only; seed and prompt come as one number, see :mod:`baco.sampling.seeds`. The same
noise is added whichever model writes and whatever batch a row is in, so a draw depends on neither.
"""

import hashlib
import math
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Coins that routers toss. Every further use of coins has a stream name of its own.
ROUTER = "router"

_WORD = 0xFFFFFFFF
# A uniform is an odd multiple of 2**-24, exact in float32 and never 0 or 1, so that the Gumbel
# noise made of it lies between these two bounds.
GUMBEL_MAX = 24 * math.log(2)
GUMBEL_MIN = -math.log(24 * math.log(2))
# The hash is spelled once, for tensors, for arrays of 32-bit words and for plain numbers.
_Whole = TypeVar("_Whole", int, Tensor, NDArray[Any])


def _mix(x: _Whole) -> _Whole:
    """Avalanche 32-bit words (lowbias32, C. Wellons 2018): int64 of any shape, or plain numbers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def noise_keys(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """The two 32-bit words that stand for (seed, sample, position): int64 [..., 2].

    ``seed`` is the prompt's own, made by :func:`baco.sampling.seeds.noise_seed`.
    """
    low, high = seed & _WORD, (seed >> 32) & _WORD
    if seed.device.type != "cpu":
        return torch.stack(_words(low, high, sample, position), dim=-1)
    with np.errstate(over="ignore"):
        words = _words(*(_array(part) for part in (low, high, sample, position)))
    return torch.from_numpy(np.stack(words, axis=-1).astype(np.int64))


def _array(words: Tensor) -> NDArray[np.uint32]:
    """Lower halves of int64 on a CPU: an array's operations start sooner than a tensor's."""
    return words.numpy().astype(np.uint32)


def _words(low: _Whole, high: _Whole, sample: _Whole, position: _Whole) -> tuple[_Whole, _Whole]:
    """From the lower and upper half of the seed, the sample and the position."""
    first = _mix(_mix(_mix(_mix(low) ^ high) ^ (sample & _WORD)) ^ (position & _WORD))
    return first, _mix(first ^ 0x9E3779B9 ^ _mix((low + 0x85EBCA6B) & _WORD))


def _bits(first: _Whole, second: _Whole, token: _Whole) -> _Whole:
    """The odd numerator of a uniform, of 24 bits."""
    mixed = _mix(_mix((token ^ first) & _WORD) ^ second)
    bits: _Whole = (mixed >> 9) << 1 | 1
    return bits


def uniform(keys: Tensor, token: Tensor) -> Tensor:
    """Uniforms in (0, 1), float32: ``keys`` [..., 2] and ``token`` ids [...] broadcast."""
    if keys.device.type != "cpu":
        return _bits(keys[..., 0], keys[..., 1], token).float() * 2.0**-24
    with np.errstate(over="ignore"):
        bits = _bits(*(_array(part) for part in (keys[..., 0], keys[..., 1], token)))
    return torch.from_numpy(np.asarray(bits, dtype=np.float32)) * 2.0**-24


def gumbel(keys: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float32: ``keys`` [..., 2] and ``token`` ids [...] broadcast."""
    return uniform(keys, token).log_().neg_().log_().neg_()


def coin(keys: Tensor, stream: str) -> Tensor:
    """Uniforms in (0, 1), float32 [...], for ``keys`` [..., 2]; streams are independent."""
    return uniform(keys, torch.full_like(keys[..., 0], _stream_word(stream)))


@cache
def _stream_word(stream: str) -> int:
    """What takes a token's place for a stream of coins: no vocabulary reaches 2**31 tokens."""
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=4).digest()) | 1 << 31


def gumbel_of(seed: int, sample: int, position: int, token: int) -> float:
    """The same noise for one token, in plain numbers."""
    words = _words(seed & _WORD, (seed >> 32) & _WORD, sample, position)
    return -math.log(-math.log(_bits(*words, token) * 2.0**-24))
