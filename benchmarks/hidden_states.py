"""Would hidden states help a learned router? Weighted AUC on held-out prompts, with and without.

    baco sweep --pair demo --task demo -r Rand:0.1 -r Rand:0.3 -r P-Punc:0.3 -n 6 --seed 7 --out RUN
    python -m benchmarks.hidden_states RUN

The objective is that of `baco router train`: predict the source of every word that a router
decided, each weighted by its answer's advantage. The features are those of the learned router, the
first principal components of both models' last hidden states (right before the head), or both, as
with ``--hidden-states``. Each prompt is predicted by models that were fitted without it. ``Rand``
picks sources by chance, so on its answers alone only the weights can be learned: 0.5 is what
knowing nothing gives. Intervals are 95% bootstrap intervals over prompts; differences are to the
first line, prompt by prompt.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baco import Baco
from baco.cli.score import models_by_role
from baco.evaluation.plan import PairSpec
from baco.evaluation.records import Group
from baco.evaluation.store import Run
from baco.evaluation.train_router import Objective, answer_weights, decisions
from baco.models.pair import Pair
from baco.routing.learned import fit, principal_axes, project
from baco.source import MODELS
from benchmarks import launch

FOLDS = 5
INPUTS = {
    "features": ("features",),
    "hidden states": MODELS,
    "features and hidden states": ("features", *MODELS),
}


@dataclass(frozen=True, slots=True)
class Words:
    """All words of a run that a router decided.

    Attributes:
        inputs: float32 [N, ...] by name: the router's features, each model's hidden states.
        is_base: the sources, bool [N].
        weight: of the words' answers, float32 [N].
        prompt: index of the prompt, int64 [N].
        by_chance: whether ``Rand`` decided, bool [N].
    """

    inputs: dict[str, Tensor]
    is_base: Tensor
    weight: Tensor
    prompt: Tensor
    by_chance: Tensor


def main() -> None:
    """Fit, predict and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a run of one pair")
    parser.add_argument("--quality", default="reward", help="metric of an answer's quality")
    parser.add_argument("--model", action="append", help="of that metric, ROLE=ID_OR_FOLDER")
    parser.add_argument("--method", action="append", help="of the run; all by default. Repeatable")
    parser.add_argument("--samples", type=int, default=None, help="answers read of each setting")
    parser.add_argument("--components", type=int, default=16, help="of each model")
    parser.add_argument("--units", type=int, default=16, help="of the hidden layer")
    options = parser.parse_args()
    run = Run.open(options.run)
    (row,) = run.config["pairs"]
    pair = PairSpec(row["name"], row["options"])
    baco = Baco.load(**pair.where, **pair.options)
    groups = [g for g in run.groups() if not options.method or g.method in options.method]
    models = models_by_role("--model", options.model)
    weights = answer_weights(run, groups, Objective(options.quality), models)
    words = read(groups, weights, baco.pair, options.samples)
    print(f"{len(words.is_base)} words, {len(words.prompt.unique())} prompts")
    first: dict[str, Any] = {}
    for name, inputs in INPUTS.items():
        for model, units in (("logistic regression", 0), ("MLP", options.units)):
            predicted = predict(words, inputs, options.components, units)
            for rows_name, kept in (("all", None), ("Rand", words.by_chance)):
                drawn = auc_draws(words, predicted, kept)
                other = first.setdefault(rows_name, drawn)
                line = f"{rows_name:<5}{name:<28}{model:<21}{_interval(drawn)}"
                print(
                    line if other is drawn else f"{line}  minus first: {_interval(drawn - other)}"
                )


def read(
    groups: Sequence[Group], weights: Sequence[Sequence[float]], pair: Pair, samples: int | None
) -> Words:
    """The words of answers, and what the models compute before them.

    Args:
        groups: the answers.
        weights: of each.
        pair: that wrote them.
        samples: how many of each group are read; None for all.
    """
    prompts: dict[str, int] = {}
    columns: dict[str, list[Tensor]] = {}
    for group, row in zip(groups, weights, strict=True):
        number = prompts.setdefault(group.prompt.id, len(prompts))
        for sample, weight in list(zip(group.samples, row, strict=True))[:samples]:
            decided = decisions(pair, group, sample, hidden_states=True)
            if decided is None or not len(decided.at):
                continue
            count = len(decided.at)
            answer: dict[str, Tensor] = {"features": decided.rows, "is_base": decided.source}
            answer.update(decided.hidden_states.items())
            answer["weight"] = torch.full((count,), weight)
            answer["prompt"] = torch.full((count,), number)
            answer["by_chance"] = torch.full((count,), sample.setting.startswith("Rand"))
            for key, value in answer.items():
                columns.setdefault(key, []).append(value)
    table = {key: torch.cat(values) for key, values in columns.items()}
    inputs = {key: table.pop(key) for key in ("features", *MODELS)}
    return Words(inputs, **table)


def predict(words: Words, inputs: tuple[str, ...], components: int, units: int) -> Tensor:
    """The probability of base for each word, by a model fitted on other prompts: float32 [N]."""
    predicted = torch.zeros(len(words.is_base))
    for fold in range(FOLDS):
        held = words.prompt % FOLDS == fold
        columns = []
        for name in inputs:
            values = words.inputs[name]
            if name != "features":
                values = project(values, principal_axes(values[~held], components))
            columns.append(values)
        rows = torch.cat(columns, dim=1)
        model = fit(rows[~held], words.is_base[~held], words.weight[~held], hidden=units)
        predicted[held] = model.probability(rows[held])
    return predicted


def auc_draws(words: Words, predicted: Tensor, kept: Tensor | None, draws: int = 1000) -> Any:
    """The weighted AUC of all prompts, and then of bootstrap draws of prompts."""
    rows = torch.arange(len(predicted)) if kept is None else kept.nonzero()[:, 0]
    rows = rows[predicted[rows].argsort()]
    score, is_base = predicted[rows].numpy(), words.is_base[rows].numpy()
    weight, prompt = words.weight[rows].numpy(), words.prompt[rows].numpy()
    starts = np.flatnonzero(np.diff(score, prepend=np.nan) != 0)  # of equal scores
    prompts = int(words.prompt.max()) + 1
    generator = np.random.default_rng(1)
    counts: list[Any] = [np.ones(prompts)]
    for _ in range(draws):
        counts.append(np.bincount(generator.integers(0, prompts, prompts), minlength=prompts))
    values = []
    for count in counts:
        each = weight * count[prompt]
        base = np.add.reduceat(each * is_base, starts)
        aligned = np.add.reduceat(each * ~is_base, starts)
        below = np.cumsum(aligned) - aligned / 2
        values.append((base * below).sum() / (base.sum() * aligned.sum()))
    return np.array(values)


def _interval(drawn: Any) -> str:
    low, high = np.percentile(drawn[1:], (2.5, 97.5))
    return f"{drawn[0]:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    launch(main)
