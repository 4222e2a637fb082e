"""In bfloat16, answers differ from plain decoding's only where rounding makes two tokens equal."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from baco import Baco
from baco.engine.engine import Engine
from benchmarks import divergence
from benchmarks.divergence import compare
from tests.pairs import PairFolder

PROMPTS = [
    "What do you recommend for a rainy day?",
    "Plan a walk.",
    "Tell me a story.",
    "Name a gift.",
]
SAMPLING: dict[str, Any] = {"n": 12, "seed": 3, "max_tokens": 40}


@pytest.fixture(scope="module")
def pairs(random_pair: Callable[..., PairFolder]) -> tuple[Baco, Baco]:
    """A pair in bfloat16, and the same numbers in float32."""
    folder = random_pair("llama", noise=0.1)
    where: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    exact = Baco.load(**where, dtype="bfloat16", packed=False)
    for model in (exact.pair.base, exact.pair.aligned):
        model.model.float()
    return Baco.load(**where, dtype="bfloat16"), exact


def test_every_difference_is_a_tie(pairs: tuple[Baco, Baco]) -> None:
    rough, exact = pairs
    differences = []
    for router in ("P-Punc:0.6", "Rand:0.5", "H:1.5"):
        report = compare(rough.pair, exact.pair, PROMPTS, rough.router(router), **SAMPLING)
        assert report.samples == 12 * len(PROMPTS)
        assert report.tokens > 300
        assert report.off["fast"] < 1.5 * report.off["plain"]
        differences += report.differences
    assert differences  # bfloat16 does round
    assert [difference for difference in differences if not difference.tie] == []


def test_every_difference_from_the_forward_of_transformers_is_a_tie(
    random_pair: Callable[..., PairFolder], pairs: tuple[Baco, Baco]
) -> None:
    rough, exact = pairs
    folder = random_pair("llama", noise=0.1)
    where: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    unpacked = Baco.load(**where, dtype="bfloat16", packed=False).pair
    router = rough.router("P-Punc:0.6")
    report = compare(rough.pair, exact.pair, PROMPTS, router, unpacked=unpacked, **SAMPLING)
    assert report.differences
    assert [difference for difference in report.differences if not difference.tie] == []
    alone = compare(rough.pair, exact.pair, PROMPTS, router, **SAMPLING)
    assert report.rounding != alone.rounding  # the logits were computed differently


def test_in_float32_answers_do_not_differ(pairs: tuple[Baco, Baco]) -> None:
    _, exact = pairs
    report = compare(exact.pair, exact.pair, PROMPTS, exact.router("P-Punc:0.6"), **SAMPLING)
    assert report.differences == []
    assert report.rounding == {"base": 0.0, "aligned": 0.0}


def test_an_error_that_is_not_rounding_is_not_a_tie(
    pairs: tuple[Baco, Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    rough, exact = pairs

    class SwappedEngine(Engine):
        """Reads with the two models swapped."""

        def __init__(self, pair: Any, **options: Any) -> None:
            swapped = replace(pair, base=pair.aligned, aligned=pair.base)
            super().__init__(swapped if options == {} else pair, **options)

    monkeypatch.setattr(divergence, "Engine", SwappedEngine)
    report = compare(rough.pair, exact.pair, PROMPTS, rough.router("H:1.5"), **SAMPLING)
    assert report.ties < 0.5 * len(report.differences)
    assert report.off["fast"] > 3 * report.off["plain"]
