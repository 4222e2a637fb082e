"""Calibration: the base share and diversity of a router over its range of γ, on some prompts."""

import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from baco.api import Baco
from baco.calibration.store import Curve, isotonic
from baco.errors import BacoError
from baco.outputs import Completion, check_whole
from baco.routing.parser import logit_rule_of
from baco.routing.parser import router as parse
from baco.routing.two_vocabularies import check_router
from baco.text.segmentation import distinct


def open_prompts() -> list[str]:
    """Two dozen open-ended prompts in English, for calibration and diagnosis."""
    text = resources.files("baco").joinpath("text", "word_lists", "open_prompts.txt")
    return text.read_text(encoding="utf-8").splitlines()


def calibrate(
    baco: Baco,
    router: str,
    prompts: Sequence[Any],
    *,
    samples: int = 8,
    seed: int = 0,
    max_tokens: int = 64,
    advance: Callable[[], None] = lambda: None,
) -> Curve:
    """Measure a router over its range of γ.

    Args:
        baco: the pair.
        router: a spelling without a threshold, such as ``P-Punc``.
        prompts: what to answer; a few dozen open-ended ones.
        samples: answers per prompt and threshold, at least 2.
        seed, max_tokens: of the answers.
        advance: called after each threshold.

    Raises:
        BacoError: a router without a threshold, too few samples, no prompts.
    """
    grid = grid_of(router)
    if samples < 2:
        raise BacoError(f"samples is {samples}: diversity needs at least 2 answers to a prompt")
    if not prompts:
        raise BacoError("no prompts to calibrate on: give at least one")
    if baco.pair.own_vocabularies is not None:
        check_router(parse(router, grid[0]))

    def measured(spelling: Any) -> tuple[float, float]:
        answers = baco.generate_batch(
            prompts, router=spelling, n=samples, seed=seed, max_tokens=max_tokens
        )
        check_whole([completion for samples in answers for completion in samples])
        advance()
        return _base_share(answers), _mean_distinct_2(answers)

    _, aligned = measured(parse("Aligned"))
    points = [measured(parse(router, gamma)) for gamma in grid]
    shares, diversities = zip(*points, strict=True)
    return Curve(
        grid, isotonic(shares), isotonic(diversities), aligned, len(prompts), samples, seed
    )


def grid_of(router: str) -> tuple[float, ...]:
    """The thresholds that calibration measures a router at, the lowest base share first.

    Raises:
        BacoError: a router that has no threshold, or whose rule names no grid.
    """
    rule = logit_rule_of(router)
    if ":" in router or rule is None or not rule.threshold:
        raise BacoError(
            f"router {router!r} cannot be calibrated: give one that takes a threshold, without it, "
            "such as P-Punc"
        )
    if not rule.grid:
        raise BacoError(
            f"router {router!r} cannot be calibrated: its rule {rule.name} names no thresholds to "
            "measure at; give it a grid, as in register_router(…, grid=(0, 0.25, 0.5, 0.75, 1))"
        )
    return rule.grid


def _base_share(answers: Sequence[Sequence[Completion]]) -> float:
    sources = [source for samples in answers for c in samples for source in c.sources]
    return sources.count("base") / len(sources)


def _mean_distinct_2(answers: Sequence[Sequence[Completion]]) -> float:
    return math.fsum(distinct([c.text for c in samples], 2) for samples in answers) / len(answers)
