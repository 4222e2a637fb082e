"""Long prompts are encoded in pieces: the ids equal those of one call, and the work can stop."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from baco import Baco, BacoError
from baco.text import encoder as module
from baco.text.encoder import Encoder, Limit
from tests.fuzzing import budget
from tests.pairs import TEXT, train_tokenizer, wrapped

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"


def byte_level() -> PreTrainedTokenizerFast:
    return wrapped(train_tokenizer(), aligned=True)


def composed() -> PreTrainedTokenizerFast:
    """Byte-level, with NFC normalisation and GPT-4's splits (Qwen, Llama 3)."""
    backend = train_tokenizer()
    backend.normalizer = normalizers.NFC()
    words = (
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return wrapped(backend, aligned=True)


def sentencepiece(model: Any, trainer: Any, *, prepend: bool) -> PreTrainedTokenizerFast:
    """SentencePiece: ``▁`` for a space, and one in front of a text (Llama 2)."""
    backend = Tokenizer(model)
    replaced = normalizers.Replace(" ", SPACE)
    backend.normalizer = replaced
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replaced])
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")  # to learn words
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    backend.pre_tokenizer = None
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bpe(*, prepend: bool) -> PreTrainedTokenizerFast:
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    return sentencepiece(
        model,
        trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *BYTES], show_progress=False),
        prepend=prepend,
    )


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return sentencepiece(models.Unigram(), trainer, prepend=False)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


def phrases() -> PreTrainedTokenizerFast:
    """A tokenizer with a token of two words, so that no place between words is safe."""
    backend = train_tokenizer()
    backend.add_tokens([AddedToken("the sea", normalized=False)])
    return wrapped(backend, aligned=True)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": byte_level,
    "byte level, NFC, GPT-4's words": composed,
    "SentencePiece BPE": lambda: bpe(prepend=False),
    "SentencePiece BPE, a space put in front": lambda: bpe(prepend=True),
    "SentencePiece unigram": unigram,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "word pieces": word_piece,
    "tokens of two words": phrases,
}
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*TEXT.split(), "a", "I", "the sea", "<s>", "<|im_end|>", "  ", "\n", " "]),
        st.text(max_size=8),
        st.sampled_from(["e\u0301", "\u0301x", "한", "\u1112\u1161\u11ab", "夏天", "🌊"]),
    ),
    max_size=40,
).map(" ".join)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@settings(max_examples=budget(60))
@given(text=TEXTS, special=st.booleans(), piece=st.integers(1, 30))
def test_ids_of_pieces_equal_those_of_one_call(
    tokenizer: PreTrainedTokenizerFast, text: str, special: bool, piece: int
) -> None:
    whole = tokenizer(text, add_special_tokens=special)["input_ids"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        assert Encoder(tokenizer).encode(text, special=special) == tuple(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_at_safe_places(kind: str) -> None:
    encoder, calls = Encoder(KINDS[kind]()), list[None]()
    encoder.encode(TEXT * 20, special=True, pause=lambda: calls.append(None))
    assert (len(calls) > 2) is (kind != "tokens of two words")


@settings(max_examples=budget(60))
@given(text=TEXTS, most=st.integers(0, 60))
def test_a_text_is_refused_exactly_if_it_has_too_many_tokens(
    tokenizer: PreTrainedTokenizerFast, text: str, most: int
) -> None:
    ids, limit = tokenizer(text)["input_ids"], Limit("base", most + 1, most)
    if len(ids) <= most:
        assert len(Encoder(tokenizer).encode(text, special=True, limit=limit)) == len(ids)
        return
    with pytest.raises(BacoError, match=f"context window is {most + 1}"):
        Encoder(tokenizer).encode(text, special=True, limit=limit)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self._tokenizer(text, **options)


def test_a_text_with_more_bytes_than_fit_the_context_is_not_tokenised() -> None:
    counting = Counting(byte_level())
    encoder = Encoder(counting)
    assert encoder.longest is not None
    text = "a" * (100 * encoder.longest + 1)
    with pytest.raises(BacoError, match=r"prompt of \d+ bytes: the aligned model's context window"):
        encoder.encode(text, special=False, limit=Limit("aligned", 101, 100))
    assert counting.characters == 0


def test_tokenising_stops_as_soon_as_the_count_passes_the_limit() -> None:
    counting = Counting(byte_level())
    encoder = Encoder(counting)
    encoder.prepare()
    counting.characters, text = 0, TEXT * 100
    with pytest.raises(BacoError, match=r"prompt of more than \d+ tokens, as the aligned model"):
        encoder.encode(text, special=False, limit=Limit("aligned", 10_001, 10_000))
    assert len(text) > 70_000
    assert counting.characters < 40_000


def test_there_is_no_byte_limit_if_tokens_can_have_any_length() -> None:
    assert Encoder(word_piece()).longest is None
    assert Encoder(metaspace("first")).longest is None
    eating = train_tokenizer()
    eating.add_special_tokens([AddedToken("<|pad|>", rstrip=True)])
    assert Encoder(wrapped(eating, aligned=True)).longest is None
    assert Encoder(byte_level()).longest is not None


def test_an_exception_between_pieces_ends_the_work(demo: Baco) -> None:
    class GoneError(Exception):
        pass

    def gone() -> None:
        raise GoneError

    limits = demo.pair.limits(demo.router("Aligned"))
    assert set(limits) == {"aligned"}
    with pytest.raises(GoneError):
        demo.pair.renderer.raw("word " * 10_000, pause=gone)
    with pytest.raises(GoneError):
        demo.pair.renderer.render("word " * 10_000, pause=gone)
    with pytest.raises(BacoError, match="context window is 512"):
        demo.pair.renderer.render("word " * 1_500, limits=limits)
