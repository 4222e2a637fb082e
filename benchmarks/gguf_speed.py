"""The speed of GGUF pairs in llama.cpp, as one table.

    python -m benchmarks.gguf_speed [pair] [prompts] [gemma3] [--n 1 8] [--router P-Punc:0.3]
        [--tokens 48] [--repeats 3] [--format Q4_0] [--costs] [--no-generate]

``pair`` is SmolLM2 135M in Q4_1 and its perturbed copy: every matrix but the embeddings is
de-quantised, gets noise of 5% of its standard deviation, and is quantised again. ``prompts`` is
SmolLM2 under two prompts, ``gemma3`` Gemma 3 270M in Q4_K_M under two prompts (262,144 tokens).

Speeds are ratios of decoders that take turns in one run, each the median over the repeats:
`generate` of transformers on the de-quantised aligned model in bfloat16, and llama.cpp on the
aligned file alone, in a loop over its own functions with its own sampler. *forwards ÷ wall* is the
time inside llama.cpp over all time: the rest is this engine's own.

``--format`` quantises the matrices in another format than the file's own. ``--costs`` prints
milliseconds of one call of llama.cpp instead, by rows and tokens.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import torch
from llama_cpp import llama_cpp as library
from transformers.utils.logging import disable_progress_bar

from baco.bench.contestants import Contestant, Generate, Paired, Run, Stopwatch, Task, checked
from baco.bench.measure import machine, prompts_for, repeated_tasks
from baco.bench.race import Entry, race
from baco.kv_cache.protocol import finish
from baco.models.known_pairs import KnownPair
from baco.models.llama_cpp_model import LlamaCppModel
from baco.models.llama_cpp_pair import load_llama_cpp_pair
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router
from baco.source import MODELS
from benchmarks import launch
from benchmarks.siblings import PLAIN_TEMPLATE
from tests_real.fetch import fetch, folder, path_of

NOISE = 0.05
_EMBEDDINGS = ("token_embd.weight", "output.weight")
_WRITTEN = ("general.architecture", "general.file_type")
# Rows and tokens of each, for --costs.
CALLS = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4), (4, 1), (8, 1), (8, 4), (16, 1), (16, 4)]


def copied(model: Path, form: str, noise: float) -> Path:
    """A copy of a GGUF file whose matrices, but for the embeddings, have another format and noise.

    Args:
        model: the file.
        form: of the matrices; empty keeps each as it is.
        noise: added to them, as a share of their standard deviation.
    """
    out = folder() / f"{model.stem}{f'-{form}' if form else ''}-{noise:g}.gguf"
    if not form and not noise:
        return model
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    reader, generator = gguf.GGUFReader(model), np.random.default_rng(0)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(partial, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in _WRITTEN:
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        inner = field.types[-1] if is_list else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    if form:
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
    elif "general.file_type" in reader.fields:
        writer.add_file_type(reader.fields["general.file_type"].contents())
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if len(tensor.shape) == 2 and tensor.name not in _EMBEDDINGS:
            kind = gguf.GGMLQuantizationType[form] if form else kind
            values = gguf.quants.dequantize(data, tensor.tensor_type)
            drawn = generator.standard_normal(values.shape, dtype=np.float32)
            data = gguf.quants.quantize(values + noise * values.std() * drawn, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)
    return out


def named(name: str, form: str = "") -> KnownPair:
    """The pair of a name on the command line."""
    real = "gemma3" if name == "gemma3" else "smollm2"
    fetch(real)
    original = path_of(real)
    aligned = copied(original, form, 0)
    base = copied(original, form, NOISE) if name == "pair" else aligned
    return KnownPair(name, str(base), str(aligned))


@dataclass(frozen=True, slots=True)
class LlamaAlone:
    """llama.cpp on the aligned model alone: its functions and its sampler, n sequences a call."""

    model: LlamaCppModel

    def decode(self, task: Task) -> Run:
        """Decode one task, timed."""
        ids, n, tokens = task.prompt.aligned_ids, task.params.n, task.params.max_tokens
        watch = Stopwatch(torch.device("cpu"))
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = len(ids) + n * tokens + 256, n
        params.n_batch, params.n_ubatch, params.kv_unified = 512, 512, True
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        context = library.llama_init_from_model(self.model.model.pointer, params)
        vocab = library.llama_model_get_vocab(self.model.model.pointer)
        samplers = []
        for sample in range(n):
            chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
            add = library.llama_sampler_chain_add
            bias = [library.llama_logit_bias(end, -100.0) for end in self.model.end_ids]
            biases = (library.llama_logit_bias * len(bias))(*bias)
            width = library.llama_vocab_n_tokens(vocab)
            add(chain, library.llama_sampler_init_logit_bias(width, len(bias), biases))
            add(chain, library.llama_sampler_init_temp(task.params.temperature))
            add(chain, library.llama_sampler_init_dist((task.params.seed or 0) + sample))
            samplers.append(chain)
        batch = library.llama_batch_init(max(len(ids), n), 0, 1)

        def call(items: list[tuple[int, int, int, bool]]) -> None:
            batch.n_tokens = len(items)
            for at, (token, position, sequence, wanted) in enumerate(items):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, wanted
            assert library.llama_decode(context, batch) == 0

        call([(token, at, 0, at == len(ids) - 1) for at, token in enumerate(ids)])
        memory = library.llama_get_memory(context)
        for sequence in range(1, n):
            library.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        answers: list[list[int]] = [[] for _ in range(n)]
        for step in range(tokens):
            for at, sampler in enumerate(samplers):
                row = at if step else len(ids) - 1
                answers[at].append(library.llama_sampler_sample(sampler, context, row))
            watch.on_token()
            if step + 1 < tokens:
                call([(answers[at][-1], len(ids) + step, at, True) for at in range(n)])
        seconds = watch.now()
        for sampler in samplers:
            library.llama_sampler_free(sampler)
        library.llama_batch_free(batch)
        library.llama_free(context)
        return checked(task, Run(answers, seconds, watch.first or seconds))


@contextmanager
def timed_calls() -> Iterator[list[float]]:
    """Collect the seconds of every call of llama.cpp."""
    seconds: list[float] = []
    decode = library.llama_decode

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        code = decode(*arguments)
        seconds.append(time.perf_counter() - start)
        return code

    library.llama_decode = timed
    try:
        yield seconds
    finally:
        library.llama_decode = decode


def measure(name: str, given: argparse.Namespace) -> Iterator[str]:
    """Rows of the table."""
    known = named(name, given.format)
    template = PLAIN_TEMPLATE if name == "gemma3" else None
    pair = load_llama_cpp_pair(known, chat_template=template)
    assert isinstance(pair.aligned, LlamaCppModel)
    contestants: dict[str, Contestant] = {
        "paired": Paired(pair),
        "alone": LlamaAlone(pair.aligned),
    }
    if not given.no_generate:
        alone = KnownPair(known.name, known.aligned, known.aligned)
        plain = load_pair(alone, dtype="bfloat16", packed=False, chat_template=template)
        contestants["generate"] = Generate(plain)
    chosen = router(given.router)
    tasks = repeated_tasks(pair, prompts_for(known), chosen, given.tokens, given.repeats)
    for n in given.n:
        entries = {which: Entry(which, n, each) for which, each in contestants.items()}
        race(list(entries.values()), tasks, lambda step: print(f"  {step}", file=sys.stderr))

        def over(which: str, entries: dict[str, Entry] = entries) -> float:
            if which not in entries:
                return float("nan")
            runs = zip(entries["paired"].runs, entries[which].runs, strict=True)
            return median(paired.speed / other.speed for paired, other in runs)

        paired = Paired(pair)
        shares, run = [], None
        for task in tasks:
            with timed_calls() as seconds:
                run = paired.decode(task.of(n))
            shares.append(sum(seconds) / run.seconds)
        stats = paired.stats
        assert stats is not None
        accepted = f"{stats.accepted / stats.drafted:.2f}" if stats.drafted else "–"
        forwards = " + ".join(f"{stats.forwards[model] / given.tokens:.2f}" for model in MODELS)
        milliseconds = [1000 * n / entry.speed for entry in entries.values()]
        yield (
            f"| {name} | {n} | {' / '.join(f'{ms:.1f}' for ms in milliseconds)} "
            f"| {over('generate'):.2f} | {over('alone'):.2f} | {median(shares):.2f} "
            f"| {forwards} | {accepted} |"
        )


def costs(pair: Pair, repeats: int) -> Iterator[str]:
    """Milliseconds of one call of llama.cpp on the aligned model, by rows and tokens."""
    model = pair.aligned
    assert isinstance(model, LlamaCppModel)
    for rows, tokens in CALLS:
        cache = model.new_cache()
        cache.copy_prefix(finish(cache.prefill(list(range(1000, 1064)))), rows)
        ids = torch.randint(1000, 2000, (rows, tokens))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            cache.extend(ids, [tokens] * rows, tokens)
            seconds.append(time.perf_counter() - start)
            cache.roll_back([64] * rows)
        yield f"| {rows} × {tokens} | {1000 * median(seconds):.1f} |"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", default=["pair", "prompts"])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--router", default="P-Punc:0.3")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--format", default="", help="such as Q4_0; by default the file's own")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--no-generate", action="store_true")
    given = parser.parse_args()
    disable_progress_bar()
    about = machine(torch.device("cpu"))
    built = library.llama_print_system_info().decode()
    print(f"{about['cpu']}, {about['threads']} threads, {given.router}, {given.tokens} tokens")
    print(f"llama.cpp {library.llama_version().decode()}: {built}")
    if given.costs:
        for name in given.pairs:
            print(f"\n| {name}: rows × tokens | ms |\n|---|---|")
            for line in costs(load_llama_cpp_pair(named(name, given.format)), given.repeats):
                print(line)
        return
    print(
        "\n| pair | n | ms a token: pair, llama.cpp, `generate` | ÷ `generate` | ÷ llama.cpp alone "
        "| forwards ÷ wall | forwards a token, base + aligned | accepted |\n|" + "---|" * 8
    )
    for name in given.pairs:
        for line in measure(name, given):
            print(line, flush=True)


if __name__ == "__main__":
    launch(main)
