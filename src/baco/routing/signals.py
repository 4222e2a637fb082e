"""What a router may look at: two rows of raw logits, the vocabulary's roles, one coin per row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from baco.sampling.sampler import most_likely
from baco.text.vocabulary import Vocabulary

Predictor = Literal["base", "aligned", "either"]


def log_partition(logits: Tensor, top: Tensor) -> Tensor:
    """log Σ exp over a row whose greatest is ``top`` [B]: [B, V] → [B]. As ``logsumexp``, which a
    CPU computes slowly.
    """
    return (logits - top[:, None]).exp_().sum(dim=-1).log_().add_(top)


def _at(logits: Tensor, token: Tensor) -> Tensor:
    """The logits [B, V] of a token [B] each: [B]."""
    return logits.gather(1, token[:, None])[:, 0]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of the distributions softmax(logits): [B, V] → [B]."""
    logp = logits.log_softmax(dim=-1)
    # 0 · log 0 = 0: a token of logit -inf adds nothing.
    return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(dim=-1)


@dataclass(frozen=True)
class Signals:
    """The raw next-token distributions at one position of every row (temperature 1, untruncated).

    Each figure is computed when a router first asks for it.

    Attributes:
        base, aligned: logits on the common vocabulary, float [B, V].
        vocabulary: what every token id is.
        coin: uniforms in (0, 1), float [B], replayable, or what makes them; for routers that toss
            one.
    """

    base: Tensor
    aligned: Tensor
    vocabulary: Vocabulary
    coin: Tensor | Callable[[], Tensor] | None = None

    def with_logits(
        self, *, base: Tensor | None = None, aligned: Tensor | None = None
    ) -> "Signals":
        """The same with one half's rows put in; what is known of the other half stays known."""
        made = replace(
            self,
            base=self.base if base is None else base,
            aligned=self.aligned if aligned is None else aligned,
        )
        kept = "_base" if base is None else "_aligned"
        made.__dict__.update({k: v for k, v in self.__dict__.items() if k.endswith(kept)})
        return made

    def known(self, half: str, partition: Tensor) -> None:
        """Take over log Σ exp over a half's rows [B], where it was computed before."""
        self.__dict__[f"partition_{half}"] = partition

    @cached_property
    def max_base(self) -> Tensor:
        """max P_base, in (0, 1]: [B]."""
        return (_at(self.base, self.top_base) - self.partition_base).exp_()

    @cached_property
    def partition_base(self) -> Tensor:
        """log Σ exp over the base model's row: [B]."""
        return log_partition(self.base, _at(self.base, self.top_base))

    @cached_property
    def partition_aligned(self) -> Tensor:
        """log Σ exp over the aligned model's row: [B]."""
        if self.aligned is self.base:
            return self.partition_base
        return log_partition(self.aligned, _at(self.aligned, self.top_aligned))

    @cached_property
    def entropy_base(self) -> Tensor:
        """H(P_base) in nats: [B]."""
        return entropy(self.base)

    @cached_property
    def entropy_aligned(self) -> Tensor:
        """H(P_aligned) in nats: [B]."""
        return entropy(self.aligned)

    @cached_property
    def top_base(self) -> Tensor:
        """The base model's most likely next token: int64 [B]."""
        return most_likely(self.base)

    @cached_property
    def top_aligned(self) -> Tensor:
        """The aligned model's most likely next token: int64 [B]."""
        if self.aligned is self.base:  # one row stands for both where only one is read
            return self.top_base
        return most_likely(self.aligned)

    def predicted_in(self, table: Tensor, predict: Predictor) -> Tensor:
        """Is the predicted token in a set of tokens? ``table`` bool [V] → bool [B]."""
        if predict == "base":
            return table[self.top_base]
        if predict == "aligned":
            return table[self.top_aligned]
        return table[self.top_base] | table[self.top_aligned]

    def tossed(self) -> Tensor:
        """The coin, or an error where the caller of a random router gave none."""
        if self.coin is None:
            raise ValueError("a random router needs coins: pass coin=… to select")
        return self.coin() if callable(self.coin) else self.coin
