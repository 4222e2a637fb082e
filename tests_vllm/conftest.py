"""Pairs that vLLM's attention on CPUs can read, and engines that are closed again."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    NO_COLOR="1",
)

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from tests import pairs

HEAD = 32  # the narrowest head that vLLM's attention on CPUs has


def _mistral(rows: int) -> MistralConfig:
    """All layers have a sliding window, so vLLM would free blocks behind it."""
    return MistralConfig(**pairs._shape(rows), tie_word_embeddings=False, sliding_window=40)


CONFIGS = pairs.CONFIGS | {"mistral": _mistral}


def _wider(make: Callable[[int], Any]) -> Callable[[int], Any]:
    def widened(rows: int) -> Any:
        config = make(rows)
        config.head_dim, config.hidden_size = HEAD, HEAD * config.num_attention_heads
        return config

    return widened


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["BACO_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pair of an architecture, with random weights."""

    @cache
    def saved(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(pairs.CONFIGS, architecture, _wider(CONFIGS[architecture]))
            pairs.save_pair(folder, architecture)
        (folder / "baco.json").write_text('{"dtype": "float32"}')
        return folder

    return saved
