"""What tokens are, on tokenizers of each kind, trained here."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from baco.errors import BacoError
from baco.tokens import Spelled, spell
from baco.vocabulary import Role, Vocabulary, character_starts_word, load_words, starts_word
from tests.pairs import TEXT, train_tokenizer


def byte_level() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(), eos_token="<|endoftext|>")


def sentencepiece() -> Any:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>", *fallback], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    # The trainer lists the bytes as special tokens; real tokenizers keep them as ordinary ones.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]")


@given(st.text(max_size=40))
def test_the_bytes_of_a_texts_tokens_are_the_texts_bytes(text: str) -> None:
    tokenizer = BYTE_LEVEL
    spelled = {token.id: token for token in spell(tokenizer)}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(spelled[token].data for token in ids) == text.encode("utf-8", "replace")


@given(st.text(max_size=40))
def test_a_token_is_a_word_start_as_its_first_character_says(text: str) -> None:
    tokenizer, vocabulary = BYTE_LEVEL, VOCABULARY
    spelled = {token.id: token for token in spell(tokenizer)}
    at, data = 0, text.encode("utf-8", "replace")
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        piece = spelled[token].data
        if 0x80 <= piece[0] <= 0xBF:
            assert not vocabulary.word_start[token]
        elif not piece.decode("utf-8", "replace").startswith("\ufffd"):
            first = data[at:].decode("utf-8", "replace")[0]
            assert bool(vocabulary.word_start[token]) == character_starts_word(first)
        at += len(piece)


BYTE_LEVEL = byte_level()
VOCABULARY = Vocabulary.from_tokenizer(BYTE_LEVEL, len(BYTE_LEVEL) + 5)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b" sea", True),
        (b"side", False),
        (b".", True),
        ("夏".encode(), True),
        ("夏".encode()[:1], True),
        ("夏".encode()[1:], False),
        ("ü".encode()[:1], False),
        ("🌊".encode()[:2], True),
        ("🌊".encode(), True),
        ("\ufe0f".encode(), False),
        ("\U0001f3fd".encode(), False),
        ("ก".encode(), True),
        ("ы".encode(), False),
    ],
)
def test_word_starts_of_bytes(data: bytes, expected: bool) -> None:
    assert starts_word(Spelled(0, data)) is expected


def roles(tokenizer: Any, *words: str) -> list[str]:
    for word in words:
        tokenizer.add_tokens(word)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    ids = tokenizer.convert_tokens_to_ids(list(words))
    return [Role(int(vocabulary.role[index])).name.lower() for index in ids]


def test_roles_of_words_numbers_marks_and_names() -> None:
    words = [" the", " 42", " Maui", " lovely", " sea", "…", " **", "##", "\n\n", "n't", "🎉", " ("]
    assert roles(byte_level(), *words) == [
        "function",
        "number",
        "name",
        "opinion",
        "content",
        "punctuation",
        "format",
        "format",
        "format",
        "function",
        "punctuation",
        "punctuation",
    ]


def test_special_tokens_and_ids_without_a_token_are_format_and_start_words() -> None:
    end = BYTE_LEVEL.eos_token_id
    for index in (end, len(BYTE_LEVEL), len(BYTE_LEVEL) + 4):
        assert VOCABULARY.special[index]
        assert VOCABULARY.word_start[index]
        assert VOCABULARY.role[index] == Role.FORMAT


def test_sentencepiece_writes_spaces_and_bytes_in_its_own_way() -> None:
    tokenizer = sentencepiece()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    token = tokenizer.convert_tokens_to_ids
    assert vocabulary.word_start[token("▁the")]
    assert vocabulary.role[token("▁the")] == Role.FUNCTION
    assert vocabulary.ends_word[token("▁")]
    assert not vocabulary.word_start[token("in")]
    assert vocabulary.word_start[token("<0xE5>")]  # every character it may become is Han
    assert not vocabulary.word_start[token("<0xA4>")]
    assert vocabulary.special[token("</s>")]


def test_wordpiece_says_itself_what_carries_on_a_word() -> None:
    tokenizer = word_piece()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    carried = [index for text, index in tokenizer.get_vocab().items() if text.startswith("##")]
    assert carried
    assert not vocabulary.word_start[carried].any()
    assert vocabulary.word_start[tokenizer.convert_tokens_to_ids("the")]
    assert not vocabulary.ends_word.any()


def test_function_words_of_another_language_come_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "german.txt"
    path.write_text("und der die\n# a remark\ndas")
    assert load_words(str(path)) == {"und", "der", "die", "das"}
    with pytest.raises(BacoError, match="neither built in"):
        load_words(str(tmp_path / "none.txt"))
