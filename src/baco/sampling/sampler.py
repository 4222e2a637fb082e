"""How a token is drawn from a row of logits: penalties, truncation, the noise on top.

It knows rows of logits and numbers; it knows nothing of models, routers or text. A draw is a pure
function of the row and of its noise keys, so the batch a row happens to stand in cannot change it.
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
from baco.sampling.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel
from baco.sampling.params import SamplingParams

# Bytes that drawing takes for each entry of the rows of logits, at most: sorted copies where top-p
# is asked for, noise for every token where the temperature is high.
DRAW_BYTES = 96
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
class DrawTable:
    """The sampling parameters of a batch, one entry per row [B], on the logits' device.

    The flags say whether any row uses a step, so that a batch pays only for what it asked for;
    ``alike`` is whether all rows have the same parameters.
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
    alike: bool

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
            alike=len({(*(getattr(p, n) for n in _COLUMNS), p.logit_bias) for p in params}) == 1,
        )

    def rows(self, index: Tensor) -> "DrawTable":
        """The entries ``index`` [N], for as many rows of logits."""
        if not self.alike:
            return self._changed(lambda column: column[index])
        size = len(index)
        if size not in self._grown:
            self._grown[size] = self._changed(
                lambda column: column[:1].expand(size, *column.shape[1:])
            )
        return self._grown[size]

    def bias(self, logits: Tensor) -> Tensor:
        """Add the rows' biases to logits [B, V], in place."""
        if self.biased is None:
            return logits
        if logits.device.type == "cpu":
            logits.numpy()[:, self.biased.numpy()] += self.logit_bias.numpy()
        else:
            logits[:, self.biased] += self.logit_bias
        return logits

    @cached_property
    def numbers(self) -> "Numbers":
        """What a draw on a CPU needs of every row."""
        return Numbers.of(self)

    @cached_property
    def _grown(self) -> dict[int, "DrawTable"]:
        """Tables of so many rows, where all have the same parameters."""
        return {}

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "DrawTable":
        """The same change made to every column."""
        columns = [*_COLUMNS, "logit_bias"]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in columns}
        return replace(self, **changed)


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table's columns as arrays [B]: an array's operations start sooner than a tensor's.

    Attributes:
        cold: temperature 0.
        heat: the temperature, 1 in its place.
        reach: how far below the greatest logit, in units of heat, a token can still win.
        least: log of min-p.
    """

    cold: NDArray[np.bool_]
    heat: NDArray[np.float32]
    reach: NDArray[np.float32]
    least: NDArray[np.float32]

    @classmethod
    def of(cls, table: DrawTable) -> Self:
        """Of a table on a CPU."""
        cold = table.temperature == 0
        least = table.min_p.log()
        # Noise is bounded. A hundredth of slack: rounding must not leave out what exact arithmetic
        # would keep.
        reach = (0.01 - least).clamp(max=GUMBEL_MAX - GUMBEL_MIN + 0.01)
        columns = (cold, table.temperature.masked_fill(cold, 1.0), reach, least)
        return cls(*(column.numpy() for column in columns))


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


def max_drawn_entries(device_type: str) -> int:
    """Entries of rows of logits that are drawn from at once, on a kind of device; more are drawn
    from in parts, so that a large vocabulary and many rows do not take memory in proportion.
    """
    return 2**21 if device_type == "cpu" else 2**24


def draw(logits: Tensor, table: DrawTable, keys: Tensor) -> Tensor:
    """Draw one token per row: argmax of truncated logits / temperature + Gumbel noise.

    Args:
        logits: float32 [B, V]; -inf where a token may not be said.
        table: the rows' sampling parameters (penalties already applied to ``logits``).
        keys: int64 [B, 2] from :func:`baco.sampling.noise.noise_keys`.

    Returns:
        Token ids, int64 [B]. At temperature 0 the plain argmax.
    """
    size, most = len(logits), max(1, max_drawn_entries(logits.device.type) // logits.shape[-1])
    if size > most:
        parts = [slice(start, start + most) for start in range(0, size, most)]
        row = torch.arange(size, device=logits.device)
        return torch.cat([draw(logits[p], table.rows(row[p]), keys[p]) for p in parts])
    greedy = most_likely(logits)
    if not table.any_warm:
        return greedy
    if logits.device.type == "cpu":
        return _draw_on_cpu(logits, greedy, table, keys)
    cold = table.temperature == 0
    heat = table.temperature.masked_fill(cold, 1.0)
    warm = truncate(logits / heat[:, None], table)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    token = (warm + gumbel(keys[:, None, :], ids)).argmax(dim=-1)
    return torch.where(cold, greedy, token)


def _draw_on_cpu(logits: Tensor, greedy: Tensor, table: DrawTable, keys: Tensor) -> Tensor:
    """The same draw, with noise only for tokens that can still win.

    Noise is bounded, so a token further below the best than the bounds lie apart cannot.
    """
    numbers = table.numbers
    heat = numbers.heat
    if table.any_top_k or table.any_top_p:
        logits = truncate(logits / torch.from_numpy(heat)[:, None], table)
        heat = np.ones_like(heat)
    rows, size = logits.numpy(), len(logits)
    best = rows[np.arange(size), greedy.numpy()]
    # [C], in order of rows
    found = np.flatnonzero(rows >= (best - heat * numbers.reach)[:, None])
    row, token = np.divmod(found, rows.shape[1])
    if len(found) == size and (size == 1 or (row[1:] > row[:-1]).all()):
        return greedy  # nothing else can be drawn anywhere
    warm = rows[row, token] / heat[row]
    score = warm + gumbel(keys[torch.from_numpy(row)], torch.from_numpy(token)).numpy()
    if table.any_min_p:
        score[warm < (best / heat + numbers.least)[row]] = -np.inf
    top = np.full(size, -np.inf, np.float32)
    np.maximum.at(top, row, score)
    # Of equals the first, which is written last. A row of NaN has none.
    wins = np.flatnonzero(score == top[row])[::-1]
    drawn = greedy.numpy().copy()
    drawn[row[wins]] = token[wins]
    return torch.from_numpy(np.where(numbers.cold, greedy.numpy(), drawn))
