"""Peak memory of paired decoding, against what weights and cached keys and values need.

Measured in a process of its own, which holds nothing else: this module is that process too.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache
from transformers.utils import logging

from baco.bench.contestants import Paired, Task, never_ending
from baco.errors import BacoError
from baco.models.forward.packed_linear import weights
from baco.models.known_pairs import DEMO, KnownPair, find_pair
from baco.models.model import PairModel
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router as parse


@dataclass(frozen=True, slots=True)
class Asked:
    """What the other process is to decode: ``n`` answers of ``tokens`` tokens to ``prompt``."""

    base: str
    aligned: str
    dtype: str
    device: str
    router: str
    prompt: str
    n: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes; of the process beyond what it took with its libraries in use and no pair loaded.

    Attributes:
        n, tokens: answers decoded at once, and of how many tokens.
        weights: both halves', once where they are shared.
        cache: keys and values of all answers at their end, prompts included.
        loaded: taken once the pair was loaded.
        peak: the most taken while decoding.
        ratio: of peak to weights and cache.
    """

    n: int
    tokens: int
    weights: int
    cache: int
    loaded: int
    peak: int
    ratio: float


def memory(pair: Pair, task: Task) -> Memory:
    """Decode a task in a process of its own, and tell its memory.

    Raises:
        BacoError: that process failed.
    """
    model = pair.aligned.model
    asked = Asked(
        pair.base.name,
        pair.aligned.name,
        str(model.dtype).removeprefix("torch."),
        str(model.device),
        task.router.spelling,
        task.prompt.aligned_text,
        task.params.n,
        task.params.max_tokens,
    )
    command = [sys.executable, "-m", "baco.bench.memory"]
    done = subprocess.run(
        command, input=json.dumps(asdict(asked)), capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BacoError(f"memory could not be measured: {last}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _measure(asked: Asked) -> Memory:
    gauge = _gauge(asked.device)
    demo = load_pair(find_pair(DEMO), device=asked.device)
    _decode(demo, asked, n=2, tokens=4)
    del demo
    before = gauge.taken()
    known = KnownPair("measured", asked.base, asked.aligned)
    pair = load_pair(known, dtype=asked.dtype, device=asked.device)
    loaded = gauge.taken()
    gauge.forget()
    prompts = _decode(pair, asked, n=asked.n, tokens=asked.tokens)
    peak = gauge.peak()
    halves = {"base": pair.base, "aligned": pair.aligned}
    models = {id(half.model): half.model for half in halves.values()}
    stored = sum(bytes_ for model in models.values() for _, _, bytes_ in weights(model))
    cached = sum(
        asked.n * (prompts[name] + asked.tokens) * _bytes_per_token(half)
        for name, half in halves.items()
    )
    taken = peak - before
    ratio = taken / (stored + cached)
    return Memory(asked.n, asked.tokens, stored, cached, loaded - before, taken, ratio)


def _decode(pair: Pair, asked: Asked, *, n: int, tokens: int) -> dict[str, int]:
    """Decode, and tell the lengths of both prompts."""
    prompt = pair.renderer.raw(asked.prompt)
    params = never_ending(pair, tokens, n=n, seed=0)
    Paired(pair).decode(Task(prompt, parse(asked.router), params))
    return {"base": len(prompt.base_ids), "aligned": len(prompt.aligned_ids)}


@torch.inference_mode()
def _bytes_per_token(half: PairModel) -> int:
    """Keys and values of one token in all layers of a half."""
    cache, tokens = DynamicCache(), 2
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=half.device)
    half.run(input_ids=ids, past_key_values=cache, use_cache=True)
    stores: Iterator[Any] = (
        store for layer in cache.layers for store in (layer.keys, layer.values)
    )
    return sum(int(store.nbytes) for store in stores) // tokens


class _Resident:
    """A process's memory on Linux."""

    def taken(self) -> int:
        """Now, what was freed given back."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)

    def forget(self) -> None:
        """Let the peak begin anew."""
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """The most since then."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        told = next(line for line in lines if line.startswith("VmHWM"))
        return int(told.split()[1]) * 1024


class _Cuda:
    """What tensors take on a GPU."""

    def taken(self) -> int:
        gc.collect()
        return int(torch.cuda.memory_allocated())

    def forget(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated())


def _gauge(device: str) -> _Resident | _Cuda:
    if device.startswith("cuda"):
        return _Cuda()
    if not sys.platform.startswith("linux"):
        raise BacoError("peak memory of a processor's process is read on Linux only")
    return _Resident()


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdout.write(json.dumps(asdict(_measure(Asked(**json.loads(sys.stdin.read()))))) + "\n")
