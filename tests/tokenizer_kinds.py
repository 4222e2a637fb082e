"""Tokenizers of the kinds that open models have, trained on a small text.

Each has the normaliser, pre-tokenizer and decoder of the models that it is named after.
"""

import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.pairs import CHAT_TEMPLATE, END, TEXT, TURN_END, TURN_START

MORE_TEXT = """\
The weather in Lisbon is warm, so we walk along the shore with the dog and the cat of the house.
def add(a, b):\n    if a == 0:\n        return b  # no sum\n\n    return a + b\n
1. One line\n2. Another one\n\n- a point\n- a second point\n\nIt's 12,345 or 1000000 or 3.14, no?
안녕하세요 세계 مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก e\u0301te\u0301 “quoted” ‘text’ …
<b>bold</b> camelCase
"""
ALL_TEXT = TEXT + MORE_TEXT
SIZE = 460

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def _wrapped(backend: Tokenizer, **options: Any) -> Any:
    backend.add_special_tokens([END, TURN_START, TURN_END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, clean_up_tokenization_spaces=False, **options
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _byte_level(pattern: str | None, normalizer: Any = None, **options: Any) -> Any:
    backend = Tokenizer(models.BPE(**options))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, encode])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([ALL_TEXT], trainer)
    return _wrapped(backend)


def _superwords() -> Any:
    """Tokens that span words, as in SuperBPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(ALL_TEXT.splitlines(keepends=True), trainer)
    return _wrapped(backend)


def _sentencepiece(*, gemma: bool) -> Any:
    """SentencePiece's BPE with a token for every byte."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if gemma else "always")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator(ALL_TEXT.splitlines(), trainer)
    state = json.loads(trained.to_str())["model"]
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *state["vocab"]]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*known, "▁▁"]))}
    merges = [tuple(merge) for merge in state["merges"]]
    backend = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gemma:
        backend.normalizer = spaces
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n", "▁▁")])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        parts.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(parts)
    return _wrapped(backend, unk_token="<unk>")


def _unigram(scheme: str) -> Any:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    backend.train_from_iterator(ALL_TEXT.splitlines(keepends=True), trainer)
    return _wrapped(backend, unk_token="<unk>")


def unigram_with_bytes(pieces: list[tuple[str, float]]) -> Any:
    """SentencePiece's Unigram with a token for every byte, as in LLM-jp and Sarashina.

    Args:
        pieces: with their scores, without control and unknown tokens.
    """
    lowest = min(score for _, score in pieces)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = [("<unk>", 0.0), *((token, lowest - 10.0) for token in byte_tokens)]
    vocabulary += pieces
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1)])
    return _wrapped(backend, unk_token="<unk>")


def _unigram_with_bytes() -> Any:
    state = json.loads(_unigram("always").backend_tokenizer.to_str())["model"]["vocab"]
    return unigram_with_bytes([(piece, score) for piece, score in state if piece != "<unk>"])


MAKERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: _byte_level(None),
    "llama3": lambda: _byte_level(_LLAMA3, ignore_merges=True),
    "qwen": lambda: _byte_level(_LLAMA3.replace("{1,3}", ""), normalizers.NFC()),
    "tekken": lambda: _byte_level(_TEKKEN),
    "bloom": lambda: _byte_level(_BLOOM),
    "superwords": _superwords,
    "llama2": lambda: _sentencepiece(gemma=False),
    "gemma": lambda: _sentencepiece(gemma=True),
    "unigram": lambda: _unigram("always"),
    "unigram first": lambda: _unigram("first"),
    "unigram bytes": _unigram_with_bytes,
}
KINDS = tuple(MAKERS)


@cache
def tokenizer_of(kind: str) -> Any:
    """The tokenizer of a kind; the same object at every call."""
    return MAKERS[kind]()


def permuted(tokenizer: Any, seed: int) -> tuple[Any, list[int]]:
    """A tokenizer whose ordinary ids are permuted, and the new id of every old one."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    new = list(range(len(model["vocab"])))
    random.Random(seed).shuffle(new)
    if model["type"] == "Unigram":
        pieces = dict(zip(new, model["vocab"], strict=True))
        model["vocab"] = [pieces[id_] for id_ in range(len(new))]
        model["unk_id"] = new[model["unk_id"]]
    else:
        order = sorted(model["vocab"].items(), key=lambda item: new[item[1]])
        model["vocab"] = {token: new[id_] for token, id_ in order}
    for token in state["added_tokens"]:
        if token["id"] < len(new):
            token["id"] = new[token["id"]]
    backend = Tokenizer.from_str(json.dumps(state))
    other = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        unk_token=tokenizer.unk_token,
        clean_up_tokenization_spaces=False,
    )
    other.chat_template = CHAT_TEMPLATE
    return other, [*new, *range(len(new), len(tokenizer))]
