"""Every architecture of the installed `transformers`: is it decoded right, on which path, how fast?

    python -m benchmarks.architectures [NAMES] [--json FILE] [--page FILE] [--no-speed]

Each architecture is a tiny pair with random weights, whose windows, chunks and original rotary
lengths are short. Prompts shorter and longer than all of these are decoded together and alone, with
drafts and without, and compared with a naive loop over freshly loaded models: tokens and sources in
float32, log-probabilities in bfloat16. Speed is that of paired decoding over `generate` on the
aligned model alone.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from baco import Baco, Completion
from baco.bench.contestants import Generate, Paired, Task, never_ending
from baco.bench.race import Entry, race, ratios
from baco.decoder import Decoder
from baco.device import processor
from baco.engine.engine import Engine
from baco.models.known_pairs import KnownPair
from baco.models.model import PairModel
from baco.models.pair import Pair, load_pair
from baco.models.size import ModelSize
from baco.routing.parser import router as parse_router
from baco.source import Source
from benchmarks import launch
from tests import naive_decoding as naive
from tests.test_engine import rules, without_turn_cut
from tests.tiny import EVERY, save_tiny_pair

CONTEXT = 256
# Prompts of 3, 13 and 80 tokens; the chat template and the answer add some.
PROMPTS = (
    "Plan a walk.",
    "Where should I go, when the sea is warm and I have only little time?",
    "The summer is long and the sea is warm, so we walk along the shore of Lisbon every evening. "
    "In the winter of 1998, Anna and her brother took the night train to Prague; it cost 42 euros! "
    "Where should I go this summer, when I have only little time, and no money, but a dog?",
)
ROUTERS = ("Rand:0.5", "P:0.5")
SAMPLES, TOKENS, SEED = 2, 16, 5
# Nats by which a log-probability may differ in bfloat16, and by which a wrong one differs at least.
MOST_ROUNDING = 0.35
SPEED_N, SPEED_TOKENS, SPEED_REPEATS = 8, 32, 3


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture at certain settings.

    Attributes:
        model_type: as `transformers` calls it.
        changes: to its tiny configuration.
        switch: something changes with the length of a text, so that it is also read in bfloat16.
    """

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    switch: bool = False


def _long_rope(original: int = 36, **more: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": original,
        **more,
    }


def _rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **more}}


_LONG = {"original_max_position_embeddings": 36, "rope_parameters": _long_rope()}
_YARN = _rope("yarn", original_max_position_embeddings=64)
# Settings beside the usual ones of an architecture.
VARIANTS = {
    "bloom, 6 heads": Case("bloom", {"n_head": 6, "hidden_size": 48}),
    "deepseek_v2, yarn": Case("deepseek_v2", _YARN),
    "deepseek_v32, top 16": Case("deepseek_v32", {"index_topk": 16}),
    "falcon, ALiBi": Case("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "falcon, bias": Case("falcon", {"bias": True, "parallel_attn": False}),
    "falcon, new": Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3_text, two longropes": Case(
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": _long_rope(),
                "sliding_attention": _long_rope(28),
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
        switch=True,
    ),
    "glm_moe_dsa, top 16": Case("glm_moe_dsa", {"index_topk": 16}),
    "gpt_oss, yarn": Case("gpt_oss", _YARN),
    "hy_v4, top 16": Case("hy_v4", {"index_topk": 16}),
    "llama, dynamic": Case("llama", _rope("dynamic")),
    "llama, linear": Case("llama", _rope("linear")),
    "llama, llama3": Case(
        "llama",
        _rope(
            "llama3",
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama, longrope": Case("llama", {"rope_parameters": _long_rope()}, switch=True),
    "llama, yarn": Case("llama", _YARN),
    "llama4_text, long chunks": Case("llama4_text", {"attention_chunk_size": 128}, switch=True),
    "mistral, no window": Case("mistral", {"sliding_window": None}),
    "mistral, window 4096": Case("mistral", {"sliding_window": 4096}),
    "mixtral, window": Case("mixtral", {"sliding_window": 16}, switch=True),
    "phi3, longrope": Case("phi3", _LONG, switch=True),
    "phimoe, longrope": Case(
        "phimoe", {"rope_parameters": _long_rope(short_mscale=1.1, long_mscale=1.3)}, switch=True
    ),
    "qwen2, tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, True
    ),
    "smollm3, window": Case("smollm3", {"use_sliding_window": True, "sliding_window": 16}, True),
    "starcoder2, window": Case("starcoder2", {"sliding_window": 16}, switch=True),
}
_SWITCHES = {"gpt_neo", "llama4_text", "mistral", "mpt"}
# A window in the cache alone, or a table of positions of a given shape, at this context.
_CHANGES: dict[str, dict[str, Any]] = {
    "moshi": {"sliding_window": CONTEXT},
    "reformer": {"axial_pos_shape": [8, CONTEXT // 8]},
}
CASES: dict[str, Case] = {
    **{name: Case(name, _CHANGES.get(name, {}), switch=name in _SWITCHES) for name in EVERY},
    **VARIANTS,
}


@dataclass(slots=True)
class Result:
    """What was found about an architecture.

    Attributes:
        path: of both models, as `baco diagnose` prints it.
        batched, drafts: rows are read in one forward; draft tokens can be taken back.
        equal: every answer agrees with the naive loop.
        difference: the largest in a log-probability in bfloat16, in nats; None where not measured.
        speed: of paired decoding over `generate`, median; None where `generate` fails.
        error: what was raised, in one line.
        seconds: that all of this took, speed included.
    """

    path: str = ""
    batched: bool = False
    drafts: bool = False
    equal: bool | None = None
    difference: float | None = None
    speed: float | None = None
    error: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether every answer is the naive loop's, in bfloat16 up to rounding."""
        return self.equal is True and (self.difference or 0.0) < MOST_ROUNDING


@dataclass(frozen=True, slots=True)
class FreshModels:
    """What the naive loop needs of a pair, with models as `transformers` loads them."""

    vocabulary: Any
    end_ids: Any
    base: PairModel
    aligned: PairModel

    @classmethod
    def of(cls, pair: Pair, folder: Path, dtype: torch.dtype) -> "FreshModels":
        def load(source: Source) -> PairModel:
            model = AutoModelForCausalLM.from_pretrained(folder / source, dtype=dtype)
            own = pair.model(source)
            fresh = PairModel(source, model.eval(), own.tokenizer)
            return fresh.with_common_vocab(own.vocab_size, own.unknown_ids)

        return cls(pair.vocabulary, pair.end_ids, load("base"), load("aligned"))


def create(name: str, folder: Path) -> Path:
    """The tiny pair of a case, as a folder."""
    case = CASES[name]
    return save_tiny_pair(folder, case.model_type, noise=0.3, context=CONTEXT, **case.changes)


@dataclass(slots=True)
class Comparison:
    """A pair's answers beside the naive loop.

    Args:
        folder: of the pair.
        dtype: ``float32`` or ``bfloat16``.
    """

    folder: Path
    dtype: str = "float32"
    baco: Baco = field(init=False)
    _fresh: FreshModels = field(init=False)
    _expected: dict[tuple[str, str, int], tuple[list[int], list[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.baco = without_turn_cut(Baco.load(str(self.folder), dtype=self.dtype))
        self._fresh = FreshModels.of(self.baco.pair, self.folder, getattr(torch, self.dtype))

    def answers(self) -> Iterator[tuple[str, str, Completion]]:
        """Prompt, router and answer: of prompts decoded together, alone, and with drafts."""
        for router in ROUTERS:
            alone = [self._decode([prompt], router, 1)[0] for prompt in PROMPTS]
            together = self._decode(PROMPTS, router, SAMPLES)
            with drafting(self.baco):
                drafted = self._decode(PROMPTS, router, SAMPLES)
            for answers in (alone, together, drafted):
                for prompt, samples in zip(PROMPTS, answers, strict=True):
                    yield from ((prompt, router, answer) for answer in samples)

    def equal(self) -> bool:
        """Whether all answers have the tokens and the sources of the naive loop's."""
        return all(
            (list(answer.token_ids), list(answer.sources)) == self._naive(prompt, router, answer)
            for prompt, router, answer in self.answers()
        )

    def largest_difference(self) -> float:
        """The largest between a log-probability of an answer and a plain forward's, in nats."""
        return max(
            difference
            for prompt, _, answer in self.answers()
            for difference in self._differences(prompt, answer)
        )

    def _decode(self, prompts: Sequence[str], router: str, n: int) -> list[list[Completion]]:
        decoder = Decoder(self.baco.pair, Engine(self.baco.pair))
        sampling: dict[str, Any] = {"seed": SEED, "temperature": 1.0, "max_tokens": TOKENS, "n": n}
        for prompt in prompts:
            decoder.submit(prompt, router=self.baco.router(router), **sampling)
        answers: list[dict[int, Completion]] = [{} for _ in prompts]
        while decoder.busy:
            for chunk in decoder.step():
                if chunk.completion is not None:
                    answers[chunk.prompt][chunk.sample] = chunk.completion
        return [[samples[sample] for sample in sorted(samples)] for samples in answers]

    def _naive(self, prompt: str, router: str, answer: Completion) -> tuple[list[int], list[str]]:
        key = prompt, router, answer.sample
        if key not in self._expected:
            rendered = self.baco.pair.renderer.render(prompt)
            self._expected[key] = naive.decode(
                self._fresh,
                rendered.base_ids,
                rendered.aligned_ids,
                rules(self.baco.pair)[router],
                digest=naive.chat_digest([{"role": "user", "content": prompt}]),
                seed=SEED,
                sample=answer.sample,
                temperature=1.0,
                max_tokens=TOKENS,
            )
        return self._expected[key]

    def _differences(self, prompt: str, answer: Completion) -> Iterator[float]:
        """Of each token that was not drawn under the mask of a word start."""
        rendered = self.baco.pair.renderer.render(prompt)
        prompts = {"base": rendered.base_ids, "aligned": rendered.aligned_ids}
        tokens, sources = answer.token_ids, answer.sources
        for at, source in enumerate(sources):
            if at and sources[at - 1] != source:
                continue
            assert source is not None
            model: PairModel = getattr(self._fresh, source)
            row = model.score([*prompts[source], *tokens[:at]])[-1]
            if source == "base":
                row = row.masked_fill(self.baco.pair.banned, -torch.inf)
            yield abs(float(row.log_softmax(-1)[tokens[at]]) - answer.logprobs[at])


@contextmanager
def drafting(baco: Baco) -> Iterator[None]:
    """In this block the planner takes the models of a pair for large ones, and drafts."""
    models = [baco.pair.base, baco.pair.aligned]
    sizes = [model.size for model in models]
    for model in models:
        model.__dict__["size"] = ModelSize(80, 80 * 10**8, 80 * 10**8)
    try:
        yield
    finally:
        for model, size in zip(models, sizes, strict=True):
            model.__dict__["size"] = size


def speed(folder: Path) -> float:
    """Tokens per second of paired decoding over those of `generate`, median over repeats."""
    known = KnownPair.in_folder(folder)
    ours = load_pair(known, dtype="float32")
    plain = load_pair(known, dtype="float32", packed=False)
    prompt, router = ours.renderer.render(PROMPTS[1]), parse_router("P:0.5")
    tasks = [
        Task(prompt, router, never_ending(ours, SPEED_TOKENS, seed=seed))
        for seed in range(SPEED_REPEATS)
    ]
    entries = [
        Entry("paired", SPEED_N, Paired(ours)),
        Entry("generate", SPEED_N, Generate(plain)),
    ]
    race(entries, tasks, lambda _: None)
    return ratios(entries)[f"generate_n{SPEED_N}"].middle


def measure(name: str, *, with_speed: bool = True) -> Result:
    """Everything about one case."""
    result, started = Result(), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        try:
            create(name, folder)
            comparison = Comparison(folder)
            model = comparison.baco.pair.aligned
            result.path = model.path
            result.batched, result.drafts = model.forward is not None, model.can_roll_back
            result.equal = comparison.equal()
            if CASES[name].switch:
                result.difference = Comparison(folder, "bfloat16").largest_difference()
        except Exception as error:
            result.error = _line(error)
        if with_speed and not result.error:
            try:
                result.speed = speed(folder)
            except Exception as error:
                result.error = f"generate: {_line(error)}"
    result.seconds = time.monotonic() - started
    return result


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    results = {name: Result(**result) for name, result in report["cases"].items()}
    equal = [name for name, result in results.items() if result.right]
    batched = [name for name in equal if results[name].batched]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        "# Architectures",
        "",
        "<!-- Written by `python -m benchmarks.architectures --page docs/architectures.md`. -->",
        "",
        f"Measured on {versions}; {report['machine']}. Each row of the table is a tiny pair of one",
        "architecture with random weights and short windows and chunks. Prompts shorter and longer",
        "than these are decoded together and alone, with drafts and without, and compared with a",
        "naive loop over freshly loaded models. `baco diagnose` names the path of your own pair.",
        "",
        f"Of {len(results)} configurations, {len(equal)} are decoded exactly as by the naive loop,",
        f"{len(batched)} of them with all rows in one forward.",
        "",
        f"- *speed*: of paired decoding over `generate` on one model, {SPEED_N} answers of",
        f"  {SPEED_TOKENS} tokens, in turns on one thread; median of {SPEED_REPEATS} turns, a dash",
        "  where it was not measured. At this size overhead outweighs arithmetic.",
        "- *bfloat16*: the largest difference of a log-probability, in nats, where something in",
        "  the architecture changes with the length of a text.",
        "",
        "| architecture | equal | rows | drafts | speed | bfloat16 | path |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [
            name,
            {True: "yes", False: "**no**", None: "–"}[result.equal],
            "together" if result.batched else "one by one",
            "yes" if result.drafts and result.batched else "no",
            "–" if result.speed is None else f"{result.speed:.2f}",
            "–" if result.difference is None else f"{result.difference:.2f}",
            result.error.replace("|", "\\|") or result.path,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; all by default")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results; what is in it is not measured again"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the results")
    parser.add_argument("--no-speed", action="store_true", help="compare only")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(CASES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(CASES)}")
    report = _empty()
    if given.json and given.json.is_file():
        report = json.loads(given.json.read_text(encoding="utf-8"))
        if report["versions"] != _empty()["versions"]:
            parser.error(f"{given.json} was measured on other versions: name another file")
    _silence()
    for name in given.names or [name for name in CASES if name not in report["cases"]]:
        report["cases"][name] = asdict(result := measure(name, with_speed=not given.no_speed))
        shown = "–" if result.speed is None else f"{result.speed:.2f}"
        verdict = "equal" if result.right else "NOT EQUAL"
        print(f"{name:28} {verdict:10}{shown:>5}  {result.error or result.path}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    report["cases"] = {name: report["cases"][name] for name in CASES if name in report["cases"]}
    if given.page:
        given.page.write_text(page(report), encoding="utf-8")
    wrong = [name for name, result in report["cases"].items() if not Result(**result).right]
    print(f"{len(report['cases']) - len(wrong)} right; not: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


def _empty() -> dict[str, Any]:
    versions = {name: version(name) for name in ("transformers", "torch")}
    return {"versions": versions, "machine": processor(), "cases": {}}


def _silence() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    launch(main)
