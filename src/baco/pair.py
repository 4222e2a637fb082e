"""A base model and its aligned sibling: loading both, and checking that they fit."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from baco.errors import BacoError, UnfitPairError
from baco.half import Half
from baco.known import KnownPair
from baco.lean import prepare
from baco.packing import pack
from baco.prompts import BASE_TEMPLATE, Renderer, template_source
from baco.sampling import SamplingParams
from baco.tokens import spell
from baco.vocabulary import Vocabulary, load_words

log = logging.getLogger("baco")


@dataclass
class Pair:
    """Two halves that agree on the id of every ordinary token.

    Attributes:
        name: short name, or both halves' names.
        base, aligned: the halves; their logits come on the common vocabulary of V ids.
        tokenizer: the aligned half's, for the answers.
        vocabulary: what every id is.
        renderer: one conversation, two prompts.
        end_ids: tokens that end an answer, of either half.
        banned: bool [V], special tokens the base model may never say.
        defaults: sampling parameters where the caller gives none.
    """

    name: str
    base: Half
    aligned: Half
    tokenizer: Any
    vocabulary: Vocabulary
    renderer: Renderer
    end_ids: frozenset[int]
    banned: Tensor
    defaults: SamplingParams = field(default_factory=SamplingParams)

    def spelling(self, token: int) -> bytes:
        """The bytes of text that a token stands for, which may begin or end inside a character.

        A special token's are its name.
        """
        return self._spellings.get(token, b"")

    @cached_property
    def _spellings(self) -> dict[int, bytes]:
        names = self.tokenizer.convert_ids_to_tokens
        return {t.id: names(t.id).encode() if t.special else t.data for t in spell(self.tokenizer)}


def check_vocabularies(base_tokenizer: Any, aligned_tokenizer: Any) -> None:
    """Refuse halves that spell an ordinary token with different ids, naming the first such token.

    Special and added tokens may differ: chat models rename reserved ones and bring their own.

    Raises:
        UnfitPairError: the two vocabularies differ.
    """
    base, aligned = base_tokenizer.get_vocab(), aligned_tokenizer.get_vocab()
    added = {
        str(token)
        for tokenizer in (base_tokenizer, aligned_tokenizer)
        for token in tokenizer.added_tokens_decoder.values()
    }
    added |= {*base_tokenizer.all_special_tokens, *aligned_tokenizer.all_special_tokens}
    differing = [
        (base.get(token, aligned.get(token)), token)
        for token in base.keys() | aligned.keys()
        if token not in added and base.get(token) != aligned.get(token)
    ]
    if differing:
        _, token = min(differing)
        raise UnfitPairError(
            f"vocabularies differ at token {token!r}: id {base.get(token)} in the base model, "
            f"{aligned.get(token)} in the aligned model ({len(differing)} tokens differ); "
            "a pair needs one tokenizer, so take the base model the aligned one was made from"
        )


def make_pair(
    name: str,
    base: Half,
    aligned: Half,
    *,
    base_template: str | None = None,
    chat_template: str | None = None,
    chat_options: dict[str, Any] | None = None,
    function_words: str | Iterable[str] | None = None,
    defaults: SamplingParams | None = None,
) -> Pair:
    """Join two loaded halves into a pair, checked.

    Raises:
        BacoError: the halves do not fit, a template or word list that cannot be read.
    """
    check_vocabularies(base.tokenizer, aligned.tokenizer)
    base_ids, aligned_ids = base.tokenizer.get_vocab(), aligned.tokenizer.get_vocab()
    width = max(aligned_ids.values()) + 1
    known = {
        id_ for token, id_ in base_ids.items() if id_ < width and aligned_ids.get(token) == id_
    }
    unknown = torch.ones(width, dtype=torch.bool)
    unknown[sorted(known)] = False
    words = {} if function_words is None else {"function_words": load_words(function_words)}
    vocabulary = Vocabulary.from_tokenizer(aligned.tokenizer, width, **words)
    end_ids = frozenset(end for end in base.end_ids | aligned.end_ids if end < width)
    if not end_ids:
        log.warning("%s: neither model names an end token, answers end at max_tokens", name)
    banned = vocabulary.special.clone()
    banned[sorted(end_ids)] = False
    return Pair(
        name=name,
        base=base.on(width, unknown),
        aligned=aligned.on(width, torch.zeros(width, dtype=torch.bool)),
        tokenizer=aligned.tokenizer,
        vocabulary=vocabulary,
        renderer=Renderer(
            base.tokenizer,
            aligned.tokenizer,
            BASE_TEMPLATE if base_template is None else base_template_source(base_template),
            None if chat_template is None else template_source(chat_template),
            chat_options or {},
        ),
        end_ids=end_ids,
        banned=banned,
        defaults=defaults or SamplingParams(),
    )


def base_template_source(template: str) -> str:
    """``aligned`` as it is; else the Jinja text or the file that holds it."""
    return template if template == "aligned" else template_source(template)


def load_pair(
    known: KnownPair,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    packed: bool = True,
    **model_options: Any,
) -> Pair:
    """Load both halves with ``transformers`` and join them.

    Args:
        known: where the halves are. An ``aligned`` that is a PEFT adapter is put over the base
            model, whose weights are then held once.
        dtype: of the weights; by default the checkpoint's own, float32 for float16 on a CPU.
        device: such as ``cpu``, ``cuda:1``; by default the GPU where there is one.
        device_map, quantization_config, model_options: handed to ``from_pretrained``.
        base_template, chat_template: see :class:`baco.prompts.Renderer`.
        function_words: a word list by name, by file, or as words; English by default.
        packed: lay weights on a CPU out for its matrix kernels (:mod:`baco.packing`). Weights that
            are to be changed after loading must stay plain.

    Raises:
        BacoError: a model that cannot be found or loaded, or that does not fit.
    """
    options = dict(model_options)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if device_map is not None:
        options["device_map"] = device_map
    place = None if device_map is not None else _device(device)
    for name in (known.base, known.aligned):
        _check_folder(name)
    base_tokenizer = _load_tokenizer(known.base)
    if _is_adapter(known.aligned):
        aligned_tokenizer = _load_tokenizer(known.aligned, fallback=base_tokenizer)
        check_vocabularies(base_tokenizer, aligned_tokenizer)
        model = _load_adapter(_load_model(known.base, dtype, place, options), known.aligned)
        base = Half(known.base, model, base_tokenizer, bare=True)
        aligned = Half(known.aligned, model, aligned_tokenizer)
    else:
        # Tokenizers first: a pair that does not fit should not cost the loading of two models.
        aligned_tokenizer = _load_tokenizer(known.aligned)
        check_vocabularies(base_tokenizer, aligned_tokenizer)
        base = Half(known.base, _load_model(known.base, dtype, place, options), base_tokenizer)
        aligned = Half(
            known.aligned, _load_model(known.aligned, dtype, place, options), aligned_tokenizer
        )
    if packed:
        for model in {id(half.model): half.model for half in (base, aligned)}.values():
            prepare(model)
            pack(model)
    return make_pair(
        known.name,
        base,
        aligned,
        base_template=base_template,
        chat_template=chat_template,
        chat_options=dict(known.chat_options),
        function_words=function_words,
        defaults=SamplingParams().updated(known.sampling),
    )


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BacoError(f"device {name!r} cannot be used here: {_line(error)}") from error
    return device


def _check_folder(name: str) -> None:
    """A path that is meant as a folder must be one, with weights that fit in memory."""
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise BacoError(f"no such model folder: {name}; give a folder or a hub id")
        return
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if size > free and not torch.cuda.is_available():
        raise BacoError(
            f"the weights in {name} take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of "
            "memory are free: use a smaller model, quantisation or a larger machine"
        )


def _load_tokenizer(name: str, fallback: Any = None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if fallback is not None:
            return fallback
        raise BacoError(f"cannot load the tokenizer of {name}: {_line(error)}") from error


def _load_model(
    name: str, dtype: str | torch.dtype | None, device: torch.device | None, options: dict[str, Any]
) -> Any:
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto" and not hasattr(torch, dtype):
        raise BacoError(f"dtype {dtype!r}: use auto, float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BacoError(f"cannot load the model {name}: {_line(error)}") from error
    if dtype is None and model.dtype == torch.float16 and model.device.type == "cpu":
        model = model.float()  # half precision is slow and coarse on a CPU
    if device is not None and not getattr(model, "is_quantized", False):
        model = model.to(device)
    return model.eval()


def _is_adapter(name: str) -> bool:
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):
        return False


def _load_adapter(model: Any, name: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise BacoError(
            f"{name} is a PEFT adapter: install it with pip install 'baco[peft]'"
        ) from error
    try:
        return PeftModel.from_pretrained(model, name).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BacoError(f"cannot put the adapter {name} over the base: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The first line of another library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
