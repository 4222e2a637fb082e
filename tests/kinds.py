"""Small tokenizers of every kind, with the spelling of the models that use them."""

import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, BertGenerationTokenizer, PreTrainedTokenizerFast

from tests.test_vocabulary import (
    MORE_TEXT,
    byte_level,
    unigram,
    whole_words,
    word_piece,
)
from tests.test_vocabulary import sentencepiece as metaspace_with_bytes

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    *(
        "▁",
        "▁the",
        "▁a",
        "cat",
        "▁cat",
        "s",
        "▁夏",
        "天",
        "é",
        "▁é",
        ".",
        " ",
        "▁▁",
        "▁▁▁▁",
        "\n",
        "!",
    ),
    *("'s", "▁is", "▁good", "[", "]", "/", "I", *"abcdefghijklmnopqrstuvwxyzT"),
]
# Pieces of what `transformers` cleans up, and a U+FFFD of its own.
MORE_WORDS = ["▁n", "▁'", "n't", "▁.", "▁,", "ve", "\ufffd"]


def fallback(*parts: Any, **options: Any) -> Any:
    """Llama 2, Mistral and Gemma: SentencePiece's BPE with a token for every byte."""
    known = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, *MORE_WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(known))}
    backend = Tokenizer(
        models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(list(parts))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


def llama(left: int = 1, right: int = 0, **options: Any) -> Any:
    strip = decoders.Strip(content=" ", left=left, right=right)
    return fallback(
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip, **options
    )


def gemma() -> Any:
    return fallback(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def late_replace() -> Any:
    """Converted from GGUF: the mark of a space is replaced after bytes are joined."""
    return fallback(decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "))


def spanning_replace() -> Any:
    """A pattern that two tokens may spell together."""
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    return fallback(*parts, decoders.Replace("at", "@"), decoders.Replace(Regex("s+"), "z"))


def cleaned() -> Any:
    """White space cleaned up after decoding, with bytes beside it."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return llama(clean_up_tokenization_spaces=True, **{forced: True})


def metaspace(scheme: str) -> Any:
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in [*WORDS, *MORE_WORDS]], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def cleaned_unigram() -> Any:
    backend = metaspace("always").backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)


def word_ends() -> Any:
    """The first GPT: a mark in a token for the end of a word."""
    words = ["a</w>", "b", "c</w>", ".</w>", "sea</w>", "é", "夏</w>"]
    backend = Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, [], end_of_word_suffix="</w>")
    )
    backend.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def bytes_in_words() -> Any:
    """Byte-level tokens that begin and end in the middle of characters, and added ones."""
    pieces = ["🌊é夏ß"[a:b] for a in range(4) for b in range(a + 1, 5)]
    cuts = [piece.encode()[i:j] for piece in pieces for i in range(4) for j in (None, -1, -2)]
    cuts += [bytes([byte]) for byte in range(256)]
    write = byte_characters()
    spelled = dict.fromkeys("".join(write[byte] for byte in cut) for cut in cuts if cut)
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(spelled)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<think>"), AddedToken("夏")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def byte_characters() -> dict[int, str]:
    """GPT-2's character for every byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = iter(range(256, 512))
    return {byte: chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)}


@cache
def sentencepiece_model() -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(MORE_TEXT.splitlines() * 20),
        model_writer=written,
        vocab_size=700,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


class SentencePieceOwn(BertGenerationTokenizer):  # type: ignore[misc]
    """Decodes by SentencePiece itself, as the older classes of Llama and Baichuan do."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text: str = self.sp_model.decode(tokens)
        return text


FAST: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte level, cut characters": bytes_in_words,
    "llama 2": llama,
    "strips two": partial(llama, 2),
    "strips the end": partial(llama, 1, 1),
    "gemma": gemma,
    "gguf": late_replace,
    "a pattern across tokens": spanning_replace,
    "cleaned up, with bytes": cleaned,
    "metaspace and bytes": metaspace_with_bytes,
    "metaspace always": partial(metaspace, "always"),
    "metaspace first": partial(metaspace, "first"),
    "metaspace never": partial(metaspace, "never"),
    "unigram": unigram,
    "unigram, cleaned up": cleaned_unigram,
    "word piece": word_piece,
    "whole words": whole_words,
    "word ends": word_ends,
}
# Spaces stand between words that no token holds.
IMPLIED = ("word piece", "whole words", "word ends")
SLOW = {"slow": BertGenerationTokenizer, "slow, own": SentencePieceOwn}
