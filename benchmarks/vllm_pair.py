"""A pair inside vLLM against the same vLLM with one model and against BACo's own engine.

    python -m benchmarks.vllm_pair [--pair NAME] [--tokens N] [--batch N …] [--rounds N] [--json]

Every contestant is a process of its own, one after another. In each, every batch size is timed
``rounds`` times after one that does not count, and the best is reported, in tokens per second of
all answers together. Answers end by themselves, or after ``tokens`` tokens.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks import launch

PROMPT = "Recommend a summer destination"
ROUTER = "P-Punc:0.4"
Timed = dict[int, float]


def _best(draw: Callable[[int, int], int], batches: list[int], rounds: int) -> Timed:
    """Tokens per second by batch size; ``draw(answers, seed)`` returns how many tokens it drew."""
    speeds = {}
    for batch in batches:
        rates = []
        for seed in range(rounds + 1):
            started = time.perf_counter()
            tokens = draw(batch, seed)
            rates.append(tokens / (time.perf_counter() - started))
        speeds[batch] = max(rates[1:])
    return speeds


def pair_in_vllm(pair: str, tokens: int, batches: list[int], rounds: int) -> Timed:
    """Both models in one engine."""
    return _baco(pair, tokens, batches, rounds, backend="vllm")


def local(pair: str, tokens: int, batches: list[int], rounds: int) -> Timed:
    """BACo's own engine, its speculation on."""
    return _baco(pair, tokens, batches, rounds)


def _baco(pair: str, tokens: int, batches: list[int], rounds: int, **options: Any) -> Timed:
    from baco import Baco

    baco = Baco.load(pair, **options)

    def draw(answers: int, seed: int) -> int:
        completions = baco.generate(PROMPT, router=ROUTER, n=answers, seed=seed, max_tokens=tokens)
        return sum(len(answer.token_ids) for answer in completions)

    try:
        return _best(draw, batches, rounds)
    finally:
        baco.close()


def aligned_in_vllm(pair: str, tokens: int, batches: list[int], rounds: int) -> Timed:
    """The aligned model alone, as vLLM runs any model; eager and in one process, as the pair."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    from vllm import LLM, SamplingParams, TokensPrompt

    from baco.models.known_pairs import find_pair
    from baco.models.weightless import load_weightless_pair
    from baco.source import MODELS

    known = find_pair(pair)
    described = load_weightless_pair(known, dict.fromkeys(MODELS, "vLLM"))
    ids = list(described.renderer.render(PROMPT).aligned_ids)
    llm = LLM(
        known.aligned,
        dtype=known.dtype or "auto",
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,
    )

    def draw(answers: int, seed: int) -> int:
        params = [
            SamplingParams(
                min_p=described.defaults.min_p,
                seed=seed * 1000 + each,
                max_tokens=tokens,
                logprobs=0,
                detokenize=False,
                stop_token_ids=sorted(described.end_ids),
            )
            for each in range(answers)
        ]
        prompts = [TokensPrompt(prompt_token_ids=ids)] * answers
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in outputs)

    return _best(draw, batches, rounds)


def main() -> None:
    """Time every contestant and print the speeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    speeds: dict[str, Timed] = {}
    for run in (pair_in_vllm, aligned_in_vllm, local):
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            done = pool.submit(
                run, arguments.pair, arguments.tokens, arguments.batch, arguments.rounds
            )
            speeds[run.__name__] = done.result()
    if arguments.json:
        print(json.dumps({"machine": platform.processor(), **vars(arguments), "speeds": speeds}))
        return
    print(table(speeds, arguments.batch))


def table(speeds: dict[str, Timed], batches: list[int]) -> str:
    """The speeds by contestant and batch size, and those of the pair over one model's in vLLM."""
    lines = [f"{'tokens a second, batch':24}" + "".join(f"{batch:>10}" for batch in batches)]
    for name, row in speeds.items():
        lines.append(f"{name.replace('_', ' '):24}" + "".join(f"{row[b]:10.0f}" for b in batches))
    both, single = speeds[pair_in_vllm.__name__], speeds[aligned_in_vllm.__name__]
    shares = "".join(f"{both[batch] / single[batch]:10.2f}" for batch in batches)
    return "\n".join([*lines, f"{'pair / one model':24}{shares}"])


if __name__ == "__main__":
    launch(main)
