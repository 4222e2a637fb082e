"""Is this pair any good for BACo? What the two halves say about each other's answers.

Both single models, and the two together, answer a few prompts; then each half reads every answer
(teacher forcing), and their next-token distributions are compared position by position.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from baco.calibration.agreement import PromptGain, Reading, routers
from baco.errors import BacoError
from baco.models.pair import Pair
from baco.outputs import check_whole
from baco.text.prompts import Prompt
from baco.text.token_bytes import spell
from baco.text.vocabulary import Role

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.outputs import Completion

# Who answers the prompts: both together, in the paper's middle, and each alone.
TOGETHER = "P-Punc:0.4"
ANSWERERS = (TOGETHER, "Aligned", "Base")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found; means are over positions of the answers.

    Attributes:
        pair: its name.
        weights: in which numbers each half is held, and where.
        forwards: by which forward each model's rows are read.
        prompts, positions: how much was read.
        agreement: share of positions where both find the same token most likely.
        agreement_by_role: the same, by the role of the base's most likely token.
        overlap: Σ_token min(P_base, P_aligned), 1 for equal distributions.
        entropy_base, entropy_aligned: in nats.
        partings: the most frequent pairs of differing most likely tokens.
        base_share: router → share of tokens it gives to the base model.
        prompt_gain: nats per token by which the base finds an aligned answer likelier after its own
            prompt than after another.
        base_ends, aligned_ends: share of each one's answers that end by themselves within
            ``max_tokens``.
        first_token: probability under the base of beginning the answer with a space, or without
            one, as the aligned half does.
        cost: time per token of both together over the aligned half's alone.
        verdict: ``good``, ``doubtful`` or ``useless``.
        reasons: why, a sentence each.
    """

    pair: str
    weights: dict[str, str]
    forwards: dict[str, str]
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
    aligned_ends: float
    first_token: float
    cost: float
    verdict: str
    reasons: list[str]


def check_prompts(prompts: Sequence[Any]) -> None:
    """Each prompt needs another one that it is compared with.

    Raises:
        BacoError: fewer than two different prompts.
    """
    if all(prompt == prompts[0] for prompt in prompts):
        raise BacoError(
            f"no two different prompts among {len(prompts)}: diagnosing takes at least 2, each is "
            "the other's control"
        )


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
        prompts: a handful of open-ended ones, at least two of them different.
        samples: answers of each half, and of both together, to each prompt.
        seed, max_tokens: of the answers.
        advance: called after each of :data:`ANSWERERS` has answered and after each prompt is read.

    Raises:
        BacoError: fewer than two different prompts, or arguments that cannot be decoded with.
    """
    check_prompts(prompts)
    options: dict[str, Any] = {"n": samples, "seed": seed, "max_tokens": max_tokens}
    # What a model does once, on its first answer, must not count as cost.
    baco.generate(prompts[0], router=TOGETHER, **options | {"n": 1, "max_tokens": 1})
    answers: dict[str, list[list[Completion]]] = {}
    pace: dict[str, float] = {}
    for answerer in ANSWERERS:
        started = time.perf_counter()
        answers[answerer] = baco.generate_batch(prompts, router=answerer, **options)
        check_whole([completion for samples_ in answers[answerer] for completion in samples_])
        tokens = sum(len(c.token_ids) for samples_ in answers[answerer] for c in samples_)
        pace[answerer] = (time.perf_counter() - started) / max(tokens, 1)
        advance()
    rendered = [baco.pair.renderer.render(prompt) for prompt in prompts]
    reading, gain = Reading(), PromptGain()
    for index, prompt in enumerate(rendered):
        other = _control(rendered, index)
        for answerer in ANSWERERS:
            for completion in answers[answerer][index]:
                reading.add(baco.pair, prompt, completion.token_ids)
                if answerer == "Aligned":
                    gain.add(baco.pair, prompt, other, completion.token_ids)
        advance()
    figures = {
        "prompt_gain": gain.per_token,
        "base_ends": _ended(answers["Base"]),
        "aligned_ends": _ended(answers["Aligned"]),
        "first_token": _first_token(baco.pair, rendered),
        "cost": pace[TOGETHER] / pace["Aligned"],
    }
    return _conclude(baco.pair, len(prompts), reading, figures)


def _control(rendered: Sequence[Prompt], index: int) -> Prompt:
    """The next prompt that is another one."""
    following = (rendered[(index + step) % len(rendered)] for step in range(1, len(rendered)))
    return next(prompt for prompt in following if prompt != rendered[index])


def _ended(answers: "Sequence[Sequence[Completion]]") -> float:
    reasons = [completion.finish_reason for samples in answers for completion in samples]
    return reasons.count("stop") / len(reasons)


def _first_token(pair: Pair, rendered: Sequence[Prompt]) -> float:
    """Mean probability under the base of beginning as the aligned half would: space or none."""
    spaced = torch.zeros(pair.vocabulary.size, dtype=torch.bool)
    spaced[[t.id for t in spell(pair.tokenizer) if t.data[:1] == b" " and t.id < len(spaced)]] = (
        True
    )
    total = 0.0
    for prompt in rendered:
        top = int(pair.aligned.score(prompt.aligned_ids)[-1].argmax())
        chances = pair.base.score(prompt.base_ids)[-1].cpu().softmax(-1)
        total += float(chances[spaced == spaced[top]].sum())
    return total / len(rendered)


def _conclude(pair: Pair, prompts: int, reading: Reading, figures: dict[str, float]) -> Diagnosis:
    n = reading.positions
    if n == 0:
        raise BacoError(f"{pair.name} has nothing to say: all answers to these prompts are empty")
    figures |= {
        "agreement": reading.agree / n,
        "overlap": reading.overlap / n,
        "entropy_base": reading.entropy_base / n,
        "entropy_aligned": reading.entropy_aligned / n,
    }
    verdict, reasons = judge(figures)
    return Diagnosis(
        pair=pair.name,
        weights=pair.weights_formats,
        forwards={"base": pair.base.path, "aligned": pair.aligned.path},
        prompts=prompts,
        positions=n,
        agreement_by_role={
            role: agree / count for role, (count, agree) in sorted(reading.by_role.items())
        },
        partings=[
            {
                "role": Role(int(pair.vocabulary.role[base])).name.lower(),
                "base": pair.tokenizer.decode([base]),
                "aligned": pair.tokenizer.decode([aligned]),
                "times": times,
            }
            for (base, aligned), times in reading.partings.most_common(8)
        ],
        base_share={spelling: reading.base_tokens[spelling] / n for spelling in routers()},
        verdict=verdict,
        reasons=reasons,
        **figures,
    )


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign that a pair will disappoint: a figure beyond a limit, which the sentence names."""

    useless: bool
    shows: Callable[[dict[str, float]], bool]
    sentence: str


SIGNS = (
    Sign(
        True,
        lambda f: f["agreement"] > 0.97 and f["overlap"] > 0.95,
        "these two hardly differ ({agreement:.0%} the same next token, overlap {overlap:.2f}; "
        "beyond 97% and 0.95 it is too much): BACo cannot add diversity",
    ),
    Sign(
        True,
        lambda f: f["prompt_gain"] < 0.05,
        "the base model does not follow the prompt ({prompt_gain:.2f} nats a token likelier than "
        "after another prompt; below 0.05 is little): give it another --base-template",
    ),
    Sign(
        False,
        lambda f: f["entropy_aligned"] > 0.9 * f["entropy_base"],
        "the aligned model is hardly surer than the base ({entropy_aligned:.2f} against "
        "{entropy_base:.2f} nats; above nine tenths is little): alignment took little diversity "
        "away",
    ),
    Sign(
        False,
        lambda f: f["first_token"] < 0.5,
        "the base model begins answers otherwise than the aligned one (a space or none; it agrees "
        "with probability {first_token:.2f}, below 0.5): end its template otherwise",
    ),
    Sign(
        False,
        # Where the aligned half does not end either, answers are just longer than max_tokens.
        lambda f: f["base_ends"] < 0.2 and f["aligned_ends"] >= 0.5,
        "the base model seldom ends an answer ({base_ends:.0%} against {aligned_ends:.0%} of the "
        "aligned model's; below 20% is seldom): lock the end to the aligned model with Punc",
    ),
    Sign(
        False,
        lambda f: f["overlap"] < 0.2,
        "the two speak very differently (overlap {overlap:.2f}, below 0.2): words may not fit "
        "together",
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
    return "good", [
        f"the base model has {gap:.2f} nats a token that the aligned one lost, and it follows the "
        "prompt"
    ]
