"""Starting a vLLM engine for a pair."""

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
from baco.engine.budget import cache_bytes
from baco.errors import BacoError
from baco.models.known_pairs import KnownPair
from baco.models.pair import Pair
from baco.models.weightless import load_weightless_pair
from baco.source import MODELS
from baco.text.vocabulary import load_words

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# Memory for keys and values on a CPU, where vLLM's own default is most of the machine.
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
    """A pair without weights, the folder made for it if one was needed, and the engine.

    Raises:
        BacoError: the engine does not start; the reason in one line.
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
    temporary = None
    folder = exported(known) if words is None else None
    if folder is None:
        temporary = TemporaryDirectory(prefix="baco-pair-")
        folder = Path(temporary.name)
        export_pair(known, folder, function_words=words, trust_remote_code=trust_remote_code)
    # Standard output is for answers; vLLM's log must not go there.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # The engine runs in the process that calls `step`; only several devices need more processes.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    register()
    try:
        engine = _engine(_cache(cache) | _drafts(ngram) | arguments | {"model": str(folder)})
    except Exception as error:  # of any kind
        if temporary is not None:
            temporary.cleanup()
        if isinstance(error, BacoError):
            raise
        raise BacoError(f"vLLM does not start: {first_line(error)}") from error
    return pair, temporary, engine


def exported(known: KnownPair) -> Path | None:
    """The folder of a pair, if `export_pair` wrote it."""
    folder = Path(known.base).parent
    config = folder / "config.json"
    if not config.is_file() or Path(known.aligned) != folder / "aligned":
        return None
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return folder if settings.get("architectures") == [ARCHITECTURE] else None


def check_arguments(arguments: Iterable[str]) -> None:
    """Raise BacoError for arguments that vLLM's engine does not have, and for ``model``."""
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]}?" if near else "see vLLM's engine arguments"
            raise BacoError(f"vLLM's engine has no argument {name!r}: {advice}")
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
    """The first line of another library's message that is not empty."""
    from pydantic import ValidationError

    message = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        message = ": ".join((".".join(map(str, first["loc"])), first["msg"])).removeprefix(": ")
    lines = (line.strip().rstrip(".") for line in message.splitlines())
    return next((line for line in lines if line), type(error).__name__)
