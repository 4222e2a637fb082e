"""Tokens that vLLM draws at temperature 1 follow the rows' distribution."""

from collections import Counter
from typing import Any

from scipy.stats import chi2_contingency

from baco import Baco
from tests_vllm.engines import in_vllm

PROMPT = "Recommend a summer destination"
DRAWS = 1500


ROUTERS = ("P-Punc:0.4", "Rand:0.5")


def openings(baco: Baco, seed: int) -> list[Counter[tuple[int, ...]]]:
    """How often each answer of three tokens was drawn, by each router."""
    settings: dict[str, Any] = {"seed": seed, "max_tokens": 3, "min_p": 0.0, "temperature": 1.0}
    return [
        Counter(a.token_ids for a in baco.generate(PROMPT, router=router, n=DRAWS, **settings))
        for router in ROUTERS
    ]


def test_first_tokens_are_distributed_as_in_this_process() -> None:
    there = in_vllm(openings, "demo", {"max_rows": 128}, 1)
    here = openings(Baco.load("demo"), 2)
    for mine, expected in zip(there, here, strict=True):
        table = _table(mine, expected)
        assert len(table[0]) > 5
        assert chi2_contingency(table).pvalue > 0.001


def _table(mine: Counter[tuple[int, ...]], expected: Counter[tuple[int, ...]]) -> list[list[int]]:
    """Counts of the answers that were drawn often enough, and of the rest together."""
    often = [tokens for tokens in mine | expected if mine[tokens] + expected[tokens] >= 20]
    rows = [[counts[tokens] for tokens in often] for counts in (mine, expected)]
    return [[*row, DRAWS - sum(row) + 1] for row in rows]
