"""Quality of the answers to a prompt, and utility, the quality of new answers."""

import math
from functools import partial

from baco.evaluation.metrics.protocols import Answers, Equivalence, Prompts, Reward
from baco.evaluation.metrics.reference import ReferenceModel
from baco.evaluation.metrics.registry import register_metric, with_reward

PATIENCE = 0.8  # NoveltyBench's probability that a reader wants one more answer


@register_metric("reward", kind="quality", models=("reward",))
def reward(judge: Reward, prompts: Prompts, answers: Answers) -> list[float]:
    """Mean reward of the samples under a reward model.

    Range: the model's own (Skywork's are logits, the demo world's quality 0 to 1); higher is
    better. Cost: the model reads each sample, with its conversation, once.
    """
    return [math.fsum(row) / len(row) for row in judge.rewards(prompts, answers)]


@register_metric("perplexity", kind="quality", models=("reference",))
def perplexity(model: ReferenceModel, prompts: Prompts, answers: Answers) -> list[float | None]:
    """Negative log-perplexity per token of the samples, given the prompt, under a reference model.

    Σ ln P(token) / tokens over all samples of a prompt together, so longer samples weigh more. It
    is minus the logarithm of the usual perplexity, so higher is better. Range −∞ to 0, in nats per
    token. None where no sample has a token. Cost: the model reads each sample, with its prompt,
    once.
    """
    figures: list[float | None] = []
    for row in model.logprobs(prompts, answers):
        tokens = sum(count for _, count in row)
        figures.append(math.fsum(total for total, _ in row) / tokens if tokens else None)
    return figures


def utility_k(
    judge: Equivalence, rewards: Reward, prompts: Prompts, answers: Answers
) -> list[float]:
    """The gain of a reader who goes through the samples (NoveltyBench, Zhang et al. 2025).

    (1 − p) / (1 − p^k) Σ p^(i − 1) u_i over the k samples in the order they were drawn. u_i is the
    reward's rating, 1 to 10, if the i-th is the first of its class, and 0 if an equivalent one came
    before; p = 0.8 is the reader's patience. Range above 0 to 10, higher is better. Cost: that of
    distinct_k and reward, whose results are reused.
    """
    ratings = rewards.ratings(rewards.rewards(prompts, answers))
    figures = []
    for row, rated in zip(judge.partition(prompts, answers), ratings, strict=True):
        weights = [PATIENCE**place for place in range(len(row))]
        gained = [
            weight * rating if number not in row[:place] else 0.0
            for place, (weight, rating, number) in enumerate(zip(weights, rated, row, strict=True))
        ]
        figures.append(math.fsum(gained) / math.fsum(weights))
    return figures


register_metric(
    "utility_k",
    kind="utility",
    models=("equivalence", "reward"),
    build=partial(with_reward, "equivalence", utility_k),
)(utility_k)
