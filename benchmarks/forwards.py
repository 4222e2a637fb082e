"""The cost of a forward of one model, by the number of rows and tokens that it reads.

    python -m benchmarks.forwards [--body SIZE | PAIR] [--dtype D] [--columns C] [--compile]

The aligned model reads tokens of several rows, each behind C cached tokens: with the engine's
layout of weights and forward, and with `transformers`' own forward over a cache of its own. Each
figure is the best of several runs, in milliseconds. Drafts pay where a forward over several tokens
costs little more than one over a single token.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from baco.bench.measure import load, machine
from baco.kv_cache.protocol import finish
from baco.models.model import PairModel
from benchmarks import launch
from benchmarks.bodies import add_pair, named_pair

SHAPES = ((1, 1), (1, 2), (1, 4), (1, 8), (8, 1), (8, 2), (8, 4), (32, 1), (32, 2))
RUNS = 7


def best(run: Callable[[], Any], before: Callable[[], Any], device: torch.device) -> float:
    """Least milliseconds of a run, each after ``before``, which is not timed."""
    times = []
    for _ in range(RUNS + 1):  # the first one warms up
        before()
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(1000 * (time.perf_counter() - started))
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def engine_milliseconds(model: PairModel, rows: int, tokens: int, columns: int) -> float:
    """The engine's forward."""
    store = model.new_cache()
    store.copy_prefix(finish(store.prefill([5] * columns)), rows)
    read = torch.full((rows, tokens), 7)
    return best(
        lambda: store.extend(read, [tokens] * rows, tokens),
        lambda: store.roll_back([columns] * rows),
        model.device,
    )


def transformers_milliseconds(model: PairModel, rows: int, tokens: int, columns: int) -> float:
    """The forward of ``transformers``."""
    cache = DynamicCache()
    model.run(input_ids=torch.full((rows, columns), 5, device=model.device), past_key_values=cache)
    read = torch.full((rows, tokens), 7, device=model.device)
    return best(
        lambda: model.run(input_ids=read, past_key_values=cache, use_cache=True),
        lambda: cache.crop(columns - cache.get_seq_length() or -0),
        model.device,
    )


@torch.inference_mode()
def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_pair(parser)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    known = named_pair(given)
    weights = load(known, given.dtype, given.device, compile=given.compile)
    model, plain = weights.ours.aligned, weights.plain.aligned
    table = [
        {
            "rows": rows,
            "tokens": tokens,
            "engine": engine_milliseconds(model, rows, tokens, given.columns),
            "transformers": transformers_milliseconds(plain, rows, tokens, given.columns),
        }
        for rows, tokens in SHAPES
    ]
    report = {
        "pair": known.name,
        "held": model.weights_format,
        "compiled": given.compile,
        "machine": machine(model.device),
        "milliseconds": table,
    }
    if given.json:
        print(json.dumps(report))
        return
    print(f"{known.name}, {model.weights_format}, {torch.get_num_threads()} threads, ms a forward")
    print(f"{'rows × tokens':>14}{'engine':>9}{'transformers':>14}")
    for row in table:
        name = f"{row['rows']} × {row['tokens']}"
        print(f"{name:>14}{row['engine']:9.2f}{row['transformers']:14.2f}")


if __name__ == "__main__":
    launch(main)
