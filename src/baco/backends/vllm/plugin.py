"""Announces BACo to vLLM: run by every vLLM process, so it imports next to nothing.

In a vLLM that serves other models it changes nothing: what it registers is looked up by the
architecture's name.
"""

ARCHITECTURE = "BacoForCausalLM"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from baco.backends.vllm.configuration import PairConfiguration

    ModelRegistry.register_model(ARCHITECTURE, f"baco.backends.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PairConfiguration
