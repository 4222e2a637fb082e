"""The sampler: penalties, truncation, and an argmax over logits / temperature + Gumbel noise.

It knows logits and numbers. It does not know models, routers or text. A draw is a pure function of
a row of logits and its noise keys, so the other rows of a batch cannot change it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baco.device import tensor_on
from baco.sampling.noise import (
    GUMBEL_MAX,
    gumbel,
    gumbel_array,
    key_words,
    max_drawn_entries,
)
from baco.sampling.params import SamplingParams
from baco.sampling.top_p import outside_top_p

# Bytes that a draw takes for each entry of the logits, at most: sorted copies for top-p, noise for
# every token at high temperatures.
DRAW_BYTES = 96
# Below this temperature logits are not divided, which would overflow: the likeliest token is drawn.
_COLDEST = 1e-30
_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
}


@dataclass
class SamplingTensors:
    """The sampling parameters of a batch, one entry per row [B], on the logits' device.

    The flags tell whether any row uses a step of the sampler, so that unused steps cost nothing.
    """

    temperature: Tensor  # float32, 0 takes the most likely token
    top_k: Tensor  # int64, 0 keeps all
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    repetition_penalty: Tensor  # float32
    presence_penalty: Tensor  # float32
    frequency_penalty: Tensor  # float32
    biased_tokens: Tensor | None  # int64 [K], of any row's logit bias; None without any
    logit_bias: Tensor  # float32 [B, K], of these tokens
    max_top_k: int
    any_random: bool  # a temperature above 0
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool
    uniform: bool  # all rows have the same parameters

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: Any) -> Self:
        """The parameters of one row each."""
        columns = {
            name: tensor_on(device, [getattr(p, name) for p in params], dtype)
            for name, dtype in _COLUMNS.items()
        }
        columns["temperature"].masked_fill_(columns["temperature"] < _COLDEST, 0.0)
        biases = [dict(p.logit_bias) for p in params]
        tokens = sorted({token for bias in biases for token in bias})
        table = [[bias.get(token, 0.0) for token in tokens] for bias in biases]
        return cls(
            **columns,
            biased_tokens=tensor_on(device, tokens) if tokens else None,
            logit_bias=tensor_on(device, table, torch.float32),
            max_top_k=max((p.top_k for p in params), default=0),
            any_random=any(p.temperature > 0 for p in params),
            any_top_k=any(p.top_k > 0 for p in params),
            any_top_p=any(p.top_p < 1 for p in params),
            any_min_p=any(p.min_p > 0 for p in params),
            any_penalty=any(p.penalises for p in params),
            uniform=len({(*(getattr(p, n) for n in _COLUMNS), p.logit_bias) for p in params}) == 1,
        )

    def rows(self, index: Tensor) -> "SamplingTensors":
        """The entries ``index`` [N]."""
        if not self.uniform:
            return self._map(lambda column: column[index])
        size = len(index)
        if size not in self._expanded:
            self._expanded[size] = self._map(
                lambda column: column[:1].expand(size, *column.shape[1:])
            )
        return self._expanded[size]

    @cached_property
    def _expanded(self) -> dict[int, "SamplingTensors"]:
        """Uniform parameters, expanded to a number of rows."""
        return {}

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SamplingTensors":
        changed: dict[str, Any] = {
            name: change(getattr(self, name)) for name in [*_COLUMNS, "logit_bias"]
        }
        return replace(self, **changed)

    def bias(self, logits: Tensor) -> Tensor:
        """Add the rows' biases to logits [B, V], in place."""
        if self.biased_tokens is None:
            return logits
        if logits.device.type == "cpu":
            logits.numpy()[:, self.biased_tokens.numpy()] += self.logit_bias.numpy()
        else:
            logits[:, self.biased_tokens] += self.logit_bias
        return logits

    @cached_property
    def arrays(self) -> "SamplingArrays":
        """What a draw on a CPU needs of every row."""
        return SamplingArrays.of(self)


@dataclass(frozen=True, slots=True)
class SamplingArrays:
    """Columns of `SamplingTensors` as NumPy arrays [B], whose operations start sooner on a CPU.

    Attributes:
        greedy: temperature 0.
        temperature: with 1 in the place of 0.
        reach: how far below the greatest logit, in units of the temperature, min-p keeps a token;
            infinite without min-p.
        log_min_p: log of min-p.
        any_unbounded: some row has no min-p.
    """

    greedy: NDArray[np.bool_]
    temperature: NDArray[np.float32]
    reach: NDArray[np.float32]
    log_min_p: NDArray[np.float32]
    any_unbounded: bool

    @classmethod
    def of(cls, tensors: SamplingTensors) -> Self:
        """From tensors on a CPU."""
        greedy, log_min_p = tensors.temperature == 0, tensors.min_p.log()
        # The slack of 0.01 covers rounding.
        return cls(
            greedy.numpy(),
            tensors.temperature.masked_fill(greedy, 1.0).numpy(),
            (0.01 - log_min_p).numpy(),
            log_min_p.numpy(),
            bool(log_min_p.isinf().any()),
        )


def most_likely(logits: Tensor) -> Tensor:
    """The first greatest entry of every row [N, V]: int64 [N]."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(dim=-1)
    # A tenth of the time that torch takes on a CPU.
    return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(axis=-1)))


def penalise(
    logits: Tensor, in_prompt: Tensor, in_answer: Tensor, params: SamplingTensors
) -> Tensor:
    """Apply the penalties of N rows to logits [N, V].

    Args:
        logits: of the source.
        in_prompt: whether the source's prompt has each token, bool [N, V].
        in_answer: how often the answer has each token, int [N, V].
        params: repetition penalty (prompt and answer; Keskar et al. 2019), presence and frequency
            penalties (answer only; as OpenAI's API defines them).
    """
    strength = params.repetition_penalty[:, None]
    damped = (logits * strength).where(logits < 0, logits / strength)
    logits = damped.where(in_prompt | (in_answer > 0), logits)
    logits = logits - params.presence_penalty[:, None] * (in_answer > 0)
    return logits - params.frequency_penalty[:, None] * in_answer


def truncate(logits: Tensor, params: SamplingTensors) -> Tensor:
    """Set logits [B, V] to -inf where top-k, top-p and min-p, in that order, drop the token.

    Each step reads the distribution that the step before left, as in ``transformers``.
    """
    if params.any_top_k:
        most = min(params.max_top_k, logits.shape[-1])
        best = logits.topk(most, dim=-1).values  # [B, most]
        kth = best.gather(1, (params.top_k.clamp(1, most) - 1)[:, None])
        logits = logits.masked_fill((logits < kth) & (params.top_k > 0)[:, None], -math.inf)
    if params.any_top_p:
        logits = logits.masked_fill(outside_top_p(logits, params.top_p), -math.inf)
    if params.any_min_p:
        floor = logits.amax(dim=-1, keepdim=True) + params.min_p.log()[:, None]
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits


def draw(
    logits: Tensor, params: SamplingTensors, keys: Tensor, words: Tensor | None = None
) -> Tensor:
    """Draw one token per row: argmax of truncated logits / temperature + Gumbel noise.

    Args:
        logits: float32 [B, V]; -inf for tokens that may not be written.
        params: the rows' sampling parameters. Penalties are applied to ``logits`` already.
        keys: int64 [B, 2] from :func:`baco.sampling.noise.noise_keys`.
        words: the number that stands for each token in its noise, int64 [V]; by default its id.

    Returns:
        Token ids, int64 [B]. At temperature 0 the plain argmax.
    """
    size = len(logits)
    most = max(1, max_drawn_entries(logits.device.type) // logits.shape[-1])
    if size > most:
        parts = [slice(start, start + most) for start in range(0, size, most)]
        row = torch.arange(size, device=logits.device)
        return torch.cat([draw(logits[p], params.rows(row[p]), keys[p], words) for p in parts])
    likeliest = most_likely(logits)
    if not params.any_random:
        return likeliest
    if logits.device.type == "cpu":
        return _draw_on_cpu(logits, likeliest, params, keys, words)
    return draw_with_all_noise(logits, likeliest, params, keys, words)


def draw_with_all_noise(
    logits: Tensor,
    likeliest: Tensor,
    params: SamplingTensors,
    keys: Tensor,
    words: Tensor | None = None,
) -> Tensor:
    """`draw` with noise for every token; ``likeliest`` are the plain argmaxes, int64 [B]."""
    greedy = params.temperature == 0
    scaled = logits / params.temperature.masked_fill(greedy, 1.0)[:, None]
    if words is None:
        words = torch.arange(logits.shape[-1], device=logits.device)
    token = (truncate(scaled, params) + gumbel(keys[:, None, :], words)).argmax(dim=-1)
    return torch.where(greedy, likeliest, token)


def _draw_on_cpu(
    logits: Tensor,
    likeliest: Tensor,
    params: SamplingTensors,
    keys: Tensor,
    word_table: Tensor | None = None,
) -> Tensor:
    """The same draw, with noise only for tokens that can still win.

    Noise is bounded. A token cannot win where its logit with the greatest possible noise is below
    the score of the likeliest token.
    """
    arrays = params.arrays
    temperature = arrays.temperature
    if params.any_top_k or params.any_top_p:
        logits = truncate(logits / torch.from_numpy(temperature)[:, None], params)
        temperature = np.ones_like(temperature)
    rows, tokens, words = logits.numpy(), likeliest.numpy(), key_words(keys)
    table = None if word_table is None else word_table.numpy()
    size, width = rows.shape
    best = rows[np.arange(size), tokens]
    reach = arrays.reach
    if arrays.any_unbounded:
        likeliest_words = tokens if table is None else table[tokens]
        noise = gumbel_array(*words, likeliest_words.astype(np.uint32))
        reach = np.minimum(reach, np.float32(GUMBEL_MAX + 0.01) - noise)
    # The C candidates of all rows, in order of rows. A row of NaN has none.
    candidates = np.flatnonzero(rows >= (best - temperature * reach)[:, None])
    first = np.arange(size) * width  # index of each row's first entry
    if len(candidates) == size and (candidates == first + tokens).all():
        return likeliest
    counts = np.bincount(candidates // width, minlength=size)

    def of_row(values: NDArray[Any]) -> NDArray[Any]:
        """From one value per row to one per candidate."""
        return values.repeat(counts)

    token = (candidates - of_row(first)).astype(np.uint32)
    scaled = rows.reshape(-1)[candidates] / of_row(temperature)
    word = token if table is None else table[token].astype(np.uint32)
    score = scaled + gumbel_array(of_row(words[0]), of_row(words[1]), word)
    if params.any_min_p:
        score[scaled < of_row(best / temperature + arrays.log_min_p)] = -np.inf
    any_left = counts > 0
    top = np.maximum.reduceat(score, (counts.cumsum() - counts)[any_left])
    # Assign in reverse, so that of equal scores the first wins.
    winners = np.flatnonzero(score == top.repeat(counts[any_left]))[::-1]
    drawn = tokens.copy()
    drawn[candidates[winners] // width] = token[winners]
    return torch.from_numpy(np.where(arrays.greedy, tokens, drawn))
