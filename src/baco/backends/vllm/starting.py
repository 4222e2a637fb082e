"""From a pair's name to a running vLLM engine."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from baco.backends.described import describe_pair
from baco.backends.vllm.folder import export_pair
from baco.backends.vllm.plugin import ARCHITECTURE, register
from baco.errors import BacoError
from baco.known import KnownPair
from baco.memory import cache_bytes
from baco.pair import Pair
from baco.routing.routers import HALVES
from baco.vocabulary import load_words

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# Of keys and values on a CPU, where vLLM's own default is most of the machine.
_CPU_CACHE = 2**30


def start(
    known: KnownPair,
    templates: dict[str, Any],
    function_words: str | Iterable[str] | None,
    arguments: dict[str, Any],
    cache: int | float | str | None,
    ngram: int,
) -> "tuple[Pair, TemporaryDirectory[str] | None, LLMEngine]":
    """A pair without weights, the folder that was made for it, and the engine that has them.

    Raises:
        BacoError: what cannot be started, in one line.
    """
    words = None
    if function_words is not None:
        words = sorted(load_words(function_words))
    pair = describe_pair(
        known, dict.fromkeys(HALVES, "vLLM"), function_words=function_words, **templates
    )
    made = None
    folder = exported(known) if words is None else None
    if folder is None:
        made = TemporaryDirectory(prefix="baco-pair-")
        folder = Path(made.name)
        export_pair(known, folder, function_words=words)
    # Answers go to standard output: what vLLM has to say does not.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine's loop runs where `step` is called; only several devices take several processes.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    register()
    try:
        engine = _engine(arguments | _cache(cache) | _drafts(ngram) | {"model": str(folder)})
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if made is not None:
            made.cleanup()
        if isinstance(error, BacoError):
            raise
        raise BacoError(f"vLLM does not start: {_line(error)}") from error
    return pair, made, engine


def exported(known: KnownPair) -> Path | None:
    """The pair directory that a pair lies in, if it is one."""
    folder = Path(known.base).parent
    config = folder / "config.json"
    if not config.is_file() or Path(known.aligned) != folder / "aligned":
        return None
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return folder if told.get("architectures") == [ARCHITECTURE] else None


def _engine(arguments: dict[str, Any]) -> "LLMEngine":
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(disable_log_stats=True, **arguments))


def _cache(cache: int | float | str | None) -> dict[str, Any]:
    if cache is not None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return {"kv_cache_memory_bytes": cache_bytes(cache, [torch.device(name)])}
    if torch.cuda.is_available() or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"kv_cache_memory_bytes": _CPU_CACHE}


def _drafts(ngram: int) -> dict[str, Any]:
    if isinstance(ngram, bool) or not isinstance(ngram, int) or ngram < 0:
        raise BacoError(f"ngram is {ngram!r}: give how many tokens to draft, 0 for none")
    if not ngram:
        return {}
    return {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": ngram,
            "prompt_lookup_min": 2,
            "prompt_lookup_max": 4,
        },
        "per_request_spec_decode_metrics": "summary",
    }


def _line(error: BaseException) -> str:
    """The first line of another library's message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
