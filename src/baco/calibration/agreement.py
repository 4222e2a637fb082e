"""What the two halves say about the same texts, position by position, summed up.

Knows rows of logits and tokens; it knows nothing of verdicts. Rows are used up as they come, one
answer at a time, so memory does not grow with the number of answers.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.parser import CONSTANTS, catalogue, logit_rule_of
from baco.routing.parser import router as parse
from baco.routing.rules import PROBABILITY_SWEEP
from baco.routing.signals import Signals
from baco.text.prompts import Prompt
from baco.text.vocabulary import Role

# A token that the base model does not own has probability 0 under it: as surprising as this, nats.
_SURPRISE = 30.0


@dataclass(slots=True)
class Reading:
    """Sums over the positions of all the answers read.

    Attributes:
        positions: how many.
        agree: where both halves find the same token most likely.
        overlap: of Σ_token min(P_base, P_aligned).
        entropy_base, entropy_aligned: in nats.
        by_role: role of the base's most likely token → [positions, agreeing ones].
        partings: (base's most likely token, aligned's) → times, where these differ.
        base_tokens: router → positions that it gives to the base model.
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
        """Read one answer with both halves."""
        answer = readable(pair, answer, prompt)
        if not answer:
            return
        base = rows(pair.base, prompt.base_ids, answer)
        aligned = rows(pair.aligned, prompt.aligned_ids, answer)
        signals = Signals(base, aligned, pair.vocabulary)
        top_base, top_aligned = (
            _one_end(pair, signals.top_base),
            _one_end(pair, signals.top_aligned),
        )
        agree = top_base == top_aligned
        self.positions += len(answer)
        self.agree += int(agree.sum())
        self.overlap += float(torch.minimum(base.softmax(-1), aligned.softmax(-1)).sum())
        self.entropy_base += float(signals.entropy_base.sum())
        self.entropy_aligned += float(signals.entropy_aligned.sum())
        roles = pair.vocabulary.role[signals.top_base]
        for role in roles.unique().tolist():
            here = roles == role
            counts = self.by_role.setdefault(Role(role).name.lower(), [0, 0])
            counts[0] += int(here.sum())
            counts[1] += int((here & agree).sum())
        self.partings.update(
            zip(top_base[~agree].tolist(), top_aligned[~agree].tolist(), strict=True)
        )
        spellings = list(routers())
        wanted = torch.stack([parse(spelling)(signals) for spelling in spellings])
        spoken = sources_along(pair, signals, wanted, answer).sum(dim=1).tolist()
        self.base_tokens.update(dict(zip(spellings, spoken, strict=True)))


def routers() -> Iterator[str]:
    """The spellings whose base share is told: of every listed router that looks at the models.

    A rule that tosses a coin has γ for its base share.
    """
    for name in (entry.name for entry in catalogue() if entry.name not in CONSTANTS):
        rule = logit_rule_of(name)
        if rule is None or not rule.threshold:
            yield name
        elif rule.models:
            yield from (f"{name}:{gamma:g}" for gamma in rule.sweep or PROBABILITY_SWEEP)


def sources_along(pair: Pair, signals: Signals, wanted: Tensor, answer: Sequence[int]) -> Tensor:
    """Who would speak along a given text: the boundaries of
    :func:`baco.routing.word_boundaries.select`.

    Only boundaries are worked out here, for many routers at once: which tokens the source may say
    does not matter where the text is given.

    Args:
        pair: for its vocabulary.
        signals: at each of the answer's T positions.
        wanted: what each of R routers answers there, bool [R, T], True for the base.
        answer: T tokens.

    Returns:
        bool [R, T], True where the base model speaks.
    """
    vocabulary = pair.vocabulary
    starts_base = vocabulary.word_start[signals.top_base]
    starts_aligned = vocabulary.word_start[signals.top_aligned]
    ended = [True, *vocabulary.ends_word[torch.tensor(answer[:-1], dtype=torch.int64)].tolist()]
    spoken = wanted.clone()
    for t in range(1, len(answer)):
        active = spoken[:, t - 1]
        boundary = torch.where(active, starts_base[t], starts_aligned[t]) | ended[t]
        spoken[:, t] = torch.where(boundary, wanted[:, t], active)
    return spoken


@dataclass(slots=True)
class PromptGain:
    """How much likelier the base finds answers after their own prompt than after another.

    Attributes:
        own, other: sums of log-probabilities in nats.
        tokens: how many tokens are behind each sum.
    """

    own: float = 0.0
    other: float = 0.0
    tokens: int = 0

    @torch.inference_mode()
    def add(self, pair: Pair, own: Prompt, other: Prompt, answer: Sequence[int]) -> None:
        """Let the base read one answer after both prompts."""
        answer = readable(pair, answer, own, other)
        if not answer:
            return
        self.own += _logprob(pair.base, own.base_ids, answer)
        self.other += _logprob(pair.base, other.base_ids, answer)
        self.tokens += len(answer)

    @property
    def per_token(self) -> float:
        """In nats; positive where the base follows the prompt."""
        return (self.own - self.other) / max(self.tokens, 1)


def rows(half: PairModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """The raw rows that each of T tokens would be drawn from: float32 [T, V], on the CPU."""
    # The last token is drawn, not read: it may be one that only the other half owns.
    logits: Tensor = half.score([*prompt, *answer[:-1]])[len(prompt) - 1 :]
    return logits.cpu()


def readable(pair: Pair, answer: Sequence[int], *prompts: Prompt) -> Sequence[int]:
    """The part of an answer that both halves can read after any of these prompts.

    It ends with the first token that the base does not own, and where a context window is full.
    """
    unknown = pair.base.unknown_ids
    end = next((t for t, token in enumerate(answer, 1) if unknown[token]), len(answer))
    room = min(
        min(pair.base.context - len(p.base_ids), pair.aligned.context - len(p.aligned_ids))
        for p in prompts
    )
    return answer[: max(min(end, room), 0)]


def _logprob(half: PairModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    tokens = torch.tensor(answer, dtype=torch.int64)[:, None]
    logp = rows(half, prompt, answer).log_softmax(-1).gather(1, tokens)
    return float(logp.clamp_min(-_SURPRISE).sum())


def _one_end(pair: Pair, tokens: Tensor) -> Tensor:
    """The halves end a text with tokens of their own; for comparing them these are one."""
    ends = torch.tensor(sorted(pair.end_ids), dtype=tokens.dtype)
    return tokens.where(~torch.isin(tokens, ends), ends[:1]) if len(ends) else tokens
