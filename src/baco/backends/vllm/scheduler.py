"""vLLM's scheduler, for a pair: sources go out with tokens, and shared blocks hold prompts only."""

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from baco.backends.vllm.options import PREFIX, PairOptions
from baco.backends.vllm.sources import sources_of
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

# In a request output's ``kv_transfer_params``, the one field of vLLM's outputs that is free in form
# and comes with every one of them: a letter a token, ``b`` or ``a``, from the answer's start.
SOURCES = f"{PREFIX}sources"


class _PairScheduling(_Scheduler):
    """To be mixed in before a scheduler of vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._said: dict[str, str] = {}
        self._shared: dict[str, int] = {}
        _share_prompts_only(self.kv_cache_manager, self._shared)

    def add_request(self, request: "Request") -> None:
        """As vLLM does. What `Guard` cannot see, as it does not know the prompt, ends here in an
        error of that request alone.
        """
        params, length = request.sampling_params, request.num_prompt_tokens
        arguments = params.extra_args if params is not None else None
        try:
            options = PairOptions.read(arguments)
            options.check_prompt(length, self.vllm_config.model_config.get_vocab_size())
        except BacoError as error:
            log.error("request %s: %s", request.request_id, error)
            # Until vLLM collects such requests, no worker may see what is wrong with it.
            params.extra_args = None
            self.grammar_compile_error_reqs.add(request.request_id)
            options = PairOptions.read(None)
        aligned = length - options.fill
        self._shared[request.request_id] = min(len(options.base_ids or ()) or aligned, aligned)
        super().add_request(request)

    def update_from_output(
        self, scheduler_output: "SchedulerOutput", model_runner_output: "ModelRunnerOutput"
    ) -> "dict[int, EngineCoreOutputs]":
        """As vLLM does, with the sources of the tokens that stand."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        told = sources_of(model_runner_output)
        for client in outputs.values():
            for output in client.outputs:
                previous_source = told.get(output.request_id, [])[: len(output.new_token_ids)]
                said = self._said.pop(output.request_id, "") + "".join(
                    "ab"[b] for b in previous_source
                )
                if not output.finished:
                    self._said[output.request_id] = said
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), SOURCES: said}
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """As vLLM does, for requests that are given up."""
        ended = super().finish_requests(request_ids, finished_status)
        for request in ended:
            self._said.pop(request.request_id, None)
        return ended

    def _free_request(self, request: "Request", *args: Any, **kwargs: Any) -> Any:
        self._shared.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class PairScheduler(_PairScheduling, Scheduler):
    """Where the host waits for every step."""


class PairAsyncScheduler(_PairScheduling, AsyncScheduler):
    """Where the next step is laid out while the device is at the last."""


def pair_scheduler(vllm_config: "VllmConfig", **rest: Any) -> Scheduler:
    """The scheduler that a configuration asks for; vLLM calls it in the place of a class."""
    kind = PairAsyncScheduler if vllm_config.scheduler_config.async_scheduling else PairScheduler
    return kind(vllm_config=vllm_config, **rest)


def _share_prompts_only(manager: "KVCacheManager", shared: dict[str, int]) -> None:
    """Take from the prefix cache only blocks that hold prompt in both halves.

    The half with the shorter prompt is ahead of vLLM's count: the last tokens of a block that vLLM
    holds for full are still to be written by it, and where they are of the answer, two answers
    would write different ones into one shared block.
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
