"""A base model and its aligned sibling: loading both, and checking that they are a pair."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from baco.errors import BacoError, DifferentTokenizersError, UnfitPairError
from baco.models import gguf
from baco.models.dtypes import by_source
from baco.models.forward.adapted import why_not_adapted, without_wrappers
from baco.models.forward.fused_linear import FUSED
from baco.models.forward.packed_linear import own_weights, pack
from baco.models.forward.selection import prepare
from baco.models.joint import JointForward, LlamaCppJoint, joint_forward
from baco.models.known_pairs import KnownPair
from baco.models.loading import (
    Placement,
    check_memory,
    check_model,
    explain_errors,
    is_adapter,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    placements,
)
from baco.models.model import PairModel, count_embedding_rows
from baco.models.own_vocabulary import OwnVocabulary, special_tokens
from baco.routing.router import Router
from baco.sampling.constraint import Constraint, StructureCompiler
from baco.sampling.params import SamplingParams
from baco.sampling.structure import Structure
from baco.source import MODELS, Source
from baco.text.encoder import Limit
from baco.text.prompts import BASE_TEMPLATE, SAME_PROMPT, Limits, Prompt, Renderer
from baco.text.shared_text import TextTokenizer
from baco.text.thinking import ThinkingStart, ThinkingTokens, separators
from baco.text.token_bytes import spell
from baco.text.vocabulary import Vocabulary, load_words

log = logging.getLogger("baco")

_ADVICE = {
    "aligned": "this command or backend needs one tokenizer for both models: take the base model "
    "that the aligned one was made from",
    "adapter": "take the base model that the adapter was trained on",
    "draft": "take a draft model of the pair's own family and tokenizer",
}
# Conversations that templates are tried with: turn marks surround each kind of message.
_CONVERSATIONS = tuple(
    [
        *({"role": "system", "content": "Be brief."} for _ in range(system)),
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": "When?"},
    ]
    for system in (0, 1)
)


@dataclass
class Pair:
    """Two models that agree on the id of every ordinary token.

    Attributes:
        name: short name, or the names of both models.
        base, aligned: the models; their logits are on the common vocabulary of V ids.
        tokenizer: the aligned model's, for the answers.
        vocabulary: word starts, roles and special tokens of all ids.
        renderer: renders one conversation as two prompts. Its marks enclose the thinking of the
            aligned model.
        end_ids: tokens of either model that end an answer.
        banned: bool [V], tokens that are never drawn from the base model: special tokens, and the
            marks of thinking.
        defaults: sampling parameters where the caller gives none.
        own_vocabularies: the tables of each model over its own ids, where the models have different
            tokenizers and share the text of answers instead of token ids (experimental);
            ``tokenizer``, ``vocabulary``, ``end_ids`` and ``banned`` are then the aligned model's.
            None where the models have one tokenizer.
        lock: held while the models run, because some forwards change their model: they turn an
            adapter off, or replace a mask. So several threads can decode with one pair, and a
            user's router can decode with the pair while a step is routed.
    """

    name: str
    base: PairModel
    aligned: PairModel
    tokenizer: Any
    vocabulary: Vocabulary
    renderer: Renderer
    end_ids: frozenset[int]
    banned: Tensor
    defaults: SamplingParams = field(default_factory=SamplingParams)
    own_vocabularies: dict[Source, OwnVocabulary] | None = None
    lock: RLock = field(default_factory=RLock, repr=False)

    def model(self, source: Source) -> PairModel:
        """The base or the aligned model."""
        return self.base if source == "base" else self.aligned

    def spelling(self, token: int, source: Source = "aligned") -> bytes:
        """The bytes of text that a token stands for, which may begin or end inside a character;
        the name of a special token. ``source`` is the model whose id it is, where that matters.
        """
        if self.own_vocabularies is not None and source == "base":
            return self._base_spellings.get(token, b"")
        return self._spellings.get(token, b"")

    def tokens_with(self, texts: Sequence[str]) -> list[int]:
        """The aligned model's tokens that contain any of some texts."""
        parts = [text.encode() for text in texts]
        size = self.vocabulary.size
        return [
            token
            for token, spelling in self._spellings.items()
            if token < size and any(part in spelling for part in parts)
        ]

    def vocabulary_of(self, source: Source) -> Vocabulary:
        """The vocabulary of a model: its own one where the tokenizers differ."""
        own = self.own_vocabularies
        return self.vocabulary if own is None else own[source].vocabulary

    def tokenizer_of(self, source: Source) -> Any:
        """The tokenizer of a model's ids: its own one where the tokenizers differ."""
        return self.tokenizer if self.own_vocabularies is None else self.model(source).tokenizer

    def end_ids_of(self, source: Source) -> frozenset[int]:
        """The tokens of a model that end an answer."""
        own = self.own_vocabularies
        return self.end_ids if own is None else own[source].end_ids

    @property
    def text_tokenizers(self) -> dict[Source, TextTokenizer] | None:
        """The tokenizer of each model, where they differ."""
        if self.own_vocabularies is None:
            return None
        return {source: own.tokenizer for source, own in self.own_vocabularies.items()}

    def check_one_tokenizer(self, what: str) -> None:
        """Raise BacoError where the models have different tokenizers and ``what`` needs one."""
        if self.own_vocabularies is not None:
            raise BacoError(f"{what} needs one tokenizer for both models, and {self.name} has two")

    def check_prompt(self, prompt: Prompt) -> None:
        """Refuse a prompt that one of the models cannot read; see
        :meth:`PairModel.check_prompt`.
        """
        self.base.check_prompt("base", prompt.base_ids)
        self.aligned.check_prompt("aligned", prompt.aligned_ids)

    def constraints(
        self, structure: Structure, *, joining_space: bool = False
    ) -> dict[Source, Constraint]:
        """A structure of answers as an automaton over the tokens of each model. It is the same one
        where they share a tokenizer.

        Args:
            structure: of an answer's text.
            joining_space: whether one space may precede the text.

        Raises:
            BacoError: the structure cannot be compiled, or the tokenizer's tokens do not join to a
                text.
        """
        aligned = self.structures.compile(structure, joining_space=joining_space)
        if self.own_vocabularies is None:
            return {"base": aligned, "aligned": aligned}
        base = self._base_structures.compile(structure, joining_space=joining_space)
        return {"base": base, "aligned": aligned}

    @cached_property
    def structures(self) -> StructureCompiler:
        """Compiles the structures of answers for ``vocabulary``; errors as for `constraints`."""
        if self.own_vocabularies is not None:
            return _own_structures(self.own_vocabularies["aligned"], self.aligned)
        data = [b""] * self.vocabulary.size
        for token in spell(self.tokenizer):
            if token.apart is not None:
                raise BacoError(
                    f"the tokenizer of {self.aligned.name} puts spaces between tokens, so the text "
                    "of an answer cannot be followed: structured answers need byte-level BPE or "
                    "SentencePiece"
                )
            if token.id < len(data) and not token.special:
                data[token.id] = token.data
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        special = self.banned.nonzero()[:, 0].tolist()
        return StructureCompiler(data, self.end_ids, special, encode)

    @cached_property
    def _base_structures(self) -> StructureCompiler:
        assert self.own_vocabularies is not None
        return _own_structures(self.own_vocabularies["base"], self.base)

    @cached_property
    def joint(self) -> JointForward | LlamaCppJoint | str:
        """One forward over the rows of both models; where there is none, the reason."""
        return joint_forward(self.base, self.aligned)

    def thinking_tokens(self, start: ThinkingStart | None) -> ThinkingTokens | None:
        """How the thinking is recognised behind a prompt; None where there can be none."""
        marks = self.renderer.marks
        if start is None or marks is None:
            return None
        begin = None if start == "begun" else marks.begin_id
        return ThinkingTokens(begin, marks.end_id, self._separators)

    @cached_property
    def _separators(self) -> frozenset[int]:
        assert self.renderer.marks is not None
        return separators(self.tokenizer, self.renderer.marks, self.end_ids)

    @property
    def shares_weights(self) -> bool:
        """Is it one model under two prompts, or a base model and an adapter over it?"""
        return self.base.model is self.aligned.model

    @property
    def weights_formats(self) -> dict[str, str]:
        """The number format and the device of each model's weights."""
        return {source: self.model(source).weights_format for source in MODELS}

    def limits(self, router: Router, explain: bool = False) -> Limits:
        """How long a prompt may be so that an answer can follow, for each model that reads it."""
        needed = MODELS if explain or router.only is None else (router.only,)
        contexts = {source: self.model(source).context for source in needed}
        return {source: Limit(source, context, context - 1) for source, context in contexts.items()}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the pair: names, configurations, templates and a few numbers of most weights.

        It does not depend on the layout of the weights in memory: layers that can be fused into
        another are left out, and shared weights count once. It is computed once.
        """
        digest = hashlib.sha256()
        for model, template in (
            (self.base, self.renderer.base_template),
            (self.aligned, self.renderer.aligned_template),
        ):
            config = model.model.config.to_dict()
            config.pop("transformers_version", None)  # an upgrade does not change the model
            text = f"{model.name} {json.dumps(config, sort_keys=True, default=str)}"
            digest.update(text.encode())
            digest.update(str(template).encode())
            digest.update(str(sorted(_weight_samples(model.model))).encode())
        if self.own_vocabularies is not None:
            digest.update(b"separate tokenizers")
        return digest.hexdigest()[:16]

    @cached_property
    def _spellings(self) -> dict[int, bytes]:
        return _spellings_of(self.tokenizer)

    @cached_property
    def _base_spellings(self) -> dict[int, bytes]:
        return _spellings_of(self.base.tokenizer)


def _spellings_of(tokenizer: Any) -> dict[int, bytes]:
    names = tokenizer.convert_ids_to_tokens
    return {t.id: names(t.id).encode() if t.special else t.data for t in spell(tokenizer)}


@torch.inference_mode()
def _weight_samples(model: Any) -> set[str]:
    """The first numbers of each weight, except of layers that can be fused into another."""
    fused = {name for names in FUSED.values() for name in names[1:]}
    # Weights that are offloaded to disk have no samples; quantised ones are not always floats.
    seen: set[int] = set()
    samples = [
        sample
        for name, module in model.named_modules()
        if name.rpartition(".")[2] not in fused
        for sample, _, _ in own_weights(module, seen)
        if len(sample)
    ]
    numbers = set[str]()
    for device in dict.fromkeys(sample.device for sample in samples):
        floats = [sample.float() for sample in samples if sample.device == device]
        values = iter(torch.cat(floats).tolist())  # one wait per device
        numbers |= {str(list(islice(values, len(sample)))) for sample in floats}
    return numbers


def differing_tokens(base_tokenizer: Any, aligned_tokenizer: Any) -> list[str]:
    """The ordinary tokens on whose id two tokenizers disagree, in the order of their ids.

    Special and added tokens may differ: chat models rename reserved ones and add their own.
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
    return [token for _, token in sorted(differing)]


def check_vocabularies(
    base_tokenizer: Any, aligned_tokenizer: Any, names: tuple[str, str] = ("base", "aligned")
) -> None:
    """Refuse models that disagree on the id of an ordinary token, naming the first such token.

    Args:
        base_tokenizer, aligned_tokenizer: of the two models.
        names: of the two models, for the error.

    Raises:
        DifferentTokenizersError: the two vocabularies differ.
    """
    differing = differing_tokens(base_tokenizer, aligned_tokenizer)
    if differing:
        base, aligned = base_tokenizer.get_vocab(), aligned_tokenizer.get_vocab()
        token = differing[0]
        raise DifferentTokenizersError(
            f"vocabularies differ at token {token!r}: id {base.get(token)} in the {names[0]} "
            f"model, {aligned.get(token)} in the {names[1]} model ({len(differing)} tokens "
            f"differ); {_ADVICE[names[1]]}"
        )


def have_different_tokenizers(known: KnownPair, *, trust_remote_code: bool = False) -> bool:
    """Whether the tokenizers of a pair disagree on an ordinary token. No weights are loaded.

    Raises:
        BacoError: a tokenizer cannot be found or loaded.
    """
    if known.base == known.aligned or is_adapter(known.aligned):
        return False
    with gguf.reading(known.base, known.aligned):
        tokenizers = [
            load_tokenizer(name, trust_remote_code=trust_remote_code)
            for name in (known.base, known.aligned)
        ]
        return bool(differing_tokens(*tokenizers))


def make_pair(
    name: str,
    base: PairModel,
    aligned: PairModel,
    *,
    base_template: str | None = None,
    chat_template: str | None = None,
    chat_options: dict[str, Any] | None = None,
    function_words: str | Iterable[str] | None = None,
    defaults: SamplingParams | None = None,
    separate_tokenizers: bool | None = None,
) -> Pair:
    """Join two loaded models into a pair and check it.

    Args:
        separate_tokenizers: True lets the models share text instead of token ids (experimental),
            False refuses models with different tokenizers; None shares text where they differ.

    Raises:
        BacoError: the models are no pair, or a template or word list cannot be read.
    """
    words = {} if function_words is None else {"function_words": load_words(function_words)}
    base_template = BASE_TEMPLATE if base_template is None else base_template
    differing: list[str] = []
    with explain_errors("the tokenizer of", aligned.name):
        if separate_tokenizers is None:
            differing = differing_tokens(base.tokenizer, aligned.tokenizer)
        elif not separate_tokenizers:
            check_vocabularies(base.tokenizer, aligned.tokenizer)
    if differing:
        log.warning(
            "%s: the models have different tokenizers (%d tokens differ, the first is %r), so each "
            "keeps token ids of its own and the pair is decoded by text (experimental)",
            name,
            len(differing),
            differing[0],
        )
    if separate_tokenizers or differing:
        return _make_pair_sharing_text(
            name,
            base,
            aligned,
            base_template,
            chat_template,
            chat_options or {},
            words,
            defaults or SamplingParams(),
        )
    with explain_errors("the tokenizer of", aligned.name):
        size = max(aligned.tokenizer.get_vocab().values()) + 1
        vocabulary = Vocabulary.from_tokenizer(aligned.tokenizer, size, **words)
        unknown_ids = _unknown_ids(base.tokenizer, aligned.tokenizer, size)
    end_ids = frozenset(end for end in base.end_ids | aligned.end_ids if end < size)
    if not end_ids:
        log.warning("%s: neither model names an end token, answers end at max_tokens", name)
    pair = Pair(
        name=name,
        base=base.with_common_vocab(size, unknown_ids),
        aligned=aligned.with_common_vocab(size, torch.zeros(size, dtype=torch.bool)),
        tokenizer=aligned.tokenizer,
        vocabulary=vocabulary,
        renderer=Renderer(
            base.tokenizer,
            aligned.tokenizer,
            base_template,
            chat_template,
            chat_options or {},
        ),
        end_ids=end_ids,
        banned=special_tokens(vocabulary, end_ids, aligned.tokenizer),
        defaults=defaults or SamplingParams(),
    )
    _check_embeddings(pair)
    return pair


def _own_structures(own: OwnVocabulary, model: PairModel) -> StructureCompiler:
    """Compiles structures for the tokens of one model."""
    special = special_tokens(own.vocabulary, own.end_ids, model.tokenizer).nonzero()[:, 0].tolist()
    encode = partial(model.tokenizer.encode, add_special_tokens=False)
    return StructureCompiler(own.tokenizer.data, own.end_ids, special, encode)


def make_known_pair(known: KnownPair, base: PairModel, aligned: PairModel, **options: Any) -> Pair:
    """`make_pair` with the name and the settings of a known pair."""
    return make_pair(
        known.name,
        base,
        aligned,
        chat_options=dict(known.chat_options),
        defaults=SamplingParams().updated(known.sampling),
        **options,
    )


def _make_pair_sharing_text(
    name: str,
    base: PairModel,
    aligned: PairModel,
    base_template: str,
    chat_template: str | None,
    chat_options: dict[str, Any],
    words: Mapping[str, Any],
    defaults: SamplingParams,
) -> Pair:
    """`make_pair` for models with different tokenizers."""
    if base_template == SAME_PROMPT:
        raise BacoError(
            f"base_template is {SAME_PROMPT!r}, which needs one tokenizer for both models: give "
            "the base model a template of its own"
        )
    models: dict[Source, PairModel] = {"base": base, "aligned": aligned}
    own: dict[Source, OwnVocabulary] = {}
    for source, model in models.items():
        with explain_errors("the tokenizer of", model.name):
            own[source] = OwnVocabulary.of(model, source, **words)
        size = own[source].vocabulary.size
        models[source] = model.with_common_vocab(size, torch.zeros(size, dtype=torch.bool))
    if not any(vocabulary.end_ids for vocabulary in own.values()):
        log.warning("%s: neither model names an end token, answers end at max_tokens", name)
    pair = Pair(
        name=name,
        base=models["base"],
        aligned=models["aligned"],
        tokenizer=aligned.tokenizer,
        vocabulary=own["aligned"].vocabulary,
        renderer=Renderer(
            base.tokenizer, aligned.tokenizer, base_template, chat_template, chat_options
        ),
        end_ids=own["aligned"].end_ids,
        banned=own["aligned"].banned,
        defaults=defaults,
        own_vocabularies=own,
    )
    _check_embeddings(pair)
    return pair


def _check_embeddings(pair: Pair) -> None:
    """Refuse a model whose prompts hold tokens that it has no embedding for.

    Ordinary tokens and those of its own template count. Other special tokens may lack an embedding:
    the tokenizers of Gemma 3's smallest models have a token for images that the models lack.
    """
    for source in MODELS:
        model = pair.model(source)
        if not model.ids_without_embedding:
            continue
        added = {*model.tokenizer.added_tokens_decoder, *model.tokenizer.all_special_ids}
        missing = model.ids_without_embedding - added
        for conversation in _CONVERSATIONS:
            with contextlib.suppress(BacoError):  # some templates refuse some conversations
                prompt = pair.renderer.render(conversation)
                ids = prompt.base_ids if source == "base" else prompt.aligned_ids
                missing |= model.ids_without_embedding.intersection(ids)
        if missing:
            raise UnfitPairError(
                f"{model.name} has {model.embedding_rows} rows of embeddings and reads tokens "
                f"beyond them: {model.list_tokens(missing)}; give the model that its tokenizer and "
                f"template are made for, with at least {max(missing) + 1} rows, or a template "
                "without these tokens"
            )


def _unknown_ids(tokenizer: Any, aligned_tokenizer: Any, size: int) -> Tensor:
    """The ids of the common vocabulary that a model does not have, bool [size]."""
    own, common = tokenizer.get_vocab(), aligned_tokenizer.get_vocab()
    known = [id_ for token, id_ in own.items() if id_ < size and common.get(token) == id_]
    unknown = torch.ones(size, dtype=torch.bool)
    unknown[sorted(known)] = False
    return unknown


def load_pair(
    known: KnownPair,
    *,
    dtype: Any = None,
    device: Any = None,
    quantize: Any = None,
    base_template: str | None = None,
    chat_template: str | None = None,
    function_words: str | Iterable[str] | None = None,
    packed: bool = True,
    trust_remote_code: bool = False,
    separate_tokenizers: bool | None = None,
    **model_options: Any,
) -> Pair:
    """Load both models with ``transformers`` and join them.

    Args:
        known: where the models are. An ``aligned`` that is a PEFT adapter is put over the base
            model, whose weights are then held once.
        dtype: of the weights: float32, bfloat16 or float16; by default the pair's own, else
            bfloat16 where the device multiplies it natively and float32 elsewhere. ``dtype``,
            ``device`` and ``quantize`` are one value for both models or one for each:
            ``{"base": …, "aligned": …}``.
        device: such as ``cpu``, ``cuda:1``; by default the GPU where there is one.
        quantize: hold linear layers in ``int8`` or ``int4`` (torchao). Checkpoints that are
            quantized already load as they are.
        base_template, chat_template: see :class:`baco.text.prompts.Renderer`.
        function_words: a word list by name, by file, or as words; English by default.
        packed: lay weights on a CPU out for its matrix kernels
            (:mod:`baco.models.forward.packed_linear`). Weights that will be changed after loading
            must stay plain.
        trust_remote_code: run the Python code that comes with a model, as some architectures need.
            Without it such a model is refused.
        separate_tokenizers: give each model token ids of its own; the models then share the text
            of answers (experimental). By default where their tokenizers differ; False refuses such
            models.
        model_options: passed to ``from_pretrained``: device_map, quantization_config, …

    Raises:
        BacoError: a model cannot be found or loaded, or the models are no pair.
    """
    if dtype is None:
        dtype = known.dtype
    placed = placements(dtype, device, quantize, model_options, trust_remote_code=trust_remote_code)
    with gguf.reading(known.base, known.aligned):
        for name in (known.base, known.aligned):
            check_model(name)
            check_memory(name)
        base, aligned = _load_models(known, placed, packed, separate_tokenizers)
    return make_known_pair(
        known,
        base,
        aligned,
        base_template=base_template,
        chat_template=chat_template,
        function_words=function_words,
        separate_tokenizers=separate_tokenizers,
    )


def _load_models(
    known: KnownPair,
    placed: dict[Source, Placement],
    packed: bool,
    separate_tokenizers: bool | None,
) -> tuple[PairModel, PairModel]:
    trust = placed["base"].trust_remote_code
    load_config(known.base, trust_remote_code=trust)  # a clearer error than the tokenizer's
    base_tokenizer = load_tokenizer(known.base, trust_remote_code=trust)
    if is_adapter(known.aligned):
        if placed["base"] != placed["aligned"]:
            raise BacoError(
                f"{known.aligned} is an adapter over the base model's own weights: give one "
                "device, dtype and quantize for both models"
            )
        aligned_tokenizer = load_tokenizer(
            known.aligned, fallback=base_tokenizer, trust_remote_code=trust
        )
        check_vocabularies(base_tokenizer, aligned_tokenizer, ("base", "adapter"))
        model = load_model(known.base, placed["base"])
        rows = count_embedding_rows(model)
        model = load_adapter(model, known.aligned)
        if packed:
            with explain_errors("the adapter", known.aligned):
                lay_out_adapted(model)
        base = PairModel(
            known.base, model, base_tokenizer, adapter_off=True, rows_without_adapter=rows
        )
        return base, PairModel(known.aligned, model, aligned_tokenizer)
    if known.base == known.aligned and placed["base"] == placed["aligned"]:
        # One model under two prompts.
        model = load_model(known.base, placed["base"])
        if packed:
            with explain_errors("the model", known.base):
                lay_out(model)
        base = PairModel(known.base, model, base_tokenizer)
        return base, replace(base)
    load_config(known.aligned, trust_remote_code=trust)
    # Tokenizers first, so that a pair that does not fit is refused before any weights are loaded.
    aligned_tokenizer = load_tokenizer(known.aligned, trust_remote_code=trust)
    if separate_tokenizers is False:
        check_vocabularies(base_tokenizer, aligned_tokenizer)
    models = {}
    for source in MODELS:
        name = known.base if source == "base" else known.aligned
        models[source] = load_model(name, placed[source])
        if packed:
            # Before the other model is loaded, so that the plain weights make room.
            with explain_errors("the model", name):
                lay_out(models[source])
    return (
        PairModel(known.base, models["base"], base_tokenizer),
        PairModel(known.aligned, models["aligned"], aligned_tokenizer),
    )


def lay_out(model: Any) -> None:
    """Lay a model's weights out for decoding, in place."""
    prepare(PairModel(type(model).__name__, model, None))
    pack(model)


def lay_out_adapted(model: Any) -> None:
    """Lay a PEFT model's weights out for decoding, in place."""
    if why_not_adapted(model) is None:
        with without_wrappers(model) as base:
            lay_out(base)
    pack(model)


def load_draft(
    name: str,
    pair: Pair,
    *,
    dtype: Any = None,
    packed: bool = True,
    trust_remote_code: bool = False,
) -> PairModel:
    """Load a small model that drafts for a pair, on the aligned model's device.

    Raises:
        BacoError: the model cannot be loaded, has another vocabulary, or cannot draft.
    """
    dtypes = by_source("dtype", dtype)
    placement = Placement(
        pair.aligned.device, dtypes["aligned"], trust_remote_code=trust_remote_code
    )
    with gguf.reading(name):
        check_model(name)
        check_memory(name)
        for model in (pair.base, pair.aligned):
            if not model.can_roll_back:
                raise BacoError(
                    f"the cache of {model.name} cannot be rolled back, so nothing can draft for it"
                )
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        check_vocabularies(pair.tokenizer, tokenizer, ("aligned", "draft"))
        weights = load_model(name, placement)
    if packed:
        lay_out(weights)
    size = pair.vocabulary.size
    unknown_ids = _unknown_ids(tokenizer, pair.tokenizer, size)
    draft = PairModel(name, weights, tokenizer).with_common_vocab(size, unknown_ids)
    if not draft.can_roll_back:
        raise BacoError(
            f"the cache of {name} cannot be rolled back: use a transformer as draft model"
        )
    return draft
