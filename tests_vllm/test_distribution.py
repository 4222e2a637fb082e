"""What vLLM draws at temperature 1 is distributed as the rows say."""

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


def test_first_tokens_are_distributed_as_here() -> None:
    there = in_vllm(openings, "demo", {"max_rows": 128}, 1)
    here = openings(Baco.load("demo"), 2)
    for mine, theirs in zip(there, here, strict=True):
        table = _table(mine, theirs)
        assert len(table[0]) > 5
        assert chi2_contingency(table).pvalue > 0.001


def _table(mine: Counter[tuple[int, ...]], theirs: Counter[tuple[int, ...]]) -> list[list[int]]:
    """Counts of what was drawn often enough, and of the rest together."""
    often = [said for said in mine | theirs if mine[said] + theirs[said] >= 20]
    rows = [[counts[said] for said in often] for counts in (mine, theirs)]
    return [[*row, DRAWS - sum(row) + 1] for row in rows]
