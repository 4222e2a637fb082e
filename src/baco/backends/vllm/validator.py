"""Refuses bad requests as they arrive, with a 400 over HTTP, before any worker sees them.

vLLM lets every logits processor validate the parameters of every request. This one only does that;
it changes no logits.
"""

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

from baco.backends.vllm.options import PREFIX, Limits, PairOptions, structure_named
from baco.errors import BacoError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate


class Guard(LogitsProcessor):
    """Entry point of the group ``vllm.logits_processors``."""

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse what a pair cannot do; ignore the requests of other models."""
        arguments = sampling_params.extra_args or {}
        if Limits.here.vocabulary is None and not any(n.startswith(PREFIX) for n in arguments):
            return
        try:
            PairOptions.read(arguments)
            structure_named(sampling_params.structured_outputs)
        except BacoError as error:
            raise VLLMValidationError(str(error)) from error
        if sampling_params.prompt_logprobs is not None:
            raise VLLMValidationError(
                "prompt_logprobs: a pair has two prompts, and its router starts after them; "
                "request logprobs of the answer"
            )

    def __init__(self, vllm_config: "VllmConfig", device: "torch.device", is_pin_memory: bool):
        pass

    def apply(self, logits: "torch.Tensor") -> "torch.Tensor":
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: "BatchUpdate | None") -> None:
        pass
