"""Whether a router pays by several judges of quality, from the answers of one small sweep.

    baco diagnose --frontier … --out RUN
    python -m benchmarks.judges RUN [--reference ID_OR_FOLDER …] [--json]

What judges quality may decide whether a router pays. This reads the answers of a run again, with
each of these judges in turn:

- ``relevance``: cosine similarity of prompt and answer in a sentence-embedding model, which has no
  part in the pair;
- ``well_formed``: the share of answers that keep a few rules of written text (`well_formed`);
- for every ``--reference``, log-likelihood per token under that model, in nats.

Diversity is that of the run: distinct_2 and embedding_distance. For each judge: the best router
chosen on one half of the prompts, its lead on the other half with a 95% interval, and the figures
of the aligned model's settings and of each router's best.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.frontier import Frontier, Point, read
from baco.evaluation.metrics.embedding import embedder
from baco.evaluation.metrics.quality import perplexity
from baco.evaluation.metrics.reference import reference_model
from baco.evaluation.records import Group
from baco.evaluation.report.load_scores import TaskScores, load_scores
from baco.evaluation.store import Run
from benchmarks import launch

DIVERSITY = ("distinct_2", "embedding_distance")
# Fewer words are no answer to a question for an essay, a story or a reason.
_FEWEST_WORDS = 3
# Words in a row that come back more often are a loop.
_GRAM, _MOST_REPEATS = 4, 2
# Answers carry marks of the training data where base models run on.
_MARKUP = re.compile(r"</?\w+>|https?://|\[\w+\]|Question:|Answer:|```|\\\w+{")
_ENGLISH = re.compile(r"[\w\s.,;:!?'\"“”‘’()\[\]*#%$&/+=–—…•-]+", re.ASCII)

Judge = Callable[[Sequence[Group]], list[float | None]]


def main() -> None:
    """Judge a run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="folder of 'baco diagnose --frontier --out'")
    parser.add_argument("--reference", action="append", default=[], help="hub id or folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    judges: dict[str, Judge] = {"relevance": _relevance, "well_formed": _well_formed}
    for name in options.reference:
        judges[f"log-likelihood under {name}"] = _likelihood(name)
    results = judged(Run.open(options.run), judges)
    if options.json:
        print(json.dumps({name: asdict(result) for name, result in results.items()}, indent=1))
        return
    for name, result in results.items():
        print("\n".join(_lines(name, result)), end="\n\n")


def judged(run: Run, judges: dict[str, Judge]) -> dict[str, Frontier]:
    """What a run says by each judge of quality.

    Args:
        run: of ``baco diagnose --frontier``, one task on one pair.
        judges: by name; each takes all samples of some prompts and returns a figure per prompt.
    """
    (scores,) = load_scores(run)
    groups = {(group.method, group.setting, group.prompt.id): group for group in run.groups()}
    places = [
        [groups[method, setting, prompt] for prompt in scores.measured.prompts]
        for method, setting in scores.keys
    ]
    diversity = {name: scores.measured.metrics[name] for name in DIVERSITY}
    results = {}
    for name, judge in judges.items():
        figures = iter(judge([group for row in places for group in row]))
        quality = np.array([[_number(next(figures)) for _ in row] for row in places])
        results[name] = read(_with(scores, diversity, quality), run.settings, run.config["n"])
    return results


def _with(
    scores: TaskScores, diversity: dict[str, NDArray[np.float64]], quality: NDArray[np.float64]
) -> TaskScores:
    """The scores with one metric of quality, under the name of a registered one."""
    return replace(
        scores, measured=replace(scores.measured, metrics={**diversity, "reward": quality})
    )


def _number(figure: float | None) -> float:
    return np.nan if figure is None else figure


def _relevance(groups: Sequence[Group]) -> list[float | None]:
    """Mean cosine similarity of the prompt and each answer."""
    model = embedder()
    prompts = model.embed([group.prompt.messages[-1]["content"] for group in groups])
    answers = [model.embed(group.texts) for group in groups]
    return [float(np.mean(rows @ own)) for own, rows in zip(prompts, answers, strict=True)]


def _well_formed(groups: Sequence[Group]) -> list[float | None]:
    return [float(np.mean([well_formed(text) for text in group.texts])) for group in groups]


def well_formed(text: str) -> bool:
    """Has an answer words enough, no loop, no markup, no foreign letters, and the beginning of a
    sentence or a list?
    """
    words = text.split()
    grams = Counter(zip(*(words[start:] for start in range(_GRAM)), strict=False))
    begins = text.lstrip("\"'“*#-•(). ")[:1]
    return (
        len(words) >= _FEWEST_WORDS
        and max(grams.values(), default=0) <= _MOST_REPEATS
        and (begins.isupper() or begins.isdigit())
        and _MARKUP.search(text) is None
        and _ENGLISH.fullmatch(text) is not None
    )


def _likelihood(name: str) -> Judge:
    def judge(groups: Sequence[Group]) -> list[float | None]:
        prompts = [group.prompt for group in groups]
        return perplexity(reference_model(name), prompts, [group.texts for group in groups])

    return judge


def _lines(name: str, result: Frontier) -> list[str]:
    lead = result.lead
    lines = [
        f"## {name}: {result.verdict} ({result.outcome})",
        f"best router on one half, tested on the other: "
        f"{' and '.join(dict.fromkeys(result.chosen))}, "
        f"lead {lead.difference:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}], p {lead.p_value:.2g}",
        f"best on all prompts: {result.router}; aligned with the best balance: {result.aligned}",
        "",
        "| setting | distinct_2 | embedding_distance | quality | base share | lead |",
        "|---|---|---|---|---|---|",
    ]
    best: dict[str, Point] = {}
    for point in result.points:
        if point.lead is not None:
            current = best.get(point.method)
            if current is None or current.lead is None or point.lead.value > current.lead.value:
                best[point.method] = point
    for point in result.points:
        if point.lead is not None and best[point.method] is not point:
            continue
        figures = (point.figures[key] for key in (*DIVERSITY, "reward"))
        row = [f"{figure:.2f}" for figure in figures]
        row.append("" if point.base_share is None else f"{point.base_share:.2f}")
        shown = point.lead
        row.append(
            "" if shown is None else f"{shown.value:+.2f} [{shown.low:+.2f}, {shown.high:+.2f}]"
        )
        lines.append(f"| {point.setting} | {' | '.join(row)} |")
    return lines


if __name__ == "__main__":
    launch(main)
