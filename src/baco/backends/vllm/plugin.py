"""Registers a pair's architecture with vLLM. Every vLLM process runs it, so it imports little.

It does not affect other models: vLLM looks up what it registers by the architecture's name.
"""

ARCHITECTURE = "BacoForCausalLM"


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from baco.backends.vllm.configuration import PairConfiguration

    ModelRegistry.register_model(ARCHITECTURE, f"baco.backends.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = PairConfiguration
