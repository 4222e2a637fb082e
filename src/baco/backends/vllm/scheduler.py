"""vLLM's scheduler for a pair: it sends sources with tokens, and shares prompt blocks only."""

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from baco.backends.vllm.options import PREFIX, PairOptions
from baco.backends.vllm.sources import sources_of
from baco.backends.vllm.structures import use_automata
from baco.errors import BacoError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
else:
    _Scheduler = object


log = logging.getLogger("baco")

# The key in ``kv_transfer_params``, the only field of free form in all of vLLM's request outputs.
# Its value has a letter for each token of the answer: ``b`` for base, ``a`` for aligned, ``m`` for
# both models mixed by a combiner.
SOURCES = f"{PREFIX}sources"


class _PairScheduling(_Scheduler):
    """A mixin to be placed before a scheduler of vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sources: dict[str, str] = {}
        self._shared: dict[str, int] = {}
        _share_prompts_only(self.kv_cache_manager, self._shared)
        use_automata(self.structured_output_manager, self.vllm_config)

    def add_request(self, request: "Request") -> None:
        """As in vLLM. Options that do not fit the prompt, which `Guard` does not know, end that
        request alone with an error.
        """
        params, length = request.sampling_params, request.num_prompt_tokens
        arguments = params.extra_args if params is not None else None
        try:
            options = PairOptions.read(arguments)
            options.check_prompt(length, self.vllm_config.model_config.get_vocab_size())
        except BacoError as error:
            log.error("request %s: %s", request.request_id, error)
            # No worker may see the bad options before vLLM collects such requests.
            params.extra_args = None
            self.grammar_compile_error_reqs.add(request.request_id)
            options = PairOptions.read(None)
        aligned = length - options.fill
        self._shared[request.request_id] = min(len(options.base_ids or ()) or aligned, aligned)
        if options.base_ids is not None or options.fill:
            _salt(request, options)
        super().add_request(request)

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput"
    ) -> "dict[int, EngineCoreOutputs]":
        """As in vLLM, with the sources of the accepted tokens."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        sources = sources_of(model_runner_output)
        for client in outputs.values():
            for output in client.outputs:
                new = sources.get(output.request_id, "")[: len(output.new_token_ids)]
                letters = self._sources.pop(output.request_id, "") + new
                if not output.finished:
                    self._sources[output.request_id] = letters
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), SOURCES: letters}
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """As in vLLM, for aborted requests."""
        ended = super().finish_requests(request_ids, finished_status)
        for request in ended:
            self._sources.pop(request.request_id, None)
        return ended

    def _free_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self._shared.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class PairScheduler(_PairScheduling, Scheduler):
    """For synchronous scheduling."""


class PairAsyncScheduler(_PairScheduling, AsyncScheduler):
    """For asynchronous scheduling."""


def pair_scheduler(vllm_config: "VllmConfig", **rest: Any) -> Scheduler:
    """The scheduler that a configuration names; vLLM calls this function as if it were a class."""
    kind = PairAsyncScheduler if vllm_config.scheduler_config.async_scheduling else PairScheduler
    return kind(vllm_config=vllm_config, **rest)


def _salt(request: "Request", options: PairOptions) -> None:
    """Let a request share blocks only with those whose whole prompts are the same for both models.

    vLLM's hash of a block has the prompt's tokens up to the block's end. It has no token of the
    base prompt, and where fill precedes the aligned prompt, the block holds later tokens of it.
    """
    prompts = [options.base_ids, options.fill, request.prompt_token_ids]
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    request.cache_salt = f"{request.cache_salt or ''}{digest}"
    request.block_hashes.clear()
    request.update_block_hashes()


def _share_prompts_only(manager: "KVCacheManager", shared: dict[str, int]) -> None:
    """Share only blocks of the prefix cache that hold prompt tokens in both models.

    The model with the shorter prompt is behind vLLM's count: it still has to write the last tokens
    of a block that vLLM takes for full. Where these belong to the answer, two answers would write
    different tokens into one shared block.
    """
    find = manager.coordinator.find_longest_cache_hit
    compute = manager.get_computed_blocks

    def limited(request: "Request") -> Any:
        limit = shared.get(request.request_id)

        def find_less(hashes: Any, most: int) -> Any:
            return find(hashes, most if limit is None else min(most, limit))

        manager.coordinator.find_longest_cache_hit = find_less
        try:
            return compute(request)
        finally:
            manager.coordinator.find_longest_cache_hit = find

    manager.get_computed_blocks = limited
