"""What `baco diagnose --frontier` says under several judges of quality, also of an unfinished run.

    python -m benchmarks.frontier_judges RUN

The run has been scored (`baco score RUN`). Relevance is added as a further judge: the mean cosine
of prompt and answer by all-MiniLM-L6-v2, a model that no pair contains, and a crude measure.
Settings without answers to all prompts are left out. For each judge: the lead of the best router,
chosen on one half of the prompts and tested on the other, and every setting.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from baco.cli.score import measure
from baco.evaluation import frontier
from baco.evaluation.metrics import register_metric
from baco.evaluation.metrics.embedding import Embedder
from baco.evaluation.metrics.protocols import Answers, Prompts
from baco.evaluation.records import Setting
from baco.evaluation.report.load_scores import TaskScores, load_scores
from baco.evaluation.store import Run

DIVERSITY = ("distinct_2", "embedding_distance")


@register_metric("relevance", kind="quality", models=("embedding",))
def relevance(embedder: Embedder, prompts: Prompts, answers: Answers) -> list[float]:
    """Mean cosine of a prompt and its answers.

    Range −1 to 1; higher is better. Cost: the embeddings.
    """
    return [
        float((embedder.embed(list(row)) @ embedder.embed([prompt.text])[0]).mean())
        for prompt, row in zip(prompts, answers, strict=True)
    ]


def show(scores: TaskScores, settings: Sequence[Setting], samples: int, quality: str) -> None:
    """Print what one judge says."""
    metrics = {name: scores.measured.metrics[name] for name in (*DIVERSITY, quality)}
    result = frontier.read(
        replace(scores, measured=replace(scores.measured, metrics=metrics)), settings, samples
    )
    lead = result.lead
    print(
        f"\n{quality}: {' and '.join(dict.fromkeys(result.chosen))}, lead {lead.difference:+.3f} "
        f"[{lead.low:+.3f}, {lead.high:+.3f}], p {lead.p_value:.2g}; {result.advice}"
    )
    for point in result.points:
        figures = "  ".join(f"{value:7.3f}" for value in point.figures.values())
        share = "" if point.base_share is None else f"{point.base_share:.2f}"
        own = point.lead
        shown = "" if own is None else f"{own.value:+.3f} [{own.low:+.3f}, {own.high:+.3f}]"
        print(f"{point.setting:26} {figures}  {share:4}  {shown}")


def main() -> None:
    """Score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    run = Run.open(parser.parse_args().run)
    measure(run, ["relevance"], {}, 1)
    (scores,) = load_scores(run)
    configured = run.config["settings"]
    settings = [Setting(**one) for one in configured if one["label"] in scores.measured.settings]
    sizes = {len(group.samples) for group in run.groups()}
    print(f"{len(settings)} of {len(configured)} settings, {len(scores.measured.prompts)} prompts")
    for quality in ("relevance", "perplexity"):
        if quality in scores.measured.metrics:
            show(scores, settings, max(sizes), quality)


if __name__ == "__main__":
    main()
