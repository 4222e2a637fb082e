"""Sums of what both models compute for the same answers, position by position.

It knows logits and tokens, not what they say about a pair. Answers are summed one at a time, so
memory does not grow with their number.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.parser import CONSTANTS, logit_rule_of, plain_catalogue
from baco.routing.parser import router as parse
from baco.routing.router import Router
from baco.routing.rules import PROBABILITY_SWEEP
from baco.routing.signals import Signals
from baco.routing.word_boundaries import NO_TOKEN, BoundaryState, resolve_source
from baco.text.prompts import Prompt
from baco.text.vocabulary import Role

# The lowest log-probability, in nats, that counts. A token that the base model does not own has
# probability 0 under it.
_MIN_LOGPROB = -30.0


@dataclass(slots=True)
class Agreement:
    """Sums over the positions of all answers that were added.

    Attributes:
        positions: their number.
        agree: positions where both models have the same most likely token.
        overlap: of Σ_token min(P_base, P_aligned).
        entropy_base, entropy_aligned: in nats.
        by_role: role of the base model's most likely token → [positions, agreeing ones].
        partings: (the base model's most likely token, the aligned model's) → how often they differ
            so.
        base_tokens: router → positions whose source is base.
    """

    positions: int = 0
    agree: int = 0
    overlap: float = 0.0
    entropy_base: float = 0.0
    entropy_aligned: float = 0.0
    by_role: dict[str, list[int]] = field(default_factory=dict)
    partings: Counter[tuple[int, int]] = field(default_factory=Counter)
    base_tokens: Counter[str] = field(default_factory=Counter)

    @torch.inference_mode()
    def add(self, pair: Pair, prompt: Prompt, answer: Sequence[int]) -> None:
        """Run both models over one answer, and add what they compute."""
        answer = readable(pair, answer, prompt)
        if not answer:
            return
        base = answer_logits(pair.base, prompt.base_ids, answer)
        aligned = answer_logits(pair.aligned, prompt.aligned_ids, answer)
        signals = Signals(base, aligned, pair.vocabulary)
        top_base = _unify_ends(pair, signals.top_base)
        top_aligned = _unify_ends(pair, signals.top_aligned)
        agree = top_base == top_aligned
        self.positions += len(answer)
        self.agree += int(agree.sum())
        self.overlap += float(torch.minimum(base.softmax(-1), aligned.softmax(-1)).sum())
        self.entropy_base += float(signals.entropy_base.sum())
        self.entropy_aligned += float(signals.entropy_aligned.sum())
        roles = pair.vocabulary.role[signals.top_base]
        for role in roles.unique().tolist():
            has_role = roles == role
            counts = self.by_role.setdefault(Role(role).name.lower(), [0, 0])
            counts[0] += int(has_role.sum())
            counts[1] += int((has_role & agree).sum())
        self.partings.update(
            zip(top_base[~agree].tolist(), top_aligned[~agree].tolist(), strict=True)
        )
        spellings = list(routers())
        sources = sources_along(signals, [parse(spelling) for spelling in spellings], answer)
        base_tokens = sources.sum(dim=1).tolist()
        self.base_tokens.update(dict(zip(spellings, base_tokens, strict=True)))


def routers() -> Iterator[str]:
    """The spellings whose base share is reported: every listed router that reads the models.

    A rule that only tosses a coin has γ as its base share.
    """
    for name in (entry.name for entry in plain_catalogue() if entry.name not in CONSTANTS):
        rule = logit_rule_of(name)
        if rule is None or not rule.threshold:
            yield name
        elif rule.models:
            yield from (f"{name}:{gamma:g}" for gamma in rule.sweep or PROBABILITY_SWEEP)


def sources_along(signals: Signals, routers: Sequence[Router], answer: Sequence[int]) -> Tensor:
    """The sources that routers pick along a given answer, word by word.

    Masks do not matter here, since the tokens are given.

    Args:
        signals: at each of the answer's T positions.
        routers: R routers, none of them constant.
        answer: T tokens.

    Returns:
        bool [R, T], True for the base model.
    """
    previous = torch.tensor([NO_TOKEN, *answer[:-1]], dtype=torch.int64)
    # Word boundaries are the same for all routers: only the choices have a row for each.
    state = BoundaryState.of(signals, previous, [(routers[0], "word")], route=False)
    choices = torch.stack([router(signals) for router in routers])
    return follow(replace(state, router_choice=choices))


def follow(state: BoundaryState) -> Tensor:
    """The sources along N positions of one answer, which are decided in turn.

    Args:
        state: of the positions [N]; its ``router_choice`` is [R, N].

    Returns:
        bool [R, N], True for the base model.
    """
    sources = torch.zeros_like(state.router_choice)
    active = sources[:, 0]
    for at in range(sources.shape[1]):
        position = BoundaryState(
            state.router_choice[:, at],
            state.free[at],
            state.base_starts_word[at],
            state.aligned_starts_word[at],
        )
        active, _ = resolve_source(position, active)
        sources[:, at] = active
    return sources


@dataclass(slots=True)
class PromptGain:
    """How much likelier answers are under the base model after their own prompt than after another.

    Attributes:
        own, other: sums of log-probabilities in nats.
        tokens: tokens in each sum.
    """

    own: float = 0.0
    other: float = 0.0
    tokens: int = 0

    @torch.inference_mode()
    def add(self, pair: Pair, own: Prompt, other: Prompt, answer: Sequence[int]) -> None:
        """Run the base model over one answer after both prompts."""
        answer = readable(pair, answer, own, other)
        if not answer:
            return
        self.own += _logprob(pair.base, own.base_ids, answer)
        self.other += _logprob(pair.base, other.base_ids, answer)
        self.tokens += len(answer)

    @property
    def per_token(self) -> float:
        """In nats; positive where the base model follows the prompt."""
        return (self.own - self.other) / max(self.tokens, 1)


def answer_logits(model: PairModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The raw logits that each of an answer's T tokens would be drawn from: float32 [T, V], on the
    CPU.
    """
    # The last token is not read: it may be one that only the other model owns.
    logits: Tensor = model.score([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    return logits.cpu()


def readable(pair: Pair, answer: Sequence[int], *prompts: Prompt) -> Sequence[int]:
    """The part of an answer that both models can read after any of these prompts.

    It ends with the first token that the base model does not own, and where a context window ends.
    """
    unknown = pair.base.unknown_ids
    end = next((t for t, token in enumerate(answer, 1) if unknown[token]), len(answer))
    room = min(
        min(pair.base.context - len(p.base_ids), pair.aligned.context - len(p.aligned_ids))
        for p in prompts
    )
    return answer[: max(min(end, room), 0)]


def _logprob(model: PairModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    tokens = torch.tensor(answer, dtype=torch.int64)[:, None]
    logprobs = answer_logits(model, prompt, answer).log_softmax(-1).gather(1, tokens)
    return float(logprobs.clamp_min(_MIN_LOGPROB).sum())


def _unify_ends(pair: Pair, tokens: Tensor) -> Tensor:
    """Replace all end tokens by the first one: the models may end a text with different tokens."""
    ends = torch.tensor(sorted(pair.end_ids), dtype=tokens.dtype)
    return tokens.where(~torch.isin(tokens, ends), ends[:1]) if len(ends) else tokens
