"""Train a learned router on the answers of a run.

The objective is advantage-weighted regression. An answer's reward is its quality plus λ times its
distance to the other answers to its prompt at the same setting (one minus the overlap of their word
pairs), both standardised over the run. Its advantage is its reward minus the mean reward of all
answers to its prompt. The model learns the sources of all words that a router decided, each
weighted by exp(advantage / β) of its answer. So it prefers base where base words were in answers
that are different, and aligned where base words cost quality.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from baco.api import Baco
from baco.calibration.agreement import answer_logits, readable
from baco.errors import BacoError
from baco.evaluation.records import Group, Sample
from baco.evaluation.score import requested_metrics
from baco.evaluation.store import Run
from baco.models.model import PairModel
from baco.models.pair import Pair
from baco.routing.learned import LearnedModel, features, fit, principal_axes, project
from baco.routing.router import RuleRouter
from baco.routing.signals import Distribution, Signals
from baco.routing.word_boundaries import NO_TOKEN, BoundaryState
from baco.source import MODELS, Source
from baco.text.prompts import Prompt

# The largest weight of an answer; the mean is about 1.
_MAX_WEIGHT = 20.0
_MIN_DECISIONS = 200
# Answers whose hidden states the principal axes are computed of.
_MAX_ANSWERS_FOR_AXES = 200


@dataclass(frozen=True, slots=True)
class Objective:
    """What is learned.

    Attributes:
        quality: a metric of the kind quality.
        diversity: λ, the weight of an answer's distance to its siblings.
        temperature: β; a smaller one learns from the best answers alone.
        hidden: units of the hidden layer; 0 is a logistic regression.
        axes: principal axes of each model's last hidden states that are read; 0 reads none.
    """

    quality: str = "reward"
    diversity: float = 1.0
    temperature: float = 1.0
    hidden: int = 0
    axes: int = 0


def train(
    groups: Sequence[Group],
    run: Run,
    baco: Baco,
    objective: Objective,
    models: Mapping[str, str],
    advance: Callable[[], None] = lambda: None,
) -> LearnedModel:
    """Train on the answers of one pair.

    Args:
        groups: answers of this pair, best by several routers; ``Rand`` explores.
        run: the run that they belong to.
        baco: the pair that wrote them.
        objective: what is learned.
        models: of the quality metric, by role.
        advance: called after each prompt at each setting.

    Raises:
        BacoError: the pair has two tokenizers, the run has no such answers, the metric cannot
            run, or a model returns no hidden states where these are read.
    """
    baco.pair.check_one_tokenizer("a learned router")
    groups = [group for group in groups if any(_mixed(s) for s in group.samples)]
    if not groups:
        raise BacoError(
            "the run has no answers that both models wrote: sweep routers, such as "
            "'baco sweep --router Rand --router P-Punc'"
        )
    weights = answer_weights(run, groups, objective, models)
    axes = principal_axes_of(baco.pair, groups, objective.axes) if objective.axes else {}
    rows, sources, shares = [], [], []
    for group, weight in zip(groups, weights, strict=True):
        for sample, share in zip(group.samples, weight, strict=True):
            decided = decisions(baco.pair, group, sample, hidden_states=bool(axes))
            if decided is not None:
                projected = [project(decided.hidden_states[s], own) for s, own in axes.items()]
                rows.append(torch.cat((decided.rows, *projected), dim=1))
                sources.append(decided.source)
                shares.append(torch.full((len(decided.source),), share))
        advance()
    if sum(map(len, rows)) < _MIN_DECISIONS:
        raise BacoError(
            f"the run has {sum(map(len, rows))} words that a router decided, and {_MIN_DECISIONS} "
            "are needed: draw more samples"
        )
    model = fit(torch.cat(rows), torch.cat(sources), torch.cat(shares), hidden=objective.hidden)
    trained = {
        "pair": baco.pair.name,
        "models": {source: baco.pair.model(source).name for source in MODELS},
        "prompts": len({(group.task, group.prompt.id) for group in groups}),
        "answers": len(rows),
        "words": sum(map(len, rows)),
        "quality": objective.quality,
        "diversity_weight": objective.diversity,
        "temperature": objective.temperature,
        "hidden": objective.hidden,
        "hidden_widths": {source: own.shape[1] for source, own in axes.items()},
    }
    return replace(model, trained=trained, axes=axes)


def answer_weights(
    run: Run, groups: Sequence[Group], objective: Objective, models: Mapping[str, str]
) -> list[list[float]]:
    """exp(advantage / β) of each answer of each group; 0 where it has no quality."""
    return _weights(groups, _qualities(run, groups, objective, models), objective)


@dataclass(frozen=True, slots=True)
class Decisions:
    """The N words of an answer that a router decided.

    Attributes:
        prompt: as both models read it.
        tokens: of the answer.
        at: their positions in it, int64 [N].
        rows: features, float32 [N, F].
        source: bool [N], True for the base model.
        hidden_states: each model's last hidden states before them, float32 [N, D]; or nothing.
    """

    prompt: Prompt
    tokens: list[int]
    at: Tensor
    rows: Tensor
    source: Tensor
    hidden_states: dict[Source, Tensor] = field(default_factory=dict)


def principal_axes_of(pair: Pair, groups: Sequence[Group], count: int) -> dict[Source, Tensor]:
    """The axes along which each model's hidden states before decided words vary most, [count, D].

    They are those of some answers, spread evenly over all, so that memory does not grow with their
    number.
    """
    answers = [(group, sample) for group in groups for sample in group.samples]
    states: dict[Source, list[Tensor]] = {source: [] for source in MODELS}
    for group, sample in answers[:: -(-len(answers) // _MAX_ANSWERS_FOR_AXES)]:
        decided = decisions(pair, group, sample, hidden_states=True)
        for source, own in ({} if decided is None else decided.hidden_states).items():
            states[source].append(own)
    known = {source: own for source, own in states.items() if own}
    return {source: principal_axes(torch.cat(own), count) for source, own in known.items()}


@torch.inference_mode()
def decisions(
    pair: Pair, group: Group, sample: Sample, *, hidden_states: bool = False
) -> Decisions | None:
    """The words of an answer that a router decided; None where both models can read none.

    Args:
        pair: the pair that wrote it.
        group: with the prompt.
        sample: the answer.
        hidden_states: also return the models' hidden states.
    """
    messages = [dict(message) for message in group.prompt.messages]
    prompt = pair.renderer.render(messages)
    tokens, sources = _tokens(pair, sample, prompt.joining_space)
    tokens = list(readable(pair, tokens, prompt))
    if not tokens:
        return None
    read = {
        "base": _read(pair.base, prompt.base_ids, tokens, hidden_states),
        "aligned": _read(pair.aligned, prompt.aligned_ids, tokens, hidden_states),
    }
    signals = Signals(read["base"], read["aligned"], pair.vocabulary)
    previous = torch.tensor([NO_TOKEN, *tokens[:-1]])
    state = BoundaryState.of(signals, previous, [(RuleRouter(None), "word")], route=False)
    source = torch.tensor(sources[: len(tokens)])
    active = torch.cat((torch.zeros(1, dtype=torch.bool), source[:-1]))
    at = state.is_boundary(active).nonzero()[:, 0]
    states = {s: signals.hidden_states(s)[at] for s in MODELS} if hidden_states else {}
    return Decisions(prompt, tokens, at, features(signals)[at], source[at], states)


def _read(
    model: PairModel, prompt: Sequence[int], answer: Sequence[int], hidden_states: bool
) -> Distribution:
    """What an answer's tokens would be drawn from."""
    if not hidden_states:
        return Distribution(answer_logits(model, prompt, answer))
    logits, states = model.score_with_hidden_states([*prompt, *answer[:-1]])
    first = len(prompt) - 1
    return Distribution(logits[first:].cpu(), hidden_states=states[first:].cpu())


def _mixed(sample: Sample) -> bool:
    return len({source for _, source in sample.pieces}) == 2


def _tokens(pair: Pair, sample: Sample, joining_space: bool) -> tuple[list[int], list[bool]]:
    """The tokens of an answer and their sources: each piece is encoded by itself."""
    tokens, sources = list[int](), list[bool]()
    for number, (text, source) in enumerate(sample.pieces):
        spaced = " " + text if joining_space and not number and text[:1].strip() else text
        ids = pair.tokenizer(spaced, add_special_tokens=False)["input_ids"]
        tokens += ids
        sources += [source == "base"] * len(ids)
    return tokens, sources


def _qualities(
    run: Run, groups: Sequence[Group], objective: Objective, models: Mapping[str, str]
) -> list[list[float]]:
    """The quality of each answer of each group."""
    (request,) = requested_metrics(run, [objective.quality], models)
    by_task = {task: request.build(task) for task in dict.fromkeys(g.task for g in groups)}
    if any(metric.kind != "quality" for metric in by_task.values()):
        raise BacoError(f"{objective.quality} does not measure quality: give reward or perplexity")
    values = []
    for group in groups:
        answers = [[text] for text in group.texts]
        prompts = [group.prompt] * len(answers)
        scores = by_task[group.task].score(prompts, answers)
        values.append([math.nan if score is None else float(score) for score in scores])
    return values


def _weights(
    groups: Sequence[Group], qualities: Sequence[Sequence[float]], objective: Objective
) -> list[list[float]]:
    """exp(advantage / β) of each answer; 0 where it has no quality."""
    quality = _standardised(qualities)
    distance = _standardised([_distances(group.texts) for group in groups])
    rewards = [
        [q + objective.diversity * d for q, d in zip(*rows, strict=True)]
        for rows in zip(quality, distance, strict=True)
    ]
    by_prompt = defaultdict[tuple[str, str], list[float]](list)
    for group, values in zip(groups, rewards, strict=True):
        by_prompt[group.task, group.prompt.id] += [v for v in values if not math.isnan(v)]
    means = {key: math.fsum(values) / max(len(values), 1) for key, values in by_prompt.items()}
    return [
        [_weight((v - means[g.task, g.prompt.id]) / objective.temperature) for v in values]
        for g, values in zip(groups, rewards, strict=True)
    ]


def _weight(advantage: float) -> float:
    return 0.0 if math.isnan(advantage) else min(math.exp(min(advantage, 9.0)), _MAX_WEIGHT)


def _standardised(table: Sequence[Sequence[float]]) -> list[list[float]]:
    known = [value for values in table for value in values if not math.isnan(value)]
    mean = math.fsum(known) / max(len(known), 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / max(len(known), 1)) or 1.0
    return [[(value - mean) / spread for value in values] for values in table]


def _distances(texts: Sequence[str]) -> list[float]:
    """The mean distance of each answer to the others: 1 minus the overlap of their word pairs."""
    pairs = []
    for text in texts:
        words = ["", *text.lower().split()]
        pairs.append(set(pairwise(words)))

    def distance(one: set[tuple[str, str]], other: set[tuple[str, str]]) -> float:
        return 1 - len(one & other) / max(len(one | other), 1)

    return [
        math.fsum(distance(own, other) for j, other in enumerate(pairs) if j != i)
        / max(len(pairs) - 1, 1)
        for i, own in enumerate(pairs)
    ]
