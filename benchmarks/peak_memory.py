"""Peak memory of paired decoding, next to the size of weights and of cached keys and values.

    python -m benchmarks.peak_memory [PAIR | --body SIZE] [--n N] [--json]

Memory is counted above that of the process with its libraries in use and no pair loaded.
"""

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache

from baco.bench.contestants import Paired, Task, never_ending
from baco.bench.measure import machine, prompts_for
from baco.errors import BacoError
from baco.models.forward.packed_linear import weights
from baco.models.known_pairs import DEMO, KnownPair, find_pair
from baco.models.model import PairModel
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router as parse
from benchmarks import launch
from benchmarks.bodies import add_pair, named_pair


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes.

    Attributes:
        n, tokens: answers decoded at once, and tokens of each.
        weights: of both models, once where they are shared.
        cache: keys and values of all answers at their end, prompts included.
        loaded: memory taken once the pair was loaded.
        peak: the most memory taken while decoding.
        ratio: of peak to weights and cache.
    """

    n: int
    tokens: int
    weights: int
    cache: int
    loaded: int
    peak: int
    ratio: float


def measure(
    known: KnownPair, prompt: str, router: str, n: int, tokens: int, dtype: str | None, device: str
) -> Memory:
    """Decode ``n`` answers of ``tokens`` tokens in this process, which must hold no pair yet."""
    gauge = _gauge(device)
    # Loads what the libraries load at first use; not counted.
    demo = load_pair(find_pair(DEMO), device=device)
    _decode(demo, prompt, router, n=2, tokens=4)
    del demo
    before = gauge.taken()
    pair = load_pair(known, dtype=dtype, device=device)
    loaded = gauge.taken()
    gauge.reset()
    prompts = _decode(pair, prompt, router, n=n, tokens=tokens)
    peak = gauge.peak() - before
    models = {"base": pair.base, "aligned": pair.aligned}
    modules = {id(model.model): model.model for model in models.values()}
    stored = sum(size for module in modules.values() for _, _, size in weights(module))
    cached = sum(
        n * (prompts[source] + tokens) * _bytes_per_token(model) for source, model in models.items()
    )
    return Memory(n, tokens, stored, cached, loaded - before, peak, peak / (stored + cached))


def _decode(pair: Pair, prompt: str, router: str, *, n: int, tokens: int) -> dict[str, int]:
    """Decode; the lengths of both prompts."""
    rendered = pair.renderer.render(prompt)
    params = never_ending(pair, tokens, n=n, seed=0)
    Paired(pair).decode(Task(rendered, parse(router), params))
    return {"base": len(rendered.base_ids), "aligned": len(rendered.aligned_ids)}


@torch.inference_mode()
def _bytes_per_token(model: PairModel) -> int:
    """Bytes of keys and values of one token in all layers of a model."""
    cache, tokens = DynamicCache(), 2
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    model.run(input_ids=ids, past_key_values=cache, use_cache=True)
    stores: Iterator[Any] = (
        store for layer in cache.layers for store in (layer.keys, layer.values)
    )
    return sum(int(store.nbytes) for store in stores) // tokens


class _Resident:
    """A process's memory on Linux."""

    def taken(self) -> int:
        """Bytes now, after freed memory was returned to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)

    def reset(self) -> None:
        """Reset the peak."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """The most bytes since the reset."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024


class _Cuda:
    """Memory of tensors on a GPU."""

    def taken(self) -> int:
        gc.collect()
        return int(torch.cuda.memory_allocated())

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated())


def _gauge(device: str) -> _Resident | _Cuda:
    if device.startswith("cuda"):
        return _Cuda()
    if not sys.platform.startswith("linux"):
        raise BacoError("peak memory of a processor's process is read on Linux only")
    return _Resident()


def main() -> None:
    """Decode, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_pair(parser)
    parser.add_argument("--router", default="P-Punc:0.4")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args()
    known, device = named_pair(given), given.device or "cpu"
    prompt = prompts_for(known)[0]
    result = measure(known, prompt, given.router, given.n, given.tokens, given.dtype, device)
    if given.json:
        print(json.dumps(asdict(result) | {"machine": machine(torch.device(device))}))
        return
    need = (result.weights + result.cache) / 2**20
    print(
        f"{known.name}: peak memory at n = {result.n}: {result.peak / 2**20:.0f} MiB, "
        f"{result.ratio:.2f} × the {need:.0f} MiB of weights, keys and values"
    )


if __name__ == "__main__":
    launch(main)
