"""How a token is drawn from a row of logits: penalties, truncation, the noise on top.

It knows rows of logits and numbers; it knows nothing of models, routers or text. A draw is a pure
function of the row and of its noise keys, so the batch a row happens to stand in cannot change it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from baco.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel
from baco.sampling import SamplingParams
from baco.transfer import tensor_on

_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "repetition_penalty": torch.float32,
    "presence_penalty": torch.float32,
    "frequency_penalty": torch.float32,
}


@dataclass(slots=True)
class DrawTable:
    """The sampling parameters of a batch, one entry per row [B], on the logits' device.

    The flags say whether any row uses a step, so that a batch pays only for what it asked for.
    """

    temperature: Tensor  # float32
    top_k: Tensor  # int64, 0 keeps all
    top_p: Tensor  # float32
    min_p: Tensor  # float32
    repetition_penalty: Tensor  # float32
    presence_penalty: Tensor  # float32
    frequency_penalty: Tensor  # float32
    biased: Tensor | None  # int64 [K], tokens that any row's logit bias names; None where none does
    logit_bias: Tensor  # float32 [B, K], of those tokens
    widest: int  # the largest top_k
    any_warm: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_penalty: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: Any) -> Self:
        """One entry per item of ``params``."""
        columns = {
            name: tensor_on(device, [getattr(p, name) for p in params], dtype)
            for name, dtype in _COLUMNS.items()
        }
        named = sorted({token for p in params for token, _ in p.logit_bias})
        each = [dict(p.logit_bias) for p in params]
        biases = [[own.get(token, 0.0) for token in named] for own in each]
        return cls(
            **columns,
            biased=tensor_on(device, named) if named else None,
            logit_bias=tensor_on(device, biases, torch.float32),
            widest=max((p.top_k for p in params), default=0),
            any_warm=any(p.temperature > 0 for p in params),
            any_top_k=any(p.top_k > 0 for p in params),
            any_top_p=any(p.top_p < 1 for p in params),
            any_min_p=any(p.min_p > 0 for p in params),
            any_penalty=any(p.penalises for p in params),
        )

    def rows(self, index: Tensor) -> "DrawTable":
        """The entries ``index`` [N], for as many rows of logits."""
        taken = {name: getattr(self, name)[index] for name in _COLUMNS}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _COLUMNS}
        rest["logit_bias"] = self.logit_bias[index]
        return DrawTable(**taken, **rest)

    def bias(self, logits: Tensor) -> Tensor:
        """Add the rows' biases to logits [B, V], in place."""
        if self.biased is not None:
            logits[:, self.biased] += self.logit_bias
        return logits


def most_likely(logits: Tensor) -> Tensor:
    """The first greatest of every row [N, V]: int64 [N]."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.argmax(dim=-1)
    # A tenth of the time that a tensor's takes on a CPU.
    return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(axis=-1)))


def penalise(logits: Tensor, prompted: Tensor, said: Tensor, table: DrawTable) -> Tensor:
    """Apply the penalties of the table [N] to logits [N, V].

    Args:
        logits: of the speaking half.
        prompted: tokens of that half's prompt, bool [N, V].
        said: how often the answer said each token before, int [N, V].
        table: repetition penalty (prompt and answer; Keskar et al. 2019), presence and frequency
            penalties (answer only; as OpenAI's API defines them).
    """
    strength = table.repetition_penalty[:, None]
    damped = (logits * strength).where(logits < 0, logits / strength)
    logits = damped.where(prompted | (said > 0), logits)
    logits = logits - table.presence_penalty[:, None] * (said > 0)
    return logits - table.frequency_penalty[:, None] * said


def truncate(logits: Tensor, table: DrawTable) -> Tensor:
    """Set to -inf what top-k, top-p and min-p leave out, in that order; logits [B, V].

    Each step looks at the distribution the steps before it left, as in ``transformers``.
    """
    if table.any_top_k:
        widest = min(table.widest, logits.shape[-1])
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


def draw(logits: Tensor, table: DrawTable, keys: Tensor) -> Tensor:
    """Draw one token per row: argmax of truncated logits / temperature + Gumbel noise.

    Args:
        logits: float32 [B, V]; -inf where a token may not be said.
        table: the rows' sampling parameters (penalties already applied to ``logits``).
        keys: int64 [B, 2] from :func:`baco.noise.noise_keys`.

    Returns:
        Token ids, int64 [B]. At temperature 0 the plain argmax.
    """
    greedy = most_likely(logits)
    if not table.any_warm:
        return greedy
    cold = table.temperature == 0
    heat = table.temperature.masked_fill(cold, 1.0)
    if logits.device.type == "cpu":
        token = _draw_on_cpu(logits, greedy, heat, table, keys)
    else:
        warm = truncate(logits / heat[:, None], table)
        ids = torch.arange(logits.shape[-1], device=logits.device)
        token = (warm + gumbel(keys[:, None, :], ids)).argmax(dim=-1)
    return torch.where(cold, greedy, token)


def _draw_on_cpu(
    logits: Tensor, greedy: Tensor, heat: Tensor, table: DrawTable, keys: Tensor
) -> Tensor:
    """The same draw, with noise only for tokens that can still win.

    Noise is bounded, so a token further below the best than the bounds lie apart cannot.
    """
    if table.any_top_k or table.any_top_p:
        logits = truncate(logits / heat[:, None], table)
        heat = torch.ones_like(heat)
    best = logits.gather(1, greedy[:, None])[:, 0]
    # A hundredth of slack: rounding must not leave out what exact arithmetic would keep.
    reach = torch.full_like(heat, GUMBEL_MAX - GUMBEL_MIN + 0.01)
    if table.any_min_p:
        reach = torch.minimum(reach, 0.01 - table.min_p.log())
    floor = best - heat * reach
    # [C], in order of rows; looked for in an array, where it takes a sixth of the time
    found = np.flatnonzero((logits >= floor[:, None]).numpy())
    row, token = (torch.from_numpy(part) for part in np.divmod(found, logits.shape[1]))
    warm = logits[row, token] / heat[row]
    score = warm + gumbel(keys[row], token)
    if table.any_min_p:
        least = best / heat + table.min_p.log()
        score = score.masked_fill(warm < least[row], -math.inf)
    top = score.new_full((len(logits),), -math.inf).scatter_reduce(0, row, score, "amax")
    wins = score == top[row]
    none = logits.shape[-1]
    first = torch.full_like(greedy, none).scatter_reduce(0, row[wins], token[wins], "amin")
    return first.where(first < none, greedy)  # a row of NaN has no winner
