"""Structured answers: libraries of masks compared, and what a schema costs in decoding.

    python -m benchmarks.structured masks FOLDER...          # folders with a tokenizer.json
    python -m benchmarks.structured decoding --base B --aligned A

``masks`` follows one answer under one schema and reports, for each library that is installed, the
seconds that the vocabulary and the schema take once and the microseconds of a mask at each token.
``decoding`` reports tokens per second with the schema over those without it, at n = 8.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from baco import Baco
from baco.cli.options import quiet_libraries
from baco.sampling.structure import Structure

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 60},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "kind": {"enum": ["beach", "city", "mountain"]},
        "reasons": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["place", "days", "kind", "reasons"],
    "additionalProperties": False,
}
ANSWER = (
    '{"place": "Naxos in Greece", "days": 10, "kind": "beach", "reasons": ["The sea is warm and '
    'clear.", "The food is wonderful.", "There are few tourists in June."]}'
)
PROMPT = "Recommend a summer destination as JSON with place, days, kind and reasons."
Follow = Callable[[list[int]], list[float]]  # token ids → seconds of the mask at each


def llguidance(tokenizer: Any, size: int) -> tuple[float, float, Follow]:
    """As this project uses it."""
    from baco.sampling.constraint import StructureCompiler
    from baco.text.token_bytes import spell

    data = [b""] * size
    for token in spell(tokenizer):
        if not token.special:
            data[token.id] = token.data

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    compiler = StructureCompiler(data, [tokenizer.eos_token_id], [], encode)
    started = time.perf_counter()
    compiler.compile(Structure("regex", "a"))
    prepared = time.perf_counter()
    constraint = compiler.compile(Structure("schema", json.dumps(SCHEMA)))
    compiled = time.perf_counter()

    def follow(ids: list[int]) -> list[float]:
        automaton, seconds = constraint.begin(), list[float]()
        for length in range(len(ids)):
            before = time.perf_counter()
            automaton.masks(ids[:length], ())
            seconds.append(time.perf_counter() - before)
        return seconds

    return prepared - started, compiled - prepared, follow


def xgrammar(tokenizer: Any, size: int) -> tuple[float, float, Follow]:
    """https://github.com/mlc-ai/xgrammar"""
    import xgrammar as xgr

    started = time.perf_counter()
    compiler = xgr.GrammarCompiler(
        xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size), max_threads=1
    )
    prepared = time.perf_counter()
    grammar = compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)
    compiled = time.perf_counter()

    def follow(ids: list[int]) -> list[float]:
        matcher, seconds = xgr.GrammarMatcher(grammar), list[float]()
        mask = xgr.allocate_token_bitmask(1, size)
        for token in ids:
            before = time.perf_counter()
            matcher.fill_next_token_bitmask(mask)
            matcher.accept_token(token)
            seconds.append(time.perf_counter() - before)
        return seconds

    return prepared - started, compiled - prepared, follow


def outlines_core(tokenizer: Any, size: int) -> tuple[float, float, Follow]:
    """https://github.com/dottxt-ai/outlines-core"""
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    from baco.text.token_bytes import spell

    started = time.perf_counter()
    tokens: dict[bytes, list[int]] = {}
    for token in spell(tokenizer):
        if not token.special and token.data and token.id < size:
            tokens.setdefault(token.data, []).append(token.id)
    vocabulary = Vocabulary(tokenizer.eos_token_id, tokens)
    prepared = time.perf_counter()
    index = Index(build_regex_from_schema(json.dumps(SCHEMA), " ?"), vocabulary)
    compiled = time.perf_counter()

    def follow(ids: list[int]) -> list[float]:
        guide, seconds = Guide(index), list[float]()
        for token in ids:
            before = time.perf_counter()
            guide.get_tokens()
            guide.advance(token)
            seconds.append(time.perf_counter() - before)
        return seconds

    return prepared - started, compiled - prepared, follow


def masks(folders: list[str]) -> None:
    """Compare the libraries on tokenizers."""
    from transformers import AutoTokenizer

    print(f"{'library':14} {'vocabulary':>10} {'prepare':>9} {'compile':>9} {'mask':>9} {'p99':>9}")
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        size = max(tokenizer.get_vocab().values()) + 1
        ids = tokenizer.encode(ANSWER, add_special_tokens=False)
        for library in (llguidance, xgrammar, outlines_core):
            try:
                prepare, compile_, follow = library(tokenizer, size)
            except ImportError:
                print(f"{library.__name__:14} {size:10,} not installed")
                continue
            times = np.array([second for _ in range(20) for second in follow(ids)]) * 1e6
            mean, worst = times.mean(), np.quantile(times, 0.99)
            print(
                f"{library.__name__:14} {size:10,} {prepare:7.2f} s {compile_:7.3f} s "
                f"{mean:6.0f} µs {worst:6.0f} µs",
                flush=True,
            )


def decoding(base: str, aligned: str, rounds: int) -> None:
    """Tokens per second with and without the schema, in turn."""
    pair = Baco.load(base=base, aligned=aligned)
    structure: dict[str, Any] = {"schema": SCHEMA}
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "n": 8, "max_tokens": 96}
    pair.generate(PROMPT, seed=0, **settings)
    started = time.perf_counter()
    pair.generate(PROMPT, seed=0, **settings, **structure)
    print(f"first structured request: {time.perf_counter() - started:.1f} s")
    speeds: dict[str, list[float]] = {"free": [], "schema": []}
    for seed in range(1, rounds + 1):
        for name, more in {"free": dict[str, Any](), "schema": structure}.items():
            started = time.perf_counter()
            answers = pair.generate(PROMPT, seed=seed, **settings, **more)
            tokens = sum(len(answer.token_ids) for answer in answers)
            speeds[name].append(tokens / (time.perf_counter() - started))
    ratios = [ours / free for ours, free in zip(speeds["schema"], speeds["free"], strict=True)]
    for name, values in speeds.items():
        print(f"{name}: {statistics.median(values):.1f} tokens/s")
    print(f"schema / free: {statistics.median(ratios):.2f} (median of {rounds})")


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured")
    parts = parser.add_subparsers(dest="part", required=True)
    of_masks = parts.add_parser("masks", help="compare libraries of masks")
    of_masks.add_argument("folders", nargs="+", help="folders with a tokenizer.json")
    of_decoding = parts.add_parser("decoding", help="the cost of a schema in decoding")
    of_decoding.add_argument("--base", required=True)
    of_decoding.add_argument("--aligned", required=True)
    of_decoding.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    quiet_libraries()
    if given.part == "masks":
        masks(given.folders)
    else:
        decoding(given.base, given.aligned, given.rounds)


if __name__ == "__main__":
    main()
