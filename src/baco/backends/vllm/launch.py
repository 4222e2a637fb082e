"""From a pair's name to a running vLLM engine."""

import difflib
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from baco.backends.vllm.folder import export_pair
from baco.backends.vllm.plugin import ARCHITECTURE, register
from baco.errors import BacoError
from baco.kv_cache.memory_limit import cache_bytes
from baco.models.known_pairs import KnownPair
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair
from baco.source import MODELS
from baco.text.vocabulary import load_words

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# Of keys and values on a CPU, where vLLM's own default is most of the machine.
_CPU_CACHE = 2**30


def start(
    known: KnownPair,
    templates: dict[str, Any],
    function_words: str | Iterable[str] | None,
    trust_remote_code: bool,
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
    pair = load_weightless_pair(
        known,
        dict.fromkeys(MODELS, "vLLM"),
        function_words=function_words,
        trust_remote_code=trust_remote_code,
        **templates,
    )
    made = None
    folder = exported(known) if words is None else None
    if folder is None:
        made = TemporaryDirectory(prefix="baco-pair-")
        folder = Path(made.name)
        export_pair(known, folder, function_words=words, trust_remote_code=trust_remote_code)
    # Answers go to standard output: what vLLM has to say does not.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine's loop runs where `step` is called; only several devices take several processes.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    register()
    try:
        engine = _engine(_cache(cache) | _drafts(ngram) | arguments | {"model": str(folder)})
    except Exception as error:  # vLLM raises whatever its parts raise
        if made is not None:
            made.cleanup()
        if isinstance(error, BacoError):
            raise
        raise BacoError(f"vLLM does not start: {first_line(error)}") from error
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


def check_arguments(arguments: Iterable[str]) -> None:
    """BacoError where an argument is none of vLLM's engine, or not the caller's to give."""
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            mend = f"did you mean {near[0]}?" if near else "see vLLM's engine arguments"
            raise BacoError(f"vLLM's engine has no argument {name!r}: {mend}")
        if name == "model":
            raise BacoError("the engine's model is the pair: leave out model")


def _engine(arguments: dict[str, Any]) -> "LLMEngine":
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**{"disable_log_stats": True} | arguments))


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


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says something."""
    from pydantic import ValidationError

    told = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        told = ": ".join((".".join(map(str, first["loc"])), first["msg"])).removeprefix(": ")
    lines = (line.strip().rstrip(".") for line in told.splitlines())
    return next((line for line in lines if line), type(error).__name__)
