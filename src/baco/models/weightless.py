"""A pair whose weights are elsewhere: tokenizers, templates and configurations alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch

from baco.errors import BacoError
from baco.models.context import context_of, text_config
from baco.models.known_pairs import KnownPair
from baco.models.loading import check_model, explained, load_config, load_tokenizer
from baco.models.model import PairModel
from baco.models.pair import Pair, make_pair
from baco.sampling.params import SamplingParams


@dataclass
class WeightlessModel(PairModel):
    """A half that is known but not loaded.

    Attributes:
        where: its weights are, for messages: ``vLLM``, ``its server``.
    """

    where: str = ""

    @property
    def held(self) -> str:
        return f"by {self.where}"

    @cached_property
    def rows(self) -> int:
        return int(text_config(self.model.config).vocab_size)

    @cached_property
    def context(self) -> int:
        return context_of(self.model.config)


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """Stands for a model of which only the configuration is here."""

    name: str
    where: str
    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device:
        """Where what is computed of its rows in this process is kept."""
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
        """None are here."""
        return []

    def named_modules(self) -> list[Any]:
        """None are here."""
        return []


def describe_pair(
    known: KnownPair,
    where: dict[str, str],
    *,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    trust_remote_code: bool = False,
) -> Pair:
    """A pair for routing, rendering and text; asking its halves for logits is refused.

    Args:
        known: where its tokenizers and configurations are.
        where: each half's weights are, for messages.
        base_template, chat_template, function_words, trust_remote_code: as for
            :func:`baco.models.pair.load_pair`.

    Raises:
        BacoError: what cannot be found or read, or halves that do not fit.
    """
    for name in (known.base, known.aligned):
        check_model(name)
    base_tokenizer = load_tokenizer(known.base, trust_remote_code=trust_remote_code)
    base = _describe(known.base, where["base"], base_tokenizer, trust_remote_code)
    aligned_tokenizer = load_tokenizer(
        known.aligned, fallback=base_tokenizer, trust_remote_code=trust_remote_code
    )
    return make_pair(
        known.name,
        base,
        _describe(known.aligned, where["aligned"], aligned_tokenizer, trust_remote_code),
        base_template=base_template,
        chat_template=chat_template,
        chat_options=dict(known.chat_options),
        function_words=function_words,
        defaults=SamplingParams().updated(known.sampling),
    )


def _describe(name: str, where: str, tokenizer: Any, trust_remote_code: bool) -> WeightlessModel:
    from transformers import GenerationConfig

    config = load_config(name, trust_remote_code=trust_remote_code)
    with explained("the generation settings of", name):
        try:
            generation = GenerationConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        except OSError:
            generation = None  # it is optional: the model's configuration names the end token too
    return WeightlessModel(
        name, _Elsewhere(name, where, config, generation), tokenizer, where=where
    )
