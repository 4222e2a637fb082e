"""Adaptive and learned routers next to fixed thresholds, on held-out prompts of the demo world.

    baco sweep --pair demo --task demo -r Rand:0.1 -r Rand:0.3 -r P-Punc:0.3 -n 6 --seed 7 --out RUN
    baco router train RUN --out router.json
    python -m benchmarks.adaptive --learned router.json --without RUN [--prompts 16] [--n 5]

Every family of routers has three settings, so that none gains by their number. Per prompt and
setting: quality (the world's judge) and diversity (different semantic keys over n). Coverage is the
area that a family's three points dominate, from (0, 0), not normalised; intervals are 95% bootstrap
intervals over prompts, and differences are to the first family, prompt by prompt. *Fresh* is the
share of tokens of the answers after the first that no earlier answer has, as ``distinct=`` counts
them.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from baco import Baco
from baco.demo.world.judge import judge
from baco.evaluation.pareto import coverage
from baco.evaluation.store import Run
from benchmarks import launch
from benchmarks.broken_grammar import held_out_questions

FAMILIES = {
    "P-Punc": ("P-Punc:0.15", "P-Punc:0.3", "P-Punc:0.7"),
    "Rand": ("Rand:0.05", "Rand:0.15", "Rand:0.4"),
    "P-Punc, share": ("P-Punc:share=0.05", "P-Punc:share=0.12", "P-Punc:share=0.25"),
    "P-Punc, siblings": (
        "P-Punc:0.05,siblings=1",
        "P-Punc:0.15,siblings=1",
        "P-Punc:0.3,siblings=1",
    ),
    "P-Punc, share over samples": (
        "P-Punc:share=0.05,over=samples",
        "P-Punc:share=0.12,over=samples",
        "P-Punc:share=0.25,over=samples",
    ),
    "P-Punc, distinct": ("P-Punc:distinct=0.3", "P-Punc:distinct=0.5", "P-Punc:distinct=0.7"),
    "P-Punc, distinct over samples": (
        "P-Punc:distinct=0.3,over=samples",
        "P-Punc:distinct=0.5,over=samples",
        "P-Punc:distinct=0.7,over=samples",
    ),
    "Learned": ("Learned:0.5,model={}", "Learned:0.3,model={}", "Learned:0.15,model={}"),
    "Learned-Punc": (
        "Learned-Punc:0.5,model={}",
        "Learned-Punc:0.3,model={}",
        "Learned-Punc:0.15,model={}",
    ),
}


def main() -> None:
    """Answer, score and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--learned", required=True, help="a file of baco router train")
    parser.add_argument("--without", required=True, help="the run that it was trained on")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=5, help="answers to each prompt")
    parser.add_argument("--only", action="append", help="a family; all by default. Repeatable")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seen = {prompt.text for prompt in Run.open(options.without).prompts().values()}
    held = [question for question in held_out_questions() if question.text not in seen]
    order = np.random.default_rng(0).permutation(len(held))[: options.prompts]
    questions = [held[index] for index in order]
    baco = Baco.load("demo")
    results: dict[str, list[dict[str, Any]]] = {}
    for family, spellings in FAMILIES.items():
        if options.only and family not in options.only:
            continue
        for spelling in spellings:
            answers = baco.generate_batch(
                [question.text for question in questions],
                router=spelling.format(options.learned),
                n=options.n,
                seed=options.seed,
            )
            judged = [
                [judge(question, answer.text) for answer in row]
                for question, row in zip(questions, answers, strict=True)
            ]
            sources = [source for row in answers for answer in row for source in answer.sources]
            point = {
                "router": spelling.replace(",model={}", ""),
                "base_share": sources.count("base") / len(sources),
                "fresh": [_fresh([answer.token_ids for answer in row]) for row in answers],
                "quality": [float(np.mean([j.quality for j in row])) for row in judged],
                "diversity": [len({j.key for j in row}) / options.n for row in judged],
            }
            results.setdefault(family, []).append(point)
    if options.json:
        print(json.dumps(results))
        return
    show(results)


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Print a line for each setting, and the Coverage of each family."""
    draws = None
    first = next(iter(results))
    for points in results.values():
        for point in points:
            draws = draws if draws is not None else _draws(len(point["quality"]))
            quality, diversity = np.array(point["quality"]), np.array(point["diversity"])
            fresh = np.array(point["fresh"])
            print(
                f"{point['router']:<33} base share {point['base_share']:.3f}  "
                f"fresh {_interval(fresh.mean(), fresh[draws].mean(1))}  "
                f"quality {_interval(quality.mean(), quality[draws].mean(1))}  "
                f"diversity {_interval(diversity.mean(), diversity[draws].mean(1))}"
            )
    assert draws is not None
    values = {family: _areas(points, draws) for family, points in results.items()}
    for family, (value, drawn) in values.items():
        other, other_drawn = values[first]
        line = f"{family:<33} Coverage {_interval(value, drawn)}"
        if family != first:
            line += f"  minus {first}: {_interval(value - other, drawn - other_drawn)}"
        print(line)


def fresh_tokens(answers: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each answer are fresh, as ``distinct=`` counts them; none of the first."""

    def ending(tokens: Sequence[int]) -> tuple[int, ...]:
        return (-1, -1, -1, *tokens)[-3:]

    counts = []
    for number, tokens in enumerate(answers):
        counts.append(0)
        for length in range(1, len(tokens) + 1) if number else ():
            earlier = {
                ending(other[:end]) for other in answers[:number] for end in range(length + 1)
            }
            counts[-1] += ending(tokens[:length]) not in earlier
    return counts


def _fresh(answers: Sequence[Sequence[int]]) -> float:
    """The mean share of fresh tokens of the answers after the first."""
    counts = zip(fresh_tokens(answers)[1:], answers[1:], strict=True)
    return float(np.mean([count / len(tokens) for count, tokens in counts]))


def _draws(prompts: int) -> Any:
    return np.random.default_rng(1).integers(0, prompts, (4000, prompts))


def _areas(points: Sequence[dict[str, Any]], draws: Any) -> tuple[float, Any]:
    """The Coverage of a family, and of each bootstrap draw."""
    columns = [[point[name] for point in points] for name in ("quality", "diversity")]
    plane = np.stack(columns, axis=-1)  # [points, prompts, 2]
    return float(coverage(plane.mean(1))), coverage(plane[:, draws].mean(2).swapaxes(0, 1))


def _interval(value: float, drawn: Any) -> str:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    launch(main)
