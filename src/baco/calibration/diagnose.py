"""Diagnosis of a pair: whether its two models suit BACo.

Each model alone, and both together, answer a few prompts. Then both models read every answer
(teacher forcing), and their next-token distributions are compared position by position.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from baco.api import Baco
from baco.calibration.agreement import Agreement, PromptGain, routers
from baco.errors import BacoError
from baco.kv_cache.protocol import finish
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.outputs import Completion, check_whole
from baco.source import MODELS
from baco.text.prompts import Prompt
from baco.text.token_bytes import spell
from baco.text.vocabulary import Role

# The routers that answer the prompts: both models, at the paper's middle threshold, and each alone.
TOGETHER = "P-Punc:0.4"
ANSWERERS = (TOGETHER, "Aligned", "Base")
# A forward is timed this often, behind a text of this many tokens.
TIMED_FORWARDS, TIMED_TOKENS = 5, 16


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The figures of a pair. Means are over the positions of the answers.

    Attributes:
        pair: its name.
        weights: each model's number format and device.
        forwards: which forward runs each model.
        sharing: of weights and forwards by both models, in a sentence.
        forward_ms: milliseconds of that forward over one token of 1 row and of 8 rows.
        prompts, positions: how many were read.
        agreement: share of positions where both models have the same most likely token.
        agreement_by_role: the same, by the role of the base model's most likely token.
        overlap: Σ_token min(P_base, P_aligned), 1 for equal distributions.
        entropy_base, entropy_aligned: in nats.
        partings: the most frequent pairs of differing most likely tokens.
        base_share: router → base share.
        prompt_gain: how much likelier an aligned answer is under the base model after its own
            prompt than after another, in nats per token.
        base_ends, aligned_ends: share of each model's answers that end within ``max_tokens``.
        first_token: probability that the base model begins an answer as the aligned model does,
            with or without a space.
        cost: time per token of both models over that of the aligned model alone.
        verdict: ``good``, ``doubtful`` or ``useless``.
        reasons: for the verdict, a sentence each.
    """

    pair: str
    weights: dict[str, str]
    forwards: dict[str, str]
    sharing: str
    forward_ms: dict[str, dict[str, float]]
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
    """Check that each prompt has another one to be compared with.

    Raises:
        BacoError: there are fewer than two different prompts.
    """
    if all(prompt == prompts[0] for prompt in prompts):
        raise BacoError(
            f"no two different prompts among {len(prompts)}: diagnosing takes at least 2, each is "
            "the other's control"
        )


def diagnose(
    baco: Baco,
    prompts: Sequence[Any],
    *,
    samples: int = 2,
    seed: int = 0,
    max_tokens: int = 64,
    advance: Callable[[], None] = lambda: None,
) -> Diagnosis:
    """Diagnose a pair.

    Args:
        baco: the pair.
        prompts: a handful of open-ended prompts, at least two of them different.
        samples: answers of each model, and of both together, to each prompt.
        seed, max_tokens: of the answers.
        advance: called after each of :data:`ANSWERERS` has answered and after each prompt is read.

    Raises:
        BacoError: there are fewer than two different prompts, or a sampling parameter is wrong.
    """
    baco.pair.check_one_tokenizer("diagnose")
    check_prompts(prompts)
    options: dict[str, Any] = {"n": samples, "seed": seed, "max_tokens": max_tokens}
    # Work that a model does only for its first answer must not count as cost.
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
    agreement, gain = Agreement(), PromptGain()
    for index, prompt in enumerate(rendered):
        other = _control(rendered, index)
        for answerer in ANSWERERS:
            for completion in answers[answerer][index]:
                agreement.add(baco.pair, prompt, completion.token_ids)
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
    return _conclude(baco.pair, len(prompts), agreement, figures)


def _control(rendered: Sequence[Prompt], index: int) -> Prompt:
    """The next prompt that differs."""
    following = (rendered[(index + step) % len(rendered)] for step in range(1, len(rendered)))
    return next(prompt for prompt in following if prompt != rendered[index])


def _ended(answers: Sequence[Sequence[Completion]]) -> float:
    reasons = [completion.finish_reason for samples in answers for completion in samples]
    return reasons.count("stop") / len(reasons)


def _first_token(pair: Pair, rendered: Sequence[Prompt]) -> float:
    """Mean probability that the base model begins as the aligned model would: space or none."""
    size = pair.vocabulary.size
    spaced = torch.zeros(size, dtype=torch.bool)
    spaced[[t.id for t in spell(pair.tokenizer) if t.data[:1] == b" " and t.id < size]] = True
    total = 0.0
    for prompt in rendered:
        top = int(pair.aligned.score(prompt.aligned_ids)[-1].argmax())
        probabilities = pair.base.score(prompt.base_ids)[-1].cpu().softmax(-1)
        total += float(probabilities[spaced == spaced[top]].sum())
    return total / len(rendered)


def _conclude(
    pair: Pair, prompts: int, agreement: Agreement, figures: dict[str, float]
) -> Diagnosis:
    n = agreement.positions
    if n == 0:
        raise BacoError(f"{pair.name} cannot be diagnosed: all answers to these prompts are empty")
    figures |= {
        "agreement": agreement.agree / n,
        "overlap": agreement.overlap / n,
        "entropy_base": agreement.entropy_base / n,
        "entropy_aligned": agreement.entropy_aligned / n,
    }
    two_prompts = pair.shares_weights and not pair.base.adapter_off
    verdict, reasons = judge(figures, two_prompts=two_prompts)
    return Diagnosis(
        pair=pair.name,
        weights=pair.weights_formats,
        forwards={source: pair.model(source).path for source in MODELS},
        sharing=_sharing(pair),
        forward_ms={source: _forward_ms(pair.model(source)) for source in MODELS},
        prompts=prompts,
        positions=n,
        agreement_by_role={
            role: agree / count for role, (count, agree) in sorted(agreement.by_role.items())
        },
        partings=[
            {
                "role": Role(int(pair.vocabulary.role[base])).name.lower(),
                "base": pair.tokenizer.decode([base]),
                "aligned": pair.tokenizer.decode([aligned]),
                "times": times,
            }
            for (base, aligned), times in agreement.partings.most_common(8)
        ],
        base_share={spelling: agreement.base_tokens[spelling] / n for spelling in routers()},
        verdict=verdict,
        reasons=reasons,
        **figures,
    )


def _sharing(pair: Pair) -> str:
    if not pair.shares_weights:
        return "each model has its own weights"
    if isinstance(pair.joint, str):
        return f"one set of weights, in a forward for each model: {pair.joint}"
    return "one set of weights, in one forward over the rows of both models"


@torch.inference_mode()
def _forward_ms(model: PairModel) -> dict[str, float]:
    """The least milliseconds of a forward of one token, by the number of rows."""
    least = {}
    for rows in (1, 8):
        cache = model.new_cache()
        cache.copy_prefix(finish(cache.prefill([0] * TIMED_TOKENS)), rows)
        seconds = []
        for repeat in range(TIMED_FORWARDS):
            start = time.perf_counter()
            logits = cache.extend(torch.full((rows, 1), repeat), [1] * rows, 1)
            logits[:, -1, 0].tolist()  # waits for the device
            seconds.append(time.perf_counter() - start)
        least[str(rows)] = 1000 * min(seconds)
    return least


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign that a pair does not suit BACo: a figure beyond a limit, which the sentence names.

    Attributes:
        useless: whether the pair is useless with it, else doubtful.
        shows: whether figures have it.
        sentence: for the user.
        of_prompts: the sentence where the pair is one model under two prompts, if it differs.
    """

    useless: bool
    shows: Callable[[dict[str, float]], bool]
    sentence: str
    of_prompts: str = ""


SIGNS = (
    Sign(
        True,
        lambda f: f["agreement"] > 0.97 and f["overlap"] > 0.95,
        "the two models hardly differ ({agreement:.0%} the same next token, overlap {overlap:.2f}; "
        "the limits are 97% and 0.95): BACo cannot add diversity",
        "the model says nearly the same under both prompts ({agreement:.0%} the same next token, "
        "overlap {overlap:.2f}; the limits are 97% and 0.95): BACo cannot add diversity. Give "
        "another --base-template, or a base model of its own",
    ),
    Sign(
        True,
        lambda f: f["prompt_gain"] < 0.05,
        "the base model does not follow the prompt (answers are {prompt_gain:.2f} nats a token "
        "likelier than after another prompt; the limit is 0.05): give it another --base-template",
    ),
    Sign(
        False,
        lambda f: f["entropy_aligned"] > 0.9 * f["entropy_base"],
        "the aligned model's entropy is nearly as high as the base model's ({entropy_aligned:.2f} "
        "and {entropy_base:.2f} nats; the limit is nine tenths): alignment took little diversity "
        "away",
        "the model is nearly as diverse under its chat template as under the plain prompt (entropy "
        "{entropy_aligned:.2f} and {entropy_base:.2f} nats; the limit is nine tenths): an aligned "
        "model answers alike under both; a base model of its own brings more diversity",
    ),
    Sign(
        False,
        lambda f: f["first_token"] < 0.5,
        "the base model begins answers differently, with a space or without one (it agrees with "
        "probability {first_token:.2f}; the limit is 0.5): change the end of its template",
    ),
    Sign(
        False,
        # Where the aligned model does not end either, answers are just longer than max_tokens.
        lambda f: f["base_ends"] < 0.2 and f["aligned_ends"] >= 0.5,
        "the base model rarely ends an answer ({base_ends:.0%}, and {aligned_ends:.0%} of the "
        "aligned model's; the limit is 20%): lock the end to the aligned model with Punc",
    ),
    Sign(
        False,
        lambda f: f["overlap"] < 0.2,
        "the two models' distributions differ very much (overlap {overlap:.2f}; the limit is 0.2): "
        "their words may not fit together",
    ),
)


def judge(figures: dict[str, float], *, two_prompts: bool = False) -> tuple[str, list[str]]:
    """The verdict on a pair's figures, and the reasons for it.

    Args:
        figures: see `Diagnosis`.
        two_prompts: the pair is one model under two prompts.
    """
    shown = [sign for sign in SIGNS if sign.shows(figures)]
    sentences = [(two_prompts and sign.of_prompts) or sign.sentence for sign in shown]
    reasons = [sentence.format(**figures) for sentence in sentences]
    if any(sign.useless for sign in shown):
        return "useless", reasons
    if shown:
        return "doubtful", reasons
    gap = figures["entropy_base"] - figures["entropy_aligned"]
    more, less = "the base model", "the aligned model"
    if two_prompts:
        more, less = "the plain prompt", "the chat template"
    return "good", [
        f"{more} has {gap:.2f} nats a token more entropy than {less}, and the base model follows "
        "the prompt"
    ]
