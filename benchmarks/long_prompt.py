"""How often each model reads a long prompt for its many answers.

python -m benchmarks.long_prompt [PAIR | --body SIZE] [--json]
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baco.bench.contestants import Task
from baco.bench.measure import machine, prompts_for, repeated_tasks
from baco.engine.engine import Engine
from baco.engine.sequence import Request
from baco.kv_cache.protocol import KVCache
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router as parse
from benchmarks import launch
from benchmarks.bodies import add_pair, named_pair

TOKENS, ANSWERS = 2_000, 32
_ANSWER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A long prompt and its answers.

    Attributes:
        tokens: of the prompt; fewer than TOKENS where a context window ends.
        n: answers drawn.
        reads: how often each model read the prompt.
        first_token_seconds: until every answer had its first token.
    """

    tokens: int
    n: int
    reads: dict[str, int]
    first_token_seconds: float


def long_prompt(pair: Pair, task: Task) -> LongPrompt:
    """Draw many answers to a long prompt, and count how often it was read."""
    window = min(pair.base.context, pair.aligned.context)
    length = min(TOKENS, window - _ANSWER_TOKENS)
    base, aligned = (_stretched(i, length) for i in (task.prompt.base_ids, task.prompt.aligned_ids))
    params = task.of(ANSWERS, _ANSWER_TOKENS).params
    engine = Engine(pair, max_rows=ANSWERS)
    counted = {source: _counting(store) for source, store in engine.stats.caches.items()}
    started = time.perf_counter()
    engine.add(Request(base, aligned, params, task.router, digest=task.prompt.digest))
    engine.step()
    first = time.perf_counter() - started
    while engine.busy:
        engine.step()
    return LongPrompt(
        length, ANSWERS, {source: len(lengths) for source, lengths in counted.items()}, first
    )


def _counting(store: KVCache) -> list[int]:
    """The lengths of the prompts that a store reads from now on; grows with every read."""
    prefill: Any = store.prefill
    lengths = list[int]()

    def counted(ids: Sequence[int], samples: int = 1, *, begun: Any = None) -> Any:
        lengths.append(len(ids))
        return prefill(ids, samples, begun=begun)

    store.prefill = counted  # type: ignore[method-assign]
    return lengths


def _stretched(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The ids repeated up to ``length``."""
    return (ids * (length // len(ids) + 1))[:length]


def main() -> None:
    """Decode, count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_pair(parser)
    parser.add_argument("--router", default="P-Punc:0.4")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    known = named_pair(given)
    pair = load_pair(known, dtype=given.dtype, device=given.device)
    prompts = prompts_for(known)
    (task,) = repeated_tasks(pair, prompts, parse(given.router), _ANSWER_TOKENS, repeats=1)
    result = long_prompt(pair, task)
    if given.json:
        print(json.dumps(asdict(result) | {"machine": machine(pair.aligned.device)}))
        return
    reads = " and ".join(f"{times} × by {source}" for source, times in result.reads.items())
    print(
        f"a prompt of {result.tokens} tokens for n = {result.n} is read {reads}; "
        f"first tokens after {1000 * result.first_token_seconds:.0f} ms"
    )


if __name__ == "__main__":
    launch(main)
