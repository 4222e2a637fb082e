"""A pair whose weights are loaded elsewhere: tokenizers, templates and configurations alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from baco.errors import BacoError
from baco.models import gguf
from baco.models.context import context_of, text_config
from baco.models.known_pairs import KnownPair
from baco.models.loading import (
    Placement,
    check_model,
    explain_errors,
    find_device,
    is_adapter,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
)
from baco.models.model import PairModel
from baco.models.pair import Pair, make_known_pair
from baco.source import Source


@dataclass
class WeightlessModel(PairModel):
    """A model of the pair whose weights are not in this process.

    Attributes:
        where: its weights are, for messages: ``vLLM``, ``its server``.
    """

    where: str = ""

    @property
    def weights_format(self) -> str:
        return f"by {self.where}"

    @cached_property
    def embedding_rows(self) -> int:
        return int(text_config(self.model.config).vocab_size)

    @cached_property
    def context(self) -> int:
        return context_of(self.model.config)


@dataclass(frozen=True, slots=True)
class _ConfigOnly:
    """Takes the place of a ``transformers`` model of which only the configuration is here."""

    name: str
    where: str
    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device:
        """Where this process computes with the model's rows of logits."""
        return torch.device("cpu")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise self._refusal()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refusal()

    def _refusal(self) -> BacoError:
        return BacoError(
            f"{self.name} runs in {self.where}: what reads its weights needs --backend local"
        )

    def modules(self) -> list[Any]:
        """There are none here."""
        return []

    def named_modules(self) -> list[Any]:
        """There are none here."""
        return []


def load_weightless_pair(
    known: KnownPair,
    where: dict[Source, str],
    *,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    trust_remote_code: bool = False,
    separate_tokenizers: bool | None = False,
) -> Pair:
    """A pair for routing, rendering and text; a call of its models is refused.

    Args:
        known: where its tokenizers and configurations are.
        where: the weights of each model are, for messages.
        base_template, chat_template, function_words, trust_remote_code, separate_tokenizers: as for
            :func:`baco.models.pair.load_pair`.

    Raises:
        BacoError: something cannot be found or read, or the models are no pair.
    """
    with gguf.reading(known.base, known.aligned):
        for name in (known.base, known.aligned):
            check_model(name)
        base_tokenizer = load_tokenizer(known.base, trust_remote_code=trust_remote_code)
        base = _load(known.base, where["base"], base_tokenizer, trust_remote_code)
        aligned_tokenizer = load_tokenizer(
            known.aligned, fallback=base_tokenizer, trust_remote_code=trust_remote_code
        )
        aligned = _load(
            known.aligned,
            where["aligned"],
            aligned_tokenizer,
            trust_remote_code,
            configured_by=known.base if is_adapter(known.aligned) else known.aligned,
        )
    return make_known_pair(
        known,
        base,
        aligned,
        base_template=base_template,
        chat_template=chat_template,
        function_words=function_words,
        separate_tokenizers=separate_tokenizers,
    )


def _load(
    name: str,
    where: str,
    tokenizer: Any,
    trust_remote_code: bool,
    configured_by: str | None = None,
) -> WeightlessModel:
    """A model; an adapter is configured by its base model."""
    from transformers import GenerationConfig

    files = configured_by or name
    config = load_config(files, trust_remote_code=trust_remote_code)
    with explain_errors("the generation settings of", files):
        try:
            generation = GenerationConfig.from_pretrained(
                files, trust_remote_code=trust_remote_code
            )
        except OSError:
            generation = None  # optional: the model's configuration names the end token too
    model = _ConfigOnly(name, where, config, generation)
    return WeightlessModel(name, model, tokenizer, where=where)


def save_merged(known: KnownPair, pair: Pair, target: Path, trust_remote_code: bool) -> None:
    """Write the base model of a pair with the adapter that its aligned model is merged into its
    weights, and the aligned tokenizer.
    """
    placement = Placement(find_device("cpu"), known.dtype, trust_remote_code=trust_remote_code)
    model = load_model(known.base, placement)
    merged = load_adapter(model, known.aligned).merge_and_unload()
    merged.save_pretrained(target)
    pair.aligned.tokenizer.save_pretrained(target)
