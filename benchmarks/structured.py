"""Structured answers: libraries of masks compared, and what a schema costs in decoding.

    python -m benchmarks.structured masks FOLDER...          # folders with a tokenizer.json
    python -m benchmarks.structured compiling FOLDER...
    python -m benchmarks.structured decoding --base B --aligned A

``masks`` follows one answer under one schema and reports, for each library that is installed, the
seconds that the vocabulary and the schema take once and the microseconds of a mask at each token.
``compiling`` reports how long the first and the second use of a schema of hundreds of properties
take. ``decoding`` reports tokens per second with the schema over those without it, at n = 8, and
what drafts of forced tokens save: seconds and forwards, for the same tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

from baco import Baco
from baco.cli.options import quiet_libraries
from baco.engine.speculative.proposer import Proposer
from baco.sampling.structure import Structure
from benchmarks import launch

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


def large_schema(groups: int = 20, fields: int = 19) -> dict[str, Any]:
    """A schema of ``groups`` · (``fields`` + 1) properties in nested objects."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 1000},
        {"enum": ["low", "middle", "high"]},
        {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    ]

    def of_object(properties: dict[str, Any]) -> dict[str, Any]:
        closed = {"required": list(properties), "additionalProperties": False}
        return {"type": "object", "properties": properties, **closed}

    return of_object(
        {
            f"group_{group}": of_object(
                {f"field_{group}_{at}": kinds[(group + at) % 4] for at in range(fields)}
            )
            for group in range(groups)
        }
    )


def compiling(folders: list[str]) -> None:
    """Seconds to compile a large schema when it is first used, and when it is used again."""
    from transformers import AutoTokenizer

    from baco.sampling.constraint import StructureCompiler
    from baco.text.token_bytes import spell

    schemas = {"small": json.dumps(SCHEMA), "large": json.dumps(large_schema())}
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        data = [b""] * (max(tokenizer.get_vocab().values()) + 1)
        for token in spell(tokenizer):
            if not token.special:
                data[token.id] = token.data
        encode = partial(tokenizer.encode, add_special_tokens=False)
        compiler = StructureCompiler(data, [tokenizer.eos_token_id], [], encode)
        compiler.compile(Structure("regex", "a"))  # which prepares the vocabulary
        for name, text in schemas.items():
            started = time.perf_counter()
            compiler.compile(Structure("schema", text))
            first = time.perf_counter()
            compiler.compile(Structure("schema", text))
            again = time.perf_counter() - first
            print(
                f"{len(data):,} tokens, {name} schema of {len(text):,} characters: "
                f"first use {first - started:.3f} s, second use {again * 1e6:.0f} µs",
                flush=True,
            )


@dataclass(slots=True)
class Run:
    """Eight answers, or their part until the first of them ended.

    Attributes:
        tokens, seconds: of all.
        full_tokens, full_seconds: until the first answer ended.
        forwards: of both models.
    """

    tokens: int = 0
    seconds: float = 0.0
    full_tokens: int = 0
    full_seconds: float = 0.0
    forwards: int = 0


def decode(pair: Baco, seed: int, **structure: Any) -> tuple[Run, list[tuple[int, ...]]]:
    """The run of one seed, and the tokens of its answers."""
    decoder, run, answers = pair.decoder(), Run(), dict[int, tuple[int, ...]]()
    started = time.perf_counter()
    decoder.submit(
        PROMPT, router=pair.router("P-Punc:0.4"), n=8, max_tokens=96, seed=seed, **structure
    )
    while decoder.busy:
        for chunk in decoder.step():
            run.tokens += len(chunk.tokens)
            if chunk.completion is not None:
                answers[chunk.sample] = chunk.completion.token_ids
        run.seconds = time.perf_counter() - started
        if not answers:
            run.full_tokens, run.full_seconds = run.tokens, run.seconds
    stats: Any = decoder.engine.stats
    run.forwards = sum(stats.forwards.values())
    return run, [answers[sample] for sample in sorted(answers)]


def decoding(base: str, aligned: str, rounds: int) -> None:
    """Tokens per second with and without the schema, and with and without drafts of forced tokens,
    in turn.
    """
    pair = Baco.load(base=base, aligned=aligned)
    decode(pair, 0)
    started = time.perf_counter()
    decode(pair, 0, schema=SCHEMA)
    print(f"first structured request: {time.perf_counter() - started:.1f} s")
    runs: dict[str, list[Run]] = {"free": [], "schema": [], "undrafted": []}
    for seed in range(1, rounds + 1):
        runs["free"].append(decode(pair, seed)[0])
        run, answers = decode(pair, seed, schema=SCHEMA)
        runs["schema"].append(run)
        with patch.object(Proposer, "_forced", lambda *_: []):
            run, others = decode(pair, seed, schema=SCHEMA)
        runs["undrafted"].append(run)
        if others != answers:
            raise SystemExit("answers differ without drafts of forced tokens")
    for name, own in runs.items():
        tokens, seconds = sum(run.tokens for run in own), sum(run.seconds for run in own)
        full = sum(run.full_tokens for run in own) / sum(run.full_seconds for run in own)
        forwards = sum(run.forwards for run in own)
        print(
            f"{name:10} {tokens:5} tokens {seconds:6.1f} s {tokens / seconds:6.1f} tokens/s "
            f"{forwards:4} forwards; while all 8 answers are decoded {full:6.1f} tokens/s"
        )
    pairs = list(zip(runs["schema"], runs["free"], strict=True))
    whole = [(a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in pairs]
    beside = [(a.full_tokens / a.full_seconds) / (b.full_tokens / b.full_seconds) for a, b in pairs]
    print(
        f"schema / free: {statistics.median(whole):.2f}; while all 8 answers are decoded "
        f"{statistics.median(beside):.2f} (median of {rounds})"
    )


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured")
    parts = parser.add_subparsers(dest="part", required=True)
    of_masks = parts.add_parser("masks", help="compare libraries of masks")
    of_masks.add_argument("folders", nargs="+", help="folders with a tokenizer.json")
    of_compiling = parts.add_parser("compiling", help="the first and second use of a large schema")
    of_compiling.add_argument("folders", nargs="+", help="folders with a tokenizer.json")
    of_decoding = parts.add_parser("decoding", help="the cost of a schema in decoding")
    of_decoding.add_argument("--base", required=True)
    of_decoding.add_argument("--aligned", required=True)
    of_decoding.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    quiet_libraries()
    if given.part == "masks":
        masks(given.folders)
    elif given.part == "compiling":
        compiling(given.folders)
    else:
        decoding(given.base, given.aligned, given.rounds)


if __name__ == "__main__":
    launch(main)
