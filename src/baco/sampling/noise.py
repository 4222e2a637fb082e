"""Replayable noise: a pure function of (seed, prompt, sample, position, token), without state.

It knows numbers only. Seed and prompt come as one number, see :mod:`baco.sampling.seeds`. The noise
does not depend on the model that writes, nor on the other rows of a batch.
"""

import hashlib
import math
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The stream of coins for routers. Every other use of coins has a stream name of its own.
ROUTER = "router"

_MASK = 0xFFFFFFFF
# A uniform is an odd multiple of 2**-24, exact in float32 and never 0 or 1, so Gumbel noise lies
# between these two bounds.
GUMBEL_MAX = 24 * math.log(2)
GUMBEL_MIN = -math.log(24 * math.log(2))
# The hash is written once, for tensors, for arrays of 32-bit words and for plain numbers.
_Word = TypeVar("_Word", int, Tensor, NDArray[Any])


def _mix(x: _Word) -> _Word:
    """Avalanche 32-bit words (lowbias32, C. Wellons 2018): int64 of any shape, or plain numbers."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def noise_keys(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """Two 32-bit words for each (seed, sample, position): int64 [..., 2].

    ``seed`` is the prompt's own, from :func:`baco.sampling.seeds.noise_seed`.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    if seed.device.type != "cpu":
        return torch.stack(_words(low, high, sample, position), dim=-1)
    with np.errstate(over="ignore"):
        words = _words(*(_array(part) for part in (low, high, sample, position)))
    return torch.from_numpy(np.stack(words, axis=-1).astype(np.int64))


def _array(words: Tensor) -> NDArray[np.uint32]:
    """The lower 32 bits of int64 on a CPU. NumPy operations start sooner than torch's."""
    return words.numpy().astype(np.uint32)


def _words(low: _Word, high: _Word, sample: _Word, position: _Word) -> tuple[_Word, _Word]:
    """From the lower and upper 32 bits of the seed, the sample and the position."""
    first = _mix(_mix(_mix(_mix(low) ^ high) ^ (sample & _MASK)) ^ (position & _MASK))
    return first, _mix(first ^ 0x9E3779B9 ^ _mix((low + 0x85EBCA6B) & _MASK))


def _bits(first: _Word, second: _Word, token: _Word) -> _Word:
    """The odd numerator of a uniform, of 24 bits."""
    mixed = _mix(_mix((token ^ first) & _MASK) ^ second)
    bits: _Word = (mixed >> 9) << 1 | 1
    return bits


def uniform(keys: Tensor, token: Tensor) -> Tensor:
    """Uniforms in (0, 1), float32: ``keys`` [..., 2] and ``token`` ids [...] broadcast."""
    if keys.device.type != "cpu":
        return _bits(keys[..., 0], keys[..., 1], token).float() * 2.0**-24
    return _uniform_array(*key_words(keys), _array(token))


def _uniform_array(
    first: NDArray[np.uint32], second: NDArray[np.uint32], token: NDArray[np.uint32]
) -> Tensor:
    with np.errstate(over="ignore"):
        bits = _bits(first, second, token)
    return torch.from_numpy(np.asarray(bits, dtype=np.float32)).mul_(2.0**-24)


def gumbel(keys: Tensor, token: Tensor) -> Tensor:
    """Standard Gumbel noise, float32: ``keys`` [..., 2] and ``token`` ids [...] broadcast."""
    return _to_gumbel(uniform(keys, token))


def gumbel_array(
    first: NDArray[np.uint32], second: NDArray[np.uint32], token: NDArray[np.uint32]
) -> NDArray[np.float32]:
    """The same on a CPU, for the words of keys from :func:`key_words`: float32 [...]."""
    noise: NDArray[np.float32] = _to_gumbel(_uniform_array(first, second, token)).numpy()
    return noise


def key_words(keys: Tensor) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The two words of keys [..., 2] on a CPU, each uint32 [...]."""
    return _array(keys[..., 0]), _array(keys[..., 1])


def _to_gumbel(uniform: Tensor) -> Tensor:
    return uniform.log_().neg_().log_().neg_()


def coin(keys: Tensor, stream: str) -> Tensor:
    """Uniforms in (0, 1), float32 [...], for ``keys`` [..., 2]; streams are independent."""
    return uniform(keys, torch.full_like(keys[..., 0], _stream_word(stream)))


@cache
def _stream_word(stream: str) -> int:
    """A number in the token's place for a stream of coins. No vocabulary reaches 2**31 tokens."""
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=4).digest()) | 1 << 31


def gumbel_of(seed: int, sample: int, position: int, token: int) -> float:
    """The same noise for one token, in plain numbers."""
    words = _words(seed & _MASK, (seed >> 32) & _MASK, sample, position)
    return -math.log(-math.log(_bits(*words, token) * 2.0**-24))


def max_drawn_entries(device_type: str) -> int:
    """Entries of logits that one draw processes at once on a kind of device. Larger batches are
    drawn in parts, so that memory does not grow with rows × vocabulary.
    """
    return 2**17 if device_type == "cpu" else 2**24
