"""Soft mixing: every token is drawn from both models' distributions at once ("ensemble").

Both models run at every token. With w the base's weight, either their probabilities are mixed,
w·P_base + (1 − w)·P_aligned, or their logits, softmax(w·l_base + (1 − w)·l_aligned): the weighted
geometric mean. Draws use the project's replayable noise; truncation and temperature shape
the mixed distribution.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from baco.engine.draft import Draft
from baco.engine.verify import Choice, Verifier
from baco.evaluation.methods.custom_mixing import decode
from baco.evaluation.methods.method import Answer, Draw, Family, Grid
from baco.evaluation.records import Prompt, Setting
from baco.routing.signals import Signals

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.models.pair import Pair

Mixed = Literal["probabilities", "logits"]
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Ensemble:
    """Mixed distributions over a grid of the base's weight w."""

    name = "ensemble"
    family: Family = "ensemble"
    needs_one_tokenizer = True
    help = "both models' distributions mixed at every token: of probabilities, and of logits"

    def settings(self, grid: Grid) -> list[Setting]:
        return [
            Setting(
                f"ensemble, {mixed}",
                f"ensemble of {mixed}, w={weight:g}",
                weight,
                {"kind": self.name, "mixed": mixed, "weight": weight},
            )
            for mixed in ("probabilities", "logits")
            for weight in grid.thin(WEIGHTS)
        ]

    def answer(
        self, baco: "Baco", setting: Setting, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Answer]]:
        sampling = dict(draw.sampling) | {"n": draw.n, "seed": draw.seed}
        mixture = Mixture(baco.pair, setting.options["mixed"], setting.options["weight"])
        rows = decode(baco, prompts, sampling, setting.label, mixture.choose, mixed=True)
        # No token comes from one model alone, so there are no sources.
        return [[Answer(c.text, len(c.token_ids), c.finish_reason) for c in row] for row in rows]


class Mixture:
    """The mixed log-probabilities of two rows of logits.

    The end tokens of both models are one event, with their probability pooled on the first of them;
    otherwise models with different end tokens would keep each other from ending. Tokens that the
    base does not have, or that are banned for it, are left to the aligned model: with probabilities
    the base gives them 0, with logits the aligned model's logit counts for both.
    """

    def __init__(self, pair: "Pair", mixed: Mixed, weight: float) -> None:
        self.mixed, self.weight = mixed, weight
        device = pair.aligned.device
        self._ends = torch.tensor(sorted(pair.end_ids), dtype=torch.int64, device=device)
        self._banned = pair.banned.to(device)

    def choose(self, verifier: Verifier, draft: Draft, signals: Signals) -> Choice:
        """See :data:`baco.engine.verify.Choose`; the source of every token is aligned."""
        active = draft.active[draft.positions.row]
        logits = self.logprobs(signals.base, signals.aligned)
        boundary_state = verifier.boundary_state(draft, signals)
        return Choice(logits, torch.zeros_like(active), boundary_state, active)

    def logprobs(self, base: Tensor, aligned: Tensor) -> Tensor:
        """Raw logits [N, V] of both → log-probabilities [N, V]."""
        base = base.masked_fill(self._banned, -math.inf)
        log_base, log_aligned = self._pooled(base), self._pooled(aligned)
        if self.mixed == "probabilities":
            log_mixed = torch.logaddexp(
                log_base + math.log(self.weight), log_aligned + math.log1p(-self.weight)
            )
        else:
            log_base = torch.where(log_base == -math.inf, log_aligned, log_base)
            log_mixed = self.weight * log_base + (1 - self.weight) * log_aligned
            log_mixed = log_mixed.log_softmax(dim=-1)
        return log_mixed

    def _pooled(self, logits: Tensor) -> Tensor:
        """log_softmax, with all end tokens' probability on the first of them."""
        logp = logits.log_softmax(dim=-1)
        if len(self._ends) < 2:
            return logp
        end = logp[:, self._ends].logsumexp(dim=-1, keepdim=True)
        logp = logp.index_fill(1, self._ends, -math.inf)
        return logp.index_copy(1, self._ends[:1], end)
