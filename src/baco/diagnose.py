"""Is this pair any good for BACo? What the two halves say about each other's answers.

Both single models answer a few prompts; then each half reads every answer (teacher forcing), and
their next-token distributions are compared position by position. Rows of logits are used up as they
come, one answer at a time, so memory does not grow with the number of prompts.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baco.prompts import Prompt
from baco.routing.registry import router as parse
from baco.routing.signals import Signals
from baco.vocabulary import Role

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.completion import Completion

# γ at which the base share of each logit rule is told.
THRESHOLDS = {"P": (0.1, 0.2, 0.3, 0.4, 0.5, 0.7), "H": (0.5, 1.0, 1.5, 2.0, 3.0)}
ROUTERS = ("P", "P-Punc", "P-FC", "P-Punc-FC", "H-Punc")


@dataclass(slots=True)
class Reading:
    """Sums over positions, and the means made of them."""

    positions: int = 0
    agree: int = 0
    overlap: float = 0.0
    entropy_base: float = 0.0
    entropy_aligned: float = 0.0
    by_role: dict[str, list[int]] = field(default_factory=dict)  # role → [positions, agreeing]
    partings: Counter[tuple[int, int]] = field(default_factory=Counter)
    base_tokens: Counter[str] = field(default_factory=Counter)  # by router spelling
    logprob_own: float = 0.0  # of aligned answers under the base, given their own prompt
    logprob_other: float = 0.0  # and given another prompt
    judged: int = 0  # tokens behind the two sums above


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found; see :func:`diagnose` for the meaning of each figure.

    Attributes:
        verdict: ``good``, ``doubtful`` or ``useless``.
        reasons: why, a sentence each.
    """

    pair: str
    prompts: int
    positions: int
    agreement: float
    agreement_by_role: dict[str, float]
    overlap: float
    entropy_base: float
    entropy_aligned: float
    partings: list[dict[str, Any]]
    base_share: dict[str, float]
    prompt_gain: float
    base_ends: float
    first_token: float
    cost: float
    verdict: str
    reasons: list[str]


@torch.inference_mode()
def diagnose(
    baco: "Baco",
    prompts: Sequence[Any],
    *,
    samples: int = 2,
    seed: int = 0,
    max_tokens: int = 64,
    advance: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """Read a few answers of both halves with both halves.

    Args:
        baco: the pair.
        prompts: a handful of open-ended ones; at least two, each is the other's control.
        samples: answers of each half to each prompt.
        seed, max_tokens: of the answers.
        advance: called after each prompt.

    Returns:
        Per position: ``agreement`` of the most likely tokens, overall and by the role of the base's
        one; ``overlap``, the sum over tokens of min(P_base, P_aligned); entropies in nats. Where
        the two most often part. ``base_share``, tokens of words that a router gives to the base.
        ``prompt_gain``, nats per token by which the base finds an aligned answer likelier after its
        own prompt than after another. ``base_ends``, share of the base's answers that end by
        themselves. ``first_token``, probability under the base of beginning the answer with a space
        or without one as the aligned half does. ``cost``, time per token over the aligned half's.
    """
    started = time.perf_counter()
    options: dict[str, Any] = {"n": samples, "seed": seed, "max_tokens": max_tokens}
    aligned = baco.generate_batch(prompts, router="Aligned", **options)
    alone = _pace(aligned, started)
    started = time.perf_counter()
    together = _pace(baco.generate_batch(prompts, router="P-Punc:0.4", **options), started)
    base = baco.generate_batch(prompts, router="Base", **options)
    rendered = [baco.pair.renderer.render(prompt) for prompt in prompts]
    reading, first = Reading(), []
    for index, prompt in enumerate(rendered):
        for completion in (*base[index], *aligned[index]):
            _read(baco.pair, prompt, completion.token_ids, reading)
        first.append(_first_token(baco.pair, prompt))
        other = rendered[(index + 1) % len(rendered)]
        for completion in aligned[index]:
            _compare_prompts(baco.pair, prompt, other, completion.token_ids, reading)
        advance()
    ends = [c.finish_reason == "stop" for answers in base for c in answers]
    return _conclude(baco, len(prompts), reading, first, ends, together / alone)


def _pace(answers: "Sequence[Sequence[Completion]]", started: float) -> float:
    tokens = sum(len(c.token_ids) for samples in answers for c in samples)
    return (time.perf_counter() - started) / max(tokens, 1)


def _rows(half: Any, prompt: tuple[int, ...], answer: Sequence[int]) -> Tensor:
    """The raw rows that each token of an answer would be drawn from: [T, V]."""
    logits: Tensor = half.score([*prompt, *answer])[len(prompt) - 1 : -1]
    return logits.cpu()


def _read(pair: Any, prompt: Prompt, answer: Sequence[int], reading: Reading) -> None:
    rows_base = _rows(pair.base, prompt.base_ids, answer)
    rows_aligned = _rows(pair.aligned, prompt.aligned_ids, answer)
    signals = Signals(rows_base, rows_aligned, pair.vocabulary)
    top_base, top_aligned = _one_end(pair, signals.top_base), _one_end(pair, signals.top_aligned)
    agree = top_base == top_aligned
    reading.positions += len(answer)
    reading.agree += int(agree.sum())
    smaller = torch.minimum(rows_base.softmax(-1), rows_aligned.softmax(-1))
    reading.overlap += float(smaller.sum())
    reading.entropy_base += float(signals.entropy_base.sum())
    reading.entropy_aligned += float(signals.entropy_aligned.sum())
    roles = pair.vocabulary.role[signals.top_base]
    for role in roles.unique().tolist():
        here = roles == role
        counts = reading.by_role.setdefault(Role(role).name.lower(), [0, 0])
        counts[0] += int(here.sum())
        counts[1] += int((here & agree).sum())
    tops = zip(top_base[~agree].tolist(), top_aligned[~agree].tolist(), strict=True)
    reading.partings.update(tops)
    word = _word_of(pair, answer)
    for spelling in routers():
        wanted = parse(spelling)(signals)
        first = torch.tensor([word.index(number) for number in word])
        reading.base_tokens[spelling] += int(wanted[first].sum())


def _one_end(pair: Any, tokens: Tensor) -> Tensor:
    """The halves end a text with tokens of their own; for comparing them these are one."""
    ends = torch.tensor(sorted(pair.end_ids), dtype=tokens.dtype)
    return tokens.where(~torch.isin(tokens, ends), ends[:1]) if len(ends) else tokens


def routers() -> Iterator[str]:
    """The spellings whose base share is told."""
    for name in ROUTERS:
        for gamma in THRESHOLDS[name.split("-")[0]]:
            yield f"{name}:{gamma:g}"


def _word_of(pair: Any, answer: Sequence[int]) -> list[int]:
    """The number of the word that each token of an answer belongs to."""
    numbers, number, ended = [], -1, True
    for token in answer:
        number += bool(ended or pair.vocabulary.word_start[token])
        ended = bool(pair.vocabulary.ends_word[token])
        numbers.append(number)
    return numbers


def _first_token(pair: Any, prompt: Prompt) -> float:
    """Probability under the base of a first token spelled as the aligned half's: space or none."""
    top = int(pair.aligned.score(prompt.aligned_ids)[-1].argmax())
    spaced = [pair.tokenizer.decode([t])[:1] == " " for t in range(pair.vocabulary.size)]
    alike = torch.tensor(spaced) == spaced[top]
    chances = pair.base.score(prompt.base_ids)[-1].cpu().softmax(-1)
    return float(chances[alike].sum())


def _compare_prompts(
    pair: Any, own: Prompt, other: Prompt, answer: Sequence[int], reading: Reading
) -> None:
    tokens = torch.tensor(answer)[:, None]
    for name, prompt in (("logprob_own", own), ("logprob_other", other)):
        logp = _rows(pair.base, prompt.base_ids, answer).log_softmax(-1).gather(1, tokens)
        # A token the base does not own (a special one of the aligned half) says nothing here.
        total = float(logp.clamp_min(-30).sum())
        setattr(reading, name, getattr(reading, name) + total)
    reading.judged += len(answer)


def _conclude(
    baco: "Baco", prompts: int, reading: Reading, first: list[float], ends: list[bool], cost: float
) -> Diagnosis:
    n, tokenizer = reading.positions, baco.pair.tokenizer
    figures: dict[str, Any] = {
        "agreement": reading.agree / n,
        "overlap": reading.overlap / n,
        "entropy_base": reading.entropy_base / n,
        "entropy_aligned": reading.entropy_aligned / n,
        "prompt_gain": (reading.logprob_own - reading.logprob_other) / max(reading.judged, 1),
        "base_ends": sum(ends) / len(ends),
        "first_token": sum(first) / len(first),
    }
    verdict, reasons = judge(figures)
    return Diagnosis(
        pair=baco.pair.name,
        prompts=prompts,
        positions=n,
        agreement_by_role={
            role: agree / count for role, (count, agree) in sorted(reading.by_role.items())
        },
        partings=[
            {"base": tokenizer.decode([b]), "aligned": tokenizer.decode([a]), "times": times}
            for (b, a), times in reading.partings.most_common(8)
        ],
        base_share={spelling: reading.base_tokens[spelling] / n for spelling in routers()},
        cost=cost,
        verdict=verdict,
        reasons=reasons,
        **figures,
    )


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign that a pair will disappoint: a figure beyond a limit."""

    useless: bool
    shows: Callable[[dict[str, float]], bool]
    sentence: str


SIGNS = (
    Sign(
        True,
        lambda f: f["agreement"] > 0.97 and f["overlap"] > 0.95,
        "these two hardly differ ({agreement:.0%} the same next token): BACo cannot add diversity",
    ),
    Sign(
        True,
        lambda f: f["prompt_gain"] < 0.05,
        "the base model does not follow the prompt ({prompt_gain:.2f} nats a token likelier than "
        "after another prompt; 0.05 is little): give it another --base-template",
    ),
    Sign(
        False,
        lambda f: f["entropy_aligned"] > 0.9 * f["entropy_base"],
        "the aligned model is hardly surer than the base ({entropy_aligned:.2f} against "
        "{entropy_base:.2f} nats): alignment took little diversity away",
    ),
    Sign(
        False,
        lambda f: f["first_token"] < 0.5,
        "the base model begins answers otherwise than the aligned one (a space or none; it agrees "
        "with probability {first_token:.2f}): end its template otherwise",
    ),
    Sign(
        False,
        lambda f: f["base_ends"] < 0.2,
        "the base model seldom ends an answer ({base_ends:.0%}): lock the end to the aligned model "
        "with Punc",
    ),
    Sign(
        False,
        lambda f: f["overlap"] < 0.2,
        "the two speak very differently (overlap {overlap:.2f}): words may not fit together",
    ),
)


def judge(figures: dict[str, float]) -> tuple[str, list[str]]:
    """The verdict on a pair's figures, and the reasons for it."""
    shown = [sign for sign in SIGNS if sign.shows(figures)]
    reasons = [sign.sentence.format(**figures) for sign in shown]
    if any(sign.useless for sign in shown):
        return "useless", reasons
    if shown:
        return "doubtful", reasons
    gap = figures["entropy_base"] - figures["entropy_aligned"]
    assert math.isfinite(gap)
    return "good", [
        f"the base model has {gap:.2f} nats a token that the aligned one lost, follows the prompt "
        "and ends its answers"
    ]
