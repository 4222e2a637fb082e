"""Diagnosis of a pair: whether its two models suit BACo.

Each model alone, and both together, answer a few prompts. Then both models read every answer
(teacher forcing), and their next-token distributions are compared position by position. Models with
different tokenizers are compared word by word, and what needs one vocabulary is left out.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from baco.api import Baco
from baco.backends.base import Counts
from baco.calibration.agreement import Agreement, PromptGain, routers
from baco.calibration.text_agreement import OwnReading, TextAgreement
from baco.engine.scheduler import MANY_CHUNKS
from baco.engine.shared_text_engine import SharedTextStats
from baco.errors import BacoError
from baco.kv_cache.protocol import finish
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.outputs import Completion, check_whole
from baco.source import MODELS, Source
from baco.text.prompts import Prompt
from baco.text.token_bytes import spell
from baco.text.vocabulary import Role

# The routers that answer the prompts: both models, at the paper's middle threshold, and each alone.
TOGETHER = "P-Punc:0.4"
ANSWERERS = (TOGETHER, "Aligned", "Base")
PARTINGS = 8  # the most frequent ones are listed
NO_OVERLAP = "the two vocabularies differ, so their distributions have no common tokens"
# A forward is timed this often, behind a text of this many tokens.
TIMED_FORWARDS, TIMED_TOKENS = 5, 16


@dataclass(frozen=True, slots=True)
class TextFigures:
    """What a pair with two tokenizers has beside the other figures.

    Attributes:
        word_entropy: of each model at word starts, in nats, over its own vocabulary.
        seams: share of the word starts inside answers that are safe seams of each tokenizer.
        encoding: share of the time of both models' answers that encoding took.
        whole: texts that were encoded from their start, for want of a near seam.
        read, rolled_back: tokens of both models' answers that the models read, and those of them
            that were removed from a cache because other ids took their place.
    """

    word_entropy: dict[Source, float]
    seams: dict[Source, float]
    encoding: float
    whole: int
    read: int
    rolled_back: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The figures of a pair. Means are over the positions of the answers.

    The positions are tokens. Where the models have different tokenizers, they are words of the
    text.

    Attributes:
        pair: its name.
        weights: each model's number format and device.
        forwards: which forward runs each model.
        sharing: of weights and forwards by both models, in a sentence.
        forward_ms: milliseconds of that forward over one token of 1 row and of 8 rows.
        prompts, positions: how many were read.
        unit: ``token`` or ``character``: what entropies and ``cost`` are given for.
        agreement: share of positions where both models have the same most likely token; with two
            tokenizers, where the text of one model's most likely token starts the other's.
        agreement_by_role: the same, by the role of the base model's most likely token.
        overlap: Σ_token min(P_base, P_aligned), 1 for equal distributions; None with two
            tokenizers.
        entropy_base, entropy_aligned: in nats a ``unit``.
        partings: the most frequent pairs of differing most likely tokens.
        base_share: router → base share.
        prompt_gain: how much likelier an aligned answer is under the base model after its own
            prompt than after another, in nats per token of the base model.
        base_ends, aligned_ends: share of each model's answers that end within ``max_tokens``.
        first_token: probability that the base model begins an answer as the aligned model does,
            with or without a space.
        cost: time per ``unit`` of both models over that of the aligned model alone.
        verdict: ``good``, ``doubtful`` or ``useless``.
        reasons: for the verdict, a sentence each.
        shared_text: what only pairs with two tokenizers have, else None.
        left_out: figures and routers that cannot be given for this pair → the reason.
    """

    pair: str
    weights: dict[str, str]
    forwards: dict[str, str]
    sharing: str
    forward_ms: dict[str, dict[str, float]]
    prompts: int
    positions: int
    unit: str
    agreement: float
    agreement_by_role: dict[str, float]
    overlap: float | None
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
    shared_text: TextFigures | None = None
    left_out: dict[str, str] = field(default_factory=dict)


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
    check_prompts(prompts)
    pair = baco.pair
    options: dict[str, Any] = {"n": samples, "seed": seed, "max_tokens": max_tokens}
    # Work that a model does only for its first answer must not count as cost.
    baco.generate(prompts[0], router=TOGETHER, **options | {"n": 1, "max_tokens": 1})
    answered: dict[str, _Answers] = {}
    for answerer in ANSWERERS:
        answered[answerer] = _answer(baco, prompts, answerer, options)
        advance()
    rendered = [pair.renderer.render(prompt) for prompt in prompts]
    by_token, by_word, gain = Agreement(), TextAgreement(), PromptGain()
    for index, prompt in enumerate(rendered):
        other = _control(rendered, index)
        for answerer in ANSWERERS:
            for completion in answered[answerer].samples[index]:
                ids: Sequence[int] = completion.token_ids
                if pair.own_vocabularies is None:
                    by_token.add(pair, prompt, ids)
                else:
                    reading = OwnReading.of(pair, ids, completion.sources)
                    by_word.add(pair, prompt, reading)
                    ids = reading.ids["base"]
                if answerer == "Aligned":
                    gain.add(pair, prompt, other, ids)
        advance()
    figures = {
        "prompt_gain": gain.per_token,
        "base_ends": answered["Base"].ended,
        "aligned_ends": answered["Aligned"].ended,
        "first_token": _first_token(pair, rendered),
        "cost": answered[TOGETHER].pace(pair) / answered["Aligned"].pace(pair),
    }
    if pair.own_vocabularies is None:
        return _conclude(pair, len(prompts), figures, _compared(pair, by_token))
    return _conclude(pair, len(prompts), figures, _compared_by_word(by_word, answered[TOGETHER]))


@dataclass(frozen=True, slots=True)
class _Answers:
    """What one of :data:`ANSWERERS` answered.

    Attributes:
        samples: of every prompt.
        seconds: for all of them.
        stats: of the engine.
    """

    samples: list[list[Completion]]
    seconds: float
    stats: Counts

    @property
    def all(self) -> list[Completion]:
        """The samples of all prompts."""
        return [completion for samples in self.samples for completion in samples]

    @property
    def ended(self) -> float:
        """Share of them that ended within ``max_tokens``."""
        reasons = [completion.finish_reason for completion in self.all]
        return reasons.count("stop") / len(reasons)

    def pace(self, pair: Pair) -> float:
        """Seconds for a token; for a character where the models have different tokenizers."""
        sizes = (len(c.token_ids if pair.own_vocabularies is None else c.text) for c in self.all)
        return self.seconds / max(sum(sizes), 1)


def _answer(baco: Baco, prompts: Sequence[Any], answerer: str, options: dict[str, Any]) -> _Answers:
    started = time.perf_counter()
    decoder = baco.decoder(chunks_per_step=MANY_CHUNKS)
    for prompt in prompts:
        decoder.submit(prompt, router=baco.router(answerer), **options)
    samples: list[list[Completion]] = [[] for _ in prompts]
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                samples[chunk.prompt].append(chunk.completion)
    answers = _Answers(samples, time.perf_counter() - started, decoder.engine.stats)
    check_whole(answers.all)
    return answers


def _control(rendered: Sequence[Prompt], index: int) -> Prompt:
    """The next prompt that differs."""
    following = (rendered[(index + step) % len(rendered)] for step in range(1, len(rendered)))
    return next(prompt for prompt in following if prompt != rendered[index])


def _first_token(pair: Pair, rendered: Sequence[Prompt]) -> float:
    """Mean probability that the base model begins as the aligned model would: space or none."""
    spaced = {model: _begin_with_space(pair, model) for model in MODELS}
    total = 0.0
    for prompt in rendered:
        top = int(pair.aligned.score(prompt.aligned_ids)[-1].argmax())
        probabilities = pair.base.score(prompt.base_ids)[-1].cpu().softmax(-1)
        total += float(probabilities[spaced["base"] == spaced["aligned"][top]].sum())
    return total / len(rendered)


def _begin_with_space(pair: Pair, model: Source) -> torch.Tensor:
    """The tokens of a model whose text begins with a space: bool [V]."""
    size, tokens = pair.vocabulary_of(model).size, spell(pair.tokenizer_of(model))
    spaced = torch.zeros(size, dtype=torch.bool)
    spaced[[t.id for t in tokens if t.data[:1] == b" " and t.id < size]] = True
    return spaced


@dataclass(frozen=True, slots=True)
class _Compared:
    """What comparing two models gave.

    Attributes:
        figures: those that signs read.
        rest: the other fields of `Diagnosis`.
    """

    figures: dict[str, float]
    rest: dict[str, Any]


def _compared(pair: Pair, agreement: Agreement) -> _Compared:
    """The figures of models that were compared token by token."""
    n = max(agreement.positions, 1)
    figures = {
        "agreement": agreement.agree / n,
        "overlap": agreement.overlap / n,
        "entropy_base": agreement.entropy_base / n,
        "entropy_aligned": agreement.entropy_aligned / n,
    }
    partings = [
        {
            "role": Role(int(pair.vocabulary.role[base])).name.lower(),
            "base": pair.tokenizer.decode([base]),
            "aligned": pair.tokenizer.decode([aligned]),
            "times": times,
        }
        for (base, aligned), times in agreement.partings.most_common(PARTINGS)
    ]
    rest = {
        "positions": agreement.positions,
        "unit": "token",
        "agreement_by_role": _shares(agreement.by_role),
        "partings": partings,
        "base_share": {spelling: agreement.base_tokens[spelling] / n for spelling in routers()},
    }
    return _Compared(figures, rest)


def _compared_by_word(agreement: TextAgreement, together: _Answers) -> _Compared:
    """The figures of models with different tokenizers."""
    n, characters = max(agreement.positions, 1), max(agreement.characters, 1)
    stats = together.stats
    assert isinstance(stats, SharedTextStats)
    figures = {
        "agreement": agreement.agree / n,
        "entropy_base": agreement.entropy["base"] / characters,
        "entropy_aligned": agreement.entropy["aligned"] / characters,
        "encoding": stats.encoding.seconds / together.seconds,
        "read_again": stats.rolled_back / max(stats.read, 1),
    }
    partings = [
        {"role": role, "base": base, "aligned": aligned, "times": times}
        for (role, base, aligned), times in agreement.partings.most_common(PARTINGS)
    ]
    shared_text = TextFigures(
        word_entropy={model: agreement.word_entropy[model] / n for model in MODELS},
        seams={model: agreement.seams[model] / max(agreement.inner, 1) for model in MODELS},
        encoding=figures["encoding"],
        whole=stats.encoding.whole,
        read=stats.read,
        rolled_back=stats.rolled_back,
    )
    rest = {
        "positions": agreement.positions,
        "unit": "character",
        "agreement_by_role": _shares(agreement.by_role),
        "overlap": None,
        "partings": partings,
        "base_share": {spelling: words / n for spelling, words in agreement.base_words.items()},
        "shared_text": shared_text,
        "left_out": {"overlap": NO_OVERLAP} | agreement.refused,
    }
    return _Compared(figures, rest)


def _shares(by_role: dict[str, list[int]]) -> dict[str, float]:
    return {role: agree / count for role, (count, agree) in sorted(by_role.items())}


def _conclude(
    pair: Pair, prompts: int, figures: dict[str, float], compared: _Compared
) -> Diagnosis:
    if compared.rest["positions"] == 0:
        raise BacoError(f"{pair.name} cannot be diagnosed: all answers to these prompts are empty")
    figures = figures | compared.figures
    two_prompts = pair.shares_weights and not pair.base.adapter_off
    verdict, reasons = judge(figures, two_prompts=two_prompts)
    fields = {name: value for name, value in figures.items() if name in Diagnosis.__slots__}
    return Diagnosis(
        pair=pair.name,
        weights=pair.weights_formats,
        forwards={source: pair.model(source).path for source in MODELS},
        sharing=_sharing(pair),
        forward_ms={source: _forward_ms(pair.model(source)) for source in MODELS},
        prompts=prompts,
        verdict=verdict,
        reasons=reasons,
        **fields | compared.rest,
    )


def _sharing(pair: Pair) -> str:
    if not pair.shares_weights:
        return "each model has its own weights"
    if pair.own_vocabularies is not None:
        return "one set of weights, in a forward for each model: they share text, not token ids"
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
        needs: a figure that not all pairs have; without it the sign does not show.
    """

    useless: bool
    shows: Callable[[dict[str, float]], bool]
    sentence: str
    of_prompts: str = ""
    needs: str = ""


SIGNS = (
    Sign(
        True,
        lambda f: f["agreement"] > 0.97 and f["overlap"] > 0.95,
        "the two models hardly differ ({agreement:.0%} the same next token, overlap {overlap:.2f}; "
        "the limits are 97% and 0.95): BACo cannot add diversity",
        "the model says nearly the same under both prompts ({agreement:.0%} the same next token, "
        "overlap {overlap:.2f}; the limits are 97% and 0.95): BACo cannot add diversity. Give "
        "another --base-template, or a base model of its own",
        needs="overlap",
    ),
    Sign(
        False,
        lambda f: f["agreement"] > 0.97,
        "the two models nearly always begin the same word ({agreement:.0%}; the limit is 97%): "
        "BACo can add little diversity",
        needs="encoding",
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
        needs="overlap",
    ),
    Sign(
        False,
        lambda f: f["encoding"] > 0.03,
        "encoding what the other model wrote takes {encoding:.0%} of the time (the limit is 3%)",
        needs="encoding",
    ),
    Sign(
        False,
        lambda f: f["read_again"] > 0.1,
        "{read_again:.0%} of the tokens read are replaced by other ids and read again (the limit "
        "is 10%): few words begin at a safe seam of these tokenizers",
        needs="read_again",
    ),
)


def judge(figures: dict[str, float], *, two_prompts: bool = False) -> tuple[str, list[str]]:
    """The verdict on a pair's figures, and the reasons for it.

    Args:
        figures: see `Diagnosis`.
        two_prompts: the pair is one model under two prompts.
    """
    shown = [
        sign for sign in SIGNS if (not sign.needs or sign.needs in figures) and sign.shows(figures)
    ]
    sentences = [(two_prompts and sign.of_prompts) or sign.sentence for sign in shown]
    reasons = [sentence.format(**figures) for sentence in sentences]
    if any(sign.useless for sign in shown):
        return "useless", reasons
    if shown:
        return "doubtful", reasons
    gap = figures["entropy_base"] - figures["entropy_aligned"]
    unit = "token" if "overlap" in figures else "character"
    more, less = "the base model", "the aligned model"
    if two_prompts:
        more, less = "the plain prompt", "the chat template"
    return "good", [
        f"{more} has {gap:.2f} nats a {unit} more entropy than {less}, and the base model follows "
        "the prompt"
    ]
