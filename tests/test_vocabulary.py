"""Bytes, roles and word starts of tokens, for tokenizers of each kind."""

import json
import time
import unicodedata
from bisect import bisect_left
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertGenerationTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from baco.errors import BacoError
from baco.text.token_bytes import Spelled, spell
from baco.text.vocabulary import Role, Vocabulary, character_starts_word, load_words, starts_word
from tests.pairs import END, TEXT, train_tokenizer

MORE_TEXT = (
    TEXT
    + "ฉันไปทะเล ཁྱེད་རང་ ភាសាខ្មែរ हिन्दी की किताब العربية 한국어 문장 👩🏽‍🚀 1️⃣ don't we'll McCoy IBM\n"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# --- tokenizers of each kind ----------------------------------------------------------------------


def wrap(backend: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@cache
def byte_level() -> Any:
    return wrap(train_tokenizer(), eos_token=END)


@cache
def sentencepiece() -> Any:
    """Llama 2's spelling: BPE, ``▁`` for a space, ``<0xE4>`` for the bytes of rare characters."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "</s>", *BYTES], show_progress=False
    )
    backend.train_from_iterator(MORE_TEXT.splitlines(), trainer)
    # The trainer lists the bytes as special tokens; real tokenizers keep them as ordinary ones.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return wrap(Tokenizer.from_str(json.dumps(state)), eos_token="</s>", unk_token="<unk>")


@cache
def unigram() -> Any:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(MORE_TEXT.splitlines(), trainer)
    return wrap(backend, eos_token="</s>", unk_token="<unk>")


@cache
def word_piece() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=450, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    backend.train_from_iterator(MORE_TEXT.splitlines(), trainer)
    return wrap(backend, cls_token="[CLS]")  # nobody names its [UNK] but the model


def whole_words() -> Any:
    backend = Tokenizer(models.WordLevel({"the": 0, "sea": 1, ".": 2, "<unk>": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(backend)


def word_ends() -> Any:
    """The first GPT's spelling: ``</w>`` for the end of a word."""
    vocabulary = {"sea</w>": 0, "si": 1, "de</w>": 2, ".</w>": 3, "the</w>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    return wrap(backend)


@cache
def printable() -> dict[int, str]:
    """GPT-2's character of every byte that text has, taken from the library."""
    write = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    low = {byte: chr(byte) for byte in range(0x80)}
    carried = {0x80 + bits: chr(0x80 + bits) for bits in range(0x40)}
    leads = {chr(c).encode()[0]: chr(c) for c in (*range(0x80, 0xD800, 0x40), 0xE000, 0xF000)}
    leads |= {chr(c).encode()[0]: chr(c) for c in range(0x10000, 0x110000, 0x10000)}
    table = {byte: write(text)[0][0][-1] for byte, text in (low | carried).items()}
    return table | {byte: write(text)[0][0][0] for byte, text in leads.items()}


def tokenizer_of(*tokens: str | bytes) -> Any:
    """A byte-level tokenizer with exactly these tokens, in this order."""
    data = [token.encode() if isinstance(token, str) else token for token in tokens]
    spelled = ["".join(printable()[byte] for byte in piece) for piece in data]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(spelled)}, []))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


def read(tokenizer: Any, **words: Any) -> Vocabulary:
    return Vocabulary.from_tokenizer(tokenizer, len(tokenizer), **words)


def role(text: str | bytes, **words: Any) -> str:
    return Role(int(read(tokenizer_of(text), **words).role[0])).name.lower()


def starts(text: str | bytes) -> bool:
    return bool(read(tokenizer_of(text)).word_start[0])


# --- bytes ----------------------------------------------------------------------------------------

# Text of many scripts; ▁ is a space to SentencePiece, whoever wrote it.
TEXTS = st.text(
    st.sampled_from(sorted(set(MORE_TEXT))) | st.characters(exclude_characters="▁"), max_size=40
)


def spelled(tokenizer: Any, text: str) -> list[Spelled]:
    by_id = {token.id: token for token in _spelling(tokenizer)}
    return [by_id[id_] for id_ in tokenizer(text, add_special_tokens=False)["input_ids"]]


@cache
def _spelling(tokenizer: Any) -> tuple[Spelled, ...]:
    return tuple(spell(tokenizer))


def data_of(tokenizer: Any) -> list[bytes]:
    """The bytes of all tokens, in the order of ids."""
    return [token.data for token in sorted(spell(tokenizer), key=lambda token: token.id)]


def with_leading_space(text: str) -> str:
    return text if not text or text.startswith(" ") else " " + text


@given(TEXTS)
def test_byte_level_tokens_have_the_bytes_of_their_text(text: str) -> None:
    assert b"".join(token.data for token in spelled(byte_level(), text)) == text.encode()


@given(TEXTS)
def test_sentencepiece_tokens_have_the_bytes_of_their_text_after_a_space(text: str) -> None:
    data = b"".join(token.data for token in spelled(sentencepiece(), text))
    assert data == with_leading_space(text).encode()


@given(st.lists(st.sampled_from(MORE_TEXT.split()), max_size=8).map(" ".join))
def test_unigram_tokens_have_the_bytes_of_their_text_after_a_space(text: str) -> None:
    data = b"".join(token.data for token in spelled(unigram(), text))
    assert data == with_leading_space(text).encode()


def test_a_sentencepiece_tokenizer_without_a_backend_is_read_too(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(MORE_TEXT, encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=450,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = BertGenerationTokenizer(str(tmp_path / "spiece.model"))
    assert not tokenizer.is_fast
    text = "the sea is warm, 夏 Ω"
    assert b"".join(token.data for token in spelled(tokenizer, text)) == (" " + text).encode()


def test_a_tokenizer_with_an_unknown_spelling_is_refused_in_one_line() -> None:
    with pytest.raises(BacoError, match=r"^ByT5Tokenizer does not say .* tokenizer\.json[^\n]*$"):
        read(ByT5Tokenizer())


def test_the_kind_is_read_from_the_tokenizer_and_not_from_its_tokens() -> None:
    """Each token below has a meaning in another kind of tokenizer."""
    byte, piece, space = tokenizer_of("<0xE4>", "##a", "▁a"), word_piece(), sentencepiece()
    assert data_of(byte) == [b"<0xE4>", b"##a", "▁a".encode()]
    assert Spelled(space.convert_tokens_to_ids("<0xE4>"), b"\xe4") in list(spell(space))
    assert all(not token.data.startswith(b"##") for token in spell(piece) if len(token.data) > 2)


def test_without_a_decoder_the_pre_tokenizer_and_the_model_tell_the_kind() -> None:
    backend = Tokenizer(models.BPE({"▁a": 0, "<0xE4>": 1}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    assert data_of(wrap(backend)) == [b" a", b"\xe4"]
    backend = Tokenizer(models.BPE({"Ġa": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert data_of(wrap(backend)) == [b" a"]
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1}))
    assert data_of(wrap(backend)) == [b"a", b"b"]


# --- word starts ----------------------------------------------------------------------------------

WITHOUT_SPACES = (
    "CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA",
    "HENTAIGANA", "BOPOMOFO", "HANGZHOU", "MASU", "VERTICAL KANA", "VERTICAL IDEO",
    "IDEOGRAPHIC ANNO", "IDEOGRAPHIC CLOS", "IDEOGRAPHIC ITER", "IDEOGRAPHIC NUM", "YI ",
    "THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "BUGINESE",
    "TAI ", "NEW TAI",
)  # fmt: skip


def by_definition(character: str) -> bool:
    """Does a character start a word? The design's definition, with Unicode's own names."""
    name, category = unicodedata.name(character, ""), unicodedata.category(character)
    if category in ("Mn", "Mc", "Me", "Cf") or "EMOJI MODIFIER" in name:
        return False
    if character.isspace() or category in ("Cc", "Cn"):
        return True
    return category[0] in "PS" or name.startswith(WITHOUT_SPACES)


def test_every_character_of_unicode_starts_a_word_or_not_by_definition() -> None:
    characters = map(chr, range(0x110000))
    wrong = [c for c in characters if character_starts_word(c) is not by_definition(c)]
    assert not wrong, [unicodedata.name(character, hex(ord(character))) for character in wrong[:9]]


@cache
def _encoded() -> list[bytes]:
    return [chr(code).encode() for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def becomes(beginning: bytes) -> tuple[str, str]:
    """The first and the last character with bytes that begin so (UTF-8 keeps their order)."""
    first = bisect_left(_encoded(), beginning)
    last = bisect_left(_encoded(), beginning + b"\xff") - 1
    return _encoded()[first].decode(), _encoded()[last].decode()


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["bytes", "spm"])
@given(text=TEXTS)
def test_a_position_is_a_word_start_as_its_characters_say(tokenizer: Any, text: str) -> None:
    vocabulary = _vocabulary(tokenizer)
    at = {0: ""}  # byte offset -> the character that begins there
    whole = text if tokenizer is byte_level() else with_leading_space(text)
    for character in whole:
        end = max(at)
        at[end] = character
        at[end + len(character.encode())] = ""
    offset = 0
    for token in spelled(tokenizer, text):
        first = at.get(offset)
        if first is None:
            expected = False  # inside a character
        elif len(first.encode()) <= len(token.data):
            expected = by_definition(first)
        else:
            expected = all(map(by_definition, becomes(token.data)))
        assert bool(vocabulary.word_start[token.id]) is expected
        assert (
            bool(vocabulary.ends_word[token.id])
            is token.data.decode(errors="replace")[-1].isspace()
        )
        offset += len(token.data)


@cache
def _vocabulary(tokenizer: Any) -> Vocabulary:
    return read(tokenizer)


@pytest.mark.parametrize(
    "text",
    [" sea", " ", "\n", "\tx", ".", "(the", "'s", "-", "夏", "夏天", "の", "カ", "ก", "ລ", "ខ", "မ",
     "བ", "ꦲ", "🌊", "→", " ́", "\x00"],
)  # fmt: skip
def test_texts_that_begin_like_this_start_a_word(text: str) -> None:
    assert starts(text)


@pytest.mark.parametrize(
    "text", ["side", "ing", "7", "ы", "ü", "ا", "한", "क", "n't", "\u0301", "\ufe0f", "\u200d",
             "\u20e3", "\U0001f3fd", "ั", "ी"],
)  # fmt: skip
def test_texts_that_begin_like_this_continue_a_word(text: str) -> None:
    assert not starts(text)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("夏".encode()[:1], True),
        ("夏".encode()[:2], True),
        ("夏".encode()[1:], False),
        ("🌊".encode()[:2], True),
        ("🌊".encode()[3:], False),
        ("ü".encode()[:1], False),
        ("ü".encode()[1:] + b" and", False),  # what comes first counts
        (b" " + "ü".encode()[:1], True),
        ("\U0001f3fd".encode()[:3], False),  # may become a skin tone
        ("—".encode()[:2], True),
        ("ह".encode()[:2], False),
        (b"\xe0", False),  # from Samaritan letters on
        (b"\xf0", False),
        (b"\xe4a", True),  # never text: shown as U+FFFD, a symbol
    ],
)
def test_parts_of_characters_have_the_class_of_their_possible_characters(
    data: bytes, expected: bool
) -> None:
    assert starts_word(Spelled(0, data)) is expected


def test_invalid_bytes_are_decoded_as_decoders_do() -> None:
    assert Spelled(0, b"\xe4a").readings == ("\ufffda",)
    assert Spelled(0, b"a\xe4\xb8").readings == ("a\u4e00", "a\u4e3f")


def test_ends_a_word_only_with_white_space_at_the_end() -> None:
    tokens = ("sea ", "\n", ".\n", "\u3000", " sea", ".", "sea", b" \xe2\x80", b"\xa9")
    ends = read(tokenizer_of(*tokens)).ends_word.tolist()
    assert ends == [True, True, True, True, False, False, False, False, False]


def test_wordpiece_marks_the_continuation_of_a_word() -> None:
    tokenizer, vocabulary = word_piece(), read(word_piece())
    for text, index in tokenizer.get_vocab().items():
        if text in ("[UNK]", "[CLS]"):
            assert vocabulary.special[index] and vocabulary.role[index] == Role.FORMAT
        else:
            carried = text.startswith("##") and len(text) > 2
            expected = not carried or by_definition(text[2])
            assert bool(vocabulary.word_start[index]) is expected, text
            if carried and text[2].isalpha():  # "##on" is no preposition, "##A" no name
                assert vocabulary.role[index] == Role.CONTENT, text
    assert not vocabulary.ends_word.any()
    assert vocabulary.role[tokenizer.convert_tokens_to_ids("the")] == Role.FUNCTION


def test_whole_words_start_words() -> None:
    vocabulary = read(whole_words())
    assert vocabulary.word_start.all()
    assert vocabulary.special.tolist() == [False, False, False, True]


def test_a_marked_word_end_is_white_space() -> None:
    vocabulary = read(word_ends())
    assert vocabulary.ends_word.tolist() == [True, False, True, True, True]
    assert vocabulary.word_start.tolist() == [False, False, False, True, False]
    assert vocabulary.role[4] == Role.FUNCTION


# --- roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "texts"),
    [
        ("format", ["\n", "\n\n", " ", "   ", "\t", "#", " ##", "**", " *", "`", "```", "---", "--",
                    "|", ">", "•", " •", ".\n", '."\n\n', ":\n", "__", "|---|", "++"]),
        ("punctuation", [".", " .", "…", " (", "-", "+", "—", "?!", '."', "。", "「", "¿", "→", "€",
                         "%", ":**", "🎉", " 🌊", "\u200d", "\ufe0f", "\ufe0f\u20e3"]),
        ("function", [" the", "The", " (the", "'s", "’s", "'re", "n't", " don", "'t", " isn't",
                      "’ll", " WHO", " to, from", "\nand"]),
        ("number", [" 42", "7", "1998", "3rd", "½", "٣", "४२", "３", "$5", "-1", "Ⅻ", "10am"]),
        ("name", [" Maui", "Paris", " Å", " Москва", '"Anna']),
        ("opinion", [" lovely", "Best", " recommend", " terrible", " amazing!"]),
        ("content", [" sea", "ing", " seven", " café", " b2b", "夏天", "一些", "ทะเล", " море",
                     "की", "ी", "ั"]),
    ],
)  # fmt: skip
def test_every_text_has_its_role(expected: str, texts: list[str]) -> None:
    assert {text: role(text) for text in texts} == dict.fromkeys(texts, expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("“".encode()[:2], "punctuation"),  # by either end, no letter: E2 80 is general punctuation
        (b" " + "🌊".encode()[:3], "punctuation"),
        ("夏".encode()[:2], "content"),
        ("é".encode()[:1], "content"),
        ("夏".encode()[1:], "content"),
        ("”".encode()[2:] + b"\n", "content"),
        (b" the" + "—".encode()[:1], "function"),
    ],
)
def test_roles_of_parts_of_characters(data: bytes, expected: str) -> None:
    assert role(data) == expected


def test_special_tokens_and_ids_without_a_token_are_format_and_start_words() -> None:
    tokenizer = byte_level()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer) + 5)
    for index in (tokenizer.eos_token_id, len(tokenizer), len(tokenizer) + 4):
        assert vocabulary.special[index]
        assert vocabulary.word_start[index]
        assert not vocabulary.ends_word[index]
        assert vocabulary.role[index] == Role.FORMAT
    assert not vocabulary.special[: len(tokenizer) - 3].any()


def test_ids_beyond_the_common_vocabulary_are_left_out() -> None:
    whole, part = read(byte_level()), Vocabulary.from_tokenizer(byte_level(), 300)
    assert part.size == len(part.role) == 300
    assert torch.equal(part.role, whole.role[:300])


def test_added_tokens_are_text_unless_they_are_special() -> None:
    backend = train_tokenizer()
    backend.add_tokens(["<tool_call>", "naïve idea", AddedToken("<|fim|>", special=True)])
    tokenizer = wrap(backend)
    vocabulary = read(tokenizer)
    tool, idea, fim = tokenizer.convert_tokens_to_ids(["<tool_call>", "naïve idea", "<|fim|>"])
    assert vocabulary.special[[tool, idea, fim]].tolist() == [False, False, True]
    assert vocabulary.word_start[[tool, idea, fim]].tolist() == [True, False, True]
    by_id = {token.id: token.data for token in spell(tokenizer)}
    assert (by_id[tool], by_id[idea]) == (b"<tool_call>", "naïve idea".encode())


def test_added_runs_of_sentencepiece_spaces_are_white_space() -> None:
    """Gemma lists its runs of ▁ as added tokens that are not special."""
    backend = Tokenizer.from_str(sentencepiece().backend_tokenizer.to_str())
    backend.add_tokens(["▁▁▁", "\n\n"])
    vocabulary = read(wrap(backend))
    for token in ("▁▁▁", "▁", "\n\n"):
        index = backend.token_to_id(token)
        assert vocabulary.role[index] == Role.FORMAT
        assert vocabulary.ends_word[index] and vocabulary.word_start[index]


def test_sentencepiece_bytes_and_words_have_their_roles() -> None:
    tokenizer, vocabulary = sentencepiece(), read(sentencepiece())
    token = tokenizer.convert_tokens_to_ids
    assert vocabulary.role[token("▁the")] == Role.FUNCTION
    assert vocabulary.word_start[token("▁the")]
    assert vocabulary.role[token("<0x0A>")] == Role.FORMAT
    assert vocabulary.ends_word[token("<0x0A>")]
    assert vocabulary.word_start[token("<0xE5>")]  # every character it may become is Han
    assert not vocabulary.word_start[token("<0xA4>")]
    assert vocabulary.special[[token("<unk>"), token("</s>")]].all()


# --- word lists -----------------------------------------------------------------------------------


def test_function_words_of_another_language_come_from_a_file_or_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "german.txt"
    path.write_text("\ufeffund\nder\n\n# a remark\nDie\ngibt’s\n", encoding="utf-8")
    assert load_words(str(path)) == load_words(path) == {"und", "der", "die", "gibt's"}
    assert load_words(["Und", "der", "die", "gibt’s"]) == load_words(path)
    assert role(" Und", function_words=str(path)) == "function"
    assert role(" the", function_words=path) == "content"
    assert role(" the", function_words=[]) == "content"  # none means none
    assert role(" wunderbar", opinion_words=["wunderbar"]) == "opinion"


def test_english_is_built_in() -> None:
    function, opinion = load_words("english"), load_words("english", "opinion")
    assert {"the", "of", "you", "isn't", "'re", "whose", "don"} <= function
    assert {"best", "lovely", "terrible", "recommend"} <= opinion
    assert not function & opinion
    assert len(opinion) > 300


@pytest.mark.parametrize("content", [None, "# only remarks\n", b"\xff\xfe\x00"])
def test_a_word_list_that_cannot_be_read_is_one_clear_line(
    tmp_path: Path, content: str | bytes | None
) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BacoError, match=r"word list '.*words\.txt' is .*: give [^\n]*$"):
        load_words(str(path))


# --- cost -----------------------------------------------------------------------------------------


def test_a_vocabulary_of_150_000_is_read_in_seconds() -> None:
    stems = [
        a + b + c for a in "bcdfglmnpr" for b in ("a", "ei", "o", "夏", "ñ") for c in "klmnrst"
    ]
    texts = [f"{space}{one}{two}" for one in stems for two in stems for space in (" ", "")]
    tokenizer = tokenizer_of(*texts[:150_000])
    start = time.process_time()
    assert read(tokenizer).size == 150_000
    assert time.process_time() - start < 6  # about one second on a quiet core
