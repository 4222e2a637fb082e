"""What a router can read: both next-token distributions, the roles of tokens, one coin per row.

A stateful router also reads :class:`Past`: the answer before each position.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from baco.device import tensor_on
from baco.sampling.sampler import most_likely
from baco.source import MODELS, Source
from baco.text.vocabulary import Role, Vocabulary

Predictor = Literal["base", "aligned", "either"]


class Distribution:
    """One model's next-token distributions at N positions: temperature 1, nothing truncated.

    Each quantity is computed when it is first read.

    Args:
        logits: raw logits on the common vocabulary, float [N, V].
        log_partition: log Σ exp of each row [N], where it is known already.
        entropy: of each row in nats [N], where it is known already.
        hidden_states: the model's last hidden states, float32 [N, D], where a router reads them.
    """

    def __init__(
        self,
        logits: Tensor,
        log_partition: Tensor | None = None,
        entropy: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> None:
        self.logits, self.hidden_states = logits, hidden_states
        self._log_partition = log_partition
        self._entropy = entropy

    @cached_property
    def top(self) -> Tensor:
        """The most likely token: int64 [N]."""
        return most_likely(self.logits)

    @cached_property
    def log_partition(self) -> Tensor:
        """log Σ exp of each row: [N]. The same as ``logsumexp``, which is slow on a CPU."""
        if self._log_partition is not None:
            return self._log_partition
        greatest = self._greatest
        return (self.logits - greatest[:, None]).exp_().sum(dim=-1).log_().add_(greatest)

    @cached_property
    def max(self) -> Tensor:
        """The probability of the most likely token, in (0, 1]: [N]."""
        return (self._greatest - self.log_partition).exp_()

    @cached_property
    def entropy(self) -> Tensor:
        """Shannon entropy in nats: [N]."""
        if self._entropy is not None:
            return self._entropy
        logp = self.logits.log_softmax(dim=-1)
        # 0 · log 0 = 0: a token of logit -inf adds nothing.
        return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(dim=-1)

    def logprob(self, token: Tensor) -> Tensor:
        """Log-probability in nats of one token per row: int64 [N] → [N]."""
        return self._at(token) - self.log_partition

    @cached_property
    def _greatest(self) -> Tensor:
        return self._at(self.top)

    def _at(self, token: Tensor) -> Tensor:
        return self.logits.gather(1, token[:, None])[:, 0]


@dataclass(frozen=True, slots=True)
class Siblings:
    """An answer beside the lower-numbered samples of its prompt, before N positions.

    A token is *fresh* if no lower-numbered sample has it and the two tokens before it, at the same
    position or earlier. All int64 [N].

    Attributes:
        earlier: how many lower-numbered samples there are.
        alike: how many of them have the answer's last three tokens, at this position or an earlier
            one.
        own_fresh: how many of the answer's tokens are fresh; all tokens of sample 0 are.
        length, num_base: the tokens of the lower-numbered samples and of the answer, each counted
            up to the answer's length, and how many of these tokens have the source base.
        compared, num_fresh: the same tokens without those of sample 0, which has no sample to
            differ from, and how many of them are fresh.
    """

    earlier: Tensor
    alike: Tensor
    own_fresh: Tensor
    length: Tensor
    num_base: Tensor
    compared: Tensor
    num_fresh: Tensor


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the structures of answers allow at N positions.

    Attributes:
        at: the positions whose answers have a structure, int64 [M].
        tokens: what is allowed there, bool [M, V].
        forced: the positions where one token is allowed, or only the end of the answer, bool [N].
        text: the positions in free text, as :class:`baco.sampling.constraint.Place` says; all of
            them where the answer has no structure; bool [N].
        begins: those where a free text of a structure begins, bool [N].
        ends_text: ``(position, token)`` → whether the token ends the free text there.
    """

    at: Tensor
    tokens: Tensor
    forced: Tensor
    text: Tensor
    begins: Tensor
    ends_text: Callable[[int, int], bool]

    def mask(self, logits: Tensor) -> Tensor:
        """Set logits [N, V] to -inf, in place, where a token is not allowed."""
        if len(self.at) == len(logits):
            return logits.masked_fill_(~self.tokens, -torch.inf)
        logits[self.at] = logits[self.at].masked_fill_(~self.tokens, -torch.inf)
        return logits

    def top(self, distribution: Distribution) -> Tensor:
        """The most likely token that is allowed: int64 [N]."""
        top, at, tokens = distribution.top.clone(), self.at, self.tokens
        if top.device.type == "cpu":  # rows whose most likely token is allowed need no second look
            missed = ~tokens.gather(1, top[at][:, None])[:, 0]
            if not missed.any():
                return top
            at, tokens = at[missed], tokens[missed]
        top[at] = most_likely(distribution.logits[at].masked_fill(~tokens, -torch.inf))
        return top


@dataclass(slots=True)
class Past:
    """The answers before N positions: what stateful routers read.

    It is a function of an answer's own tokens and sources, so decisions do not depend on the batch,
    on speculation or on preemption.

    Attributes:
        length: tokens of the answer before each position, int64 [N].
        num_base: those of them whose source is base, int64 [N].
        tail: ``(position, count)`` → the last ``count`` tokens before a position, or all where
            there are fewer.
        siblings: the lower-numbered samples of the same prompt; None where no router reads them.
    """

    length: Tensor
    num_base: Tensor
    tail: Callable[[int, int], list[int]]
    siblings: Siblings | None = None


class Signals:
    """Both models' distributions at N positions, and what else a router can read there.

    Args:
        base, aligned: the two distributions, or their raw logits, float [N, V]. Where only one
            model was run, its distribution takes the place of the other's too.
        vocabulary: the role of every token.
        coin: replayable uniforms in (0, 1), float [N], or a function that returns them.
        own_vocabularies: the vocabulary of each model, where their tokenizers differ; by default
            both have ``vocabulary``.
        past: the answers before the positions, where the backend supplies them.
        allowed: what the structures of the answers allow; None where anything goes.
        ran: the models that were run.
        own_allowed: in place of ``allowed`` where the tokenizers differ: what is allowed in the
            tokens of each model.

    The most likely tokens (``top_base``, ``top_aligned``, the predicted token) are those that are
    allowed. All else is of the raw distributions.
    """

    def __init__(
        self,
        base: Tensor | Distribution,
        aligned: Tensor | Distribution,
        vocabulary: Vocabulary,
        coin: Tensor | Callable[[], Tensor] | None = None,
        own_vocabularies: Mapping[Source, Vocabulary] | None = None,
        past: Past | None = None,
        allowed: Allowed | None = None,
        ran: frozenset[Source] = frozenset(MODELS),
        own_allowed: Mapping[Source, Allowed | None] | None = None,
    ) -> None:
        same = aligned is base
        base = base if isinstance(base, Distribution) else Distribution(base)
        if same:
            aligned = base
        self._of: dict[Source, Distribution] = {
            "base": base,
            "aligned": aligned if isinstance(aligned, Distribution) else Distribution(aligned),
        }
        self.vocabulary = vocabulary
        self._own_vocabularies = own_vocabularies
        self._coin = coin
        self._past = past
        self.allowed, self.ran, self._own_allowed = allowed, ran, own_allowed
        self._tops: dict[Source, Tensor] = {}

    @property
    def past(self) -> Past:
        """The answers before the positions, for stateful routers."""
        if self._past is None:
            raise ValueError("a stateful router needs the answers so far")
        return self._past

    def of(self, model: Source) -> Distribution:
        """One model's distributions."""
        return self._of[model]

    @property
    def base(self) -> Tensor:
        """The base model's raw logits: float [N, V]."""
        return self._of["base"].logits

    @property
    def aligned(self) -> Tensor:
        """The aligned model's raw logits: float [N, V]."""
        return self._of["aligned"].logits

    @property
    def max_base(self) -> Tensor:
        """max P_base, in (0, 1]: [N]."""
        return self._of["base"].max

    @property
    def entropy_base(self) -> Tensor:
        """H(P_base) in nats: [N]."""
        return self._of["base"].entropy

    @property
    def entropy_aligned(self) -> Tensor:
        """H(P_aligned) in nats: [N]."""
        return self._of["aligned"].entropy

    @property
    def hidden_base(self) -> Tensor:
        """The base model's last hidden states: float32 [N, D]."""
        return self.hidden_states("base")

    @property
    def hidden_aligned(self) -> Tensor:
        """The aligned model's last hidden states: float32 [N, D]."""
        return self.hidden_states("aligned")

    def hidden_states(self, model: Source) -> Tensor:
        """A model's last hidden states, normed, as its head reads them: float32 [N, D]."""
        hidden_states = self._of[model].hidden_states
        if hidden_states is None:
            raise ValueError(f"a router that reads hidden_{model} needs hidden states")
        return hidden_states

    @property
    def top_base(self) -> Tensor:
        """The base model's most likely next token: int64 [N]."""
        return self._top("base")

    @property
    def top_aligned(self) -> Tensor:
        """The aligned model's most likely next token: int64 [N]."""
        return self._top("aligned")

    def _top(self, model: Source) -> Tensor:
        allowed = self.allowed if self._own_allowed is None else self._own_allowed.get(model)
        if allowed is None:
            return self._of[model].top
        if model not in self._tops:
            self._tops[model] = allowed.top(self._of[model])
        return self._tops[model]

    def predicted_in(self, roles: tuple[Role, ...], predict: Predictor) -> Tensor:
        """Whether the predicted token has one of these roles in its model's vocabulary: bool [N].

        ``either``: whether one of the two models' predictions has.
        """
        if predict == "either":
            return self.predicted_in(roles, "base") | self.predicted_in(roles, "aligned")
        own = self._own_vocabularies
        vocabulary = self.vocabulary if own is None else own[predict]
        return vocabulary.in_roles(roles)[self._top(predict)]

    @property
    def in_text(self) -> Tensor:
        """Whether each position is in free text, as all are without a structure: bool [N]."""
        if self.allowed is None:
            return torch.ones(len(self.base), dtype=torch.bool, device=self.base.device)
        return self.allowed.text

    def in_structure(self, predict: Predictor) -> Tensor:
        """Whether the predicted token belongs to the answer's structure: bool [N].

        It does outside free text, and where it ends a free text. Without a structure none does.
        ``either``: whether one of the two models' predictions does.
        """
        allowed = self.allowed
        if allowed is None:
            return ~self.in_text
        if predict == "either":
            return self.in_structure("base") | self.in_structure("aligned")
        structure = ~allowed.text
        is_text, tokens = allowed.text.tolist(), self._top(predict).tolist()
        ends = [
            at for at in allowed.at.tolist() if is_text[at] and allowed.ends_text(at, tokens[at])
        ]
        structure[tensor_on(structure.device, ends, torch.int64)] = True
        return structure

    def tossed(self) -> Tensor:
        """The coins: uniforms in (0, 1), float [N]."""
        if self._coin is None:
            raise ValueError("a random router needs coins: pass coin=… to select")
        return self._coin() if callable(self._coin) else self._coin
