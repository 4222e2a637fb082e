"""How often a long prompt is read for its many answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baco.bench.contestants import Task
from baco.engine.engine import Engine
from baco.engine.sequence import Request
from baco.kv_cache.protocol import KVCache
from baco.models.pair import Pair

TOKENS, ANSWERS = 2_000, 32
_SAID = 4


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A long prompt and its answers.

    Attributes:
        tokens: of the prompt; fewer than TOKENS where a context window ends.
        n: answers drawn.
        reads: how often each half read the prompt.
        first_token_seconds: until every answer had its first token.
    """

    tokens: int
    n: int
    reads: dict[str, int]
    first_token_seconds: float


def long_prompt(pair: Pair, task: Task) -> LongPrompt:
    """Draw many answers to a long prompt, and count how often it was read."""
    window = min(pair.base.context, pair.aligned.context)
    length = min(TOKENS, window - _SAID)
    base, aligned = (_stretched(i, length) for i in (task.prompt.base_ids, task.prompt.aligned_ids))
    params = task.of(ANSWERS, _SAID).params
    engine = Engine(pair, max_rows=ANSWERS)
    counted = {half: _counting(store) for half, store in engine.stats.caches.items()}
    started = time.perf_counter()
    engine.add(Request(base, aligned, params, task.router, digest=task.prompt.digest))
    engine.step()
    first = time.perf_counter() - started
    while engine.busy:
        engine.step()
    return LongPrompt(length, ANSWERS, {half: len(c) for half, c in counted.items()}, first)


def _counting(store: KVCache) -> list[int]:
    """The lengths of the prompts that a store reads from now on."""
    prefill: Any = store.prefill
    lengths = list[int]()

    def counted(ids: Sequence[int], samples: int = 1) -> Any:
        lengths.append(len(ids))
        return prefill(ids, samples)

    store.prefill = counted  # type: ignore[method-assign]
    return lengths


def _stretched(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The ids again and again, up to ``length``."""
    return (ids * (length // len(ids) + 1))[:length]
