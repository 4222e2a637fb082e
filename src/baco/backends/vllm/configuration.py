"""A pair's changes to vLLM's configuration: its own worker and scheduler, no CUDA graphs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from baco.backends.vllm.options import Limits
from baco.backends.vllm.versions import check_version
from baco.errors import BacoError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_HOME = "baco.backends.vllm"


class PairConfiguration(VerifyAndUpdateConfig):
    """Called by vLLM for the architecture of a pair, in the process that accepts requests."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Set the pair's worker and scheduler.

        Raises:
            BacoError: a pair does not work with this version of vLLM, or with a feature that is on.
        """
        check_version()
        _check_features(vllm_config)
        # Model Runner V2 has no hook yet that knows both a row's request and its base prompt, and
        # that runs on CPUs too. Workers inherit the variable.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        worker = "CpuPairWorker" if current_platform.is_cpu() else "PairWorker"
        vllm_config.parallel_config.worker_cls = f"{_HOME}.worker.{worker}"
        vllm_config.scheduler_config.scheduler_cls = f"{_HOME}.scheduler.pair_scheduler"
        # A model that reads fewer tokens than the batch has cannot use a captured graph.
        vllm_config.model_config.enforce_eager = True
        # vLLM checks structures by the library that compiles them for a pair, too.
        if vllm_config.structured_outputs_config.backend == "auto":
            vllm_config.structured_outputs_config.backend = "guidance"
        model = vllm_config.model_config
        Limits.of_pair(
            model.get_vocab_size(),
            model.max_model_len,
            Path(model.model),
            model.trust_remote_code,
        )


def _check_features(vllm_config: "VllmConfig") -> None:
    folder = Path(vllm_config.model_config.model)
    if not (folder / "base").is_dir() or not (folder / "aligned").is_dir():
        raise BacoError(f"{folder} is not a pair directory: make one with 'baco pair export DIR'")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise BacoError(
            f"speculative method {speculative.method!r}: a pair in vLLM takes drafts from 'ngram'"
        )
    if vllm_config.lora_config is not None:
        raise BacoError("a pair in vLLM takes no LoRA adapters: merge them before the export")
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.enable_dbo:
        raise BacoError("a pair in vLLM runs without context parallelism and dual batch overlap")
    if vllm_config.kv_transfer_config is not None:
        raise BacoError("a pair in vLLM runs without a KV connector: its models' caches differ")
