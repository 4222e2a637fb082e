"""A pair inside one vLLM engine: the plugin that vLLM loads, and the backend that drives it.

vLLM's processes import this package too, so it imports little.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baco.backends.vllm.backend import VllmBackend
    from baco.models.known_pairs import KnownPair
    from baco.models.pair import Pair


def connect(
    known: "KnownPair",
    *,
    dtype: str | None = None,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    trust_remote_code: bool = False,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_rows: int = 256,
    cache: int | float | str | None = None,
    ngram: int = 0,
    engine: Mapping[str, Any] | None = None,
) -> "tuple[Pair, VllmBackend]":
    """Start a vLLM engine in this process that holds both models.

    Args:
        known: where the models are; a folder that ``baco pair export`` wrote is taken as it is.
        dtype: of the weights; by default the pair's own, else vLLM's choice.
        base_template, chat_template, function_words, trust_remote_code: as for
            :func:`baco.models.pair.load_pair`.
        tensor_parallel, pipeline_parallel: devices that share the layers' widths, or the layers.
        max_rows: answers decoded at once; others wait.
        cache: memory for keys and values, as for :func:`baco.engine.budget.cache_bytes`; by
            default vLLM's share of a GPU's memory, and 1 GiB on a CPU.
        ngram: draft tokens taken from the text so far (prompt lookup); 0 for none.
        engine: vLLM's own engine arguments by name; they override the others.

    Raises:
        BacoError: vLLM is missing or has another version, or it cannot run the pair or a setting.
    """
    from baco.backends.vllm.versions import check_version

    check_version()
    from baco.backends.vllm.backend import VllmBackend
    from baco.backends.vllm.launch import check_arguments, start

    check_arguments(engine or {})
    pair, folder, llm = start(
        known,
        {"base_template": base_template, "chat_template": chat_template},
        function_words,
        trust_remote_code,
        {
            "dtype": dtype or known.dtype or "auto",
            "tensor_parallel_size": tensor_parallel,
            "pipeline_parallel_size": pipeline_parallel,
            "max_num_seqs": max_rows,
            "trust_remote_code": trust_remote_code,
            **dict(engine or {}),
        },
        cache,
        ngram,
    )
    return pair, VllmBackend(pair, llm, folder)
