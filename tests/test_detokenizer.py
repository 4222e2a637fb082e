"""Token by token, the text is that of decoding all at once, for every kind of tokenizer."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from baco.text.answer_text import AnswerText
from baco.text.detokenizer import Decoding, Detokenizer
from tests.fuzzing import budget
from tests.kinds import FAST, IMPLIED, SLOW, bytes_in_words, llama, sentencepiece_model
from tests.test_vocabulary import MORE_TEXT


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type], Any]:
    file: Path = tmp_path_factory.mktemp("sentencepiece") / "spiece.model"
    file.write_bytes(sentencepiece_model())
    return lambda kind: kind(str(file))


def whole(tokenizer: Any, ids: list[int], kind: str) -> str:
    """The text by the tokenizer's own decoding, behind a token so that nothing is taken off it.

    A space that no token holds does not begin it.
    """
    if kind == "a pattern across tokens":  # the token could be part of the pattern
        alone: str = tokenizer.decode(ids, skip_special_tokens=True)
        return alone
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    before = next(id_ for id_, name in enumerate(names) if name in ("▁the", "the", "a", "a</w>"))
    known = [id_ for id_ in ids if id_ < len(names)]
    text: str = tokenizer.decode([before, *known], skip_special_tokens=True)
    text = text[len(tokenizer.decode([before])) :]
    return text.removeprefix(" ") if kind in IMPLIED else text


def streamed(tokenizer: Any, ids: list[int]) -> tuple[str, list[str]]:
    """The text and its pieces token by token; released text is never changed."""
    detokenizer, texts = Detokenizer(tokenizer), list[str]()
    for count, id_ in enumerate(ids, 1):
        texts += detokenizer.push(id_)
        assert len(texts) <= count
    texts += detokenizer.close()
    assert len(texts) == len(ids)
    return "".join(texts), texts


def sequences(tokenizer: Any, cases: int) -> list[list[int]]:
    """Random ids, many of them bytes or ids without a token, and parts of real texts."""
    all_ids = []
    for seed in range(cases):
        draw = random.Random(seed)
        size = len(tokenizer)
        least = draw.choice((0, max(0, size - 64)))  # words come behind bytes
        vocabulary = [draw.randrange(least, size) for _ in range(draw.choice((2, 4, 12, size)))]
        ids = [draw.choice(vocabulary) for _ in range(draw.randrange(1, 40))]
        if seed % 3 == 0:
            text = "".join(draw.choice(MORE_TEXT + " \n🌊é夏") for _ in range(12))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = ids[draw.randrange(len(ids) or 1) :]
        if seed % 4 == 0:
            ids.insert(
                draw.randrange(len(ids) + 1), draw.choice((*tokenizer.all_special_ids, size + 5))
            )
        all_ids.append([id_ for id_ in ids if id_ is not None])
    return all_ids


def check(tokenizer: Any, kind: str, cases: int) -> None:
    for ids in sequences(tokenizer, cases):
        assert streamed(tokenizer, ids)[0] == whole(tokenizer, ids, kind), ids


@pytest.mark.parametrize("kind", FAST)
def test_the_stream_is_the_text_that_the_tokenizer_decodes(kind: str) -> None:
    check(FAST[kind](), kind, budget(150))


@pytest.mark.parametrize("kind", SLOW)
def test_the_stream_is_the_decoded_text_for_tokenizers_without_a_backend(
    slow: Callable[[type], Any], kind: str
) -> None:
    check(slow(SLOW[kind]), kind, budget(60))


def test_the_stream_is_the_decoded_text_for_byte_tokens() -> None:
    check(ByT5Tokenizer(), "bytes", budget(60))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        # A token takes back what seemed to be certain: a space, and more than it adds.
        ("cleaned up, with bytes", ["▁", "<0x27>", "▁"]),
        ("unigram, cleaned up", ["▁'", "▁'", "▁'", "▁", "!"]),
        # One bad byte makes all bytes of its run bad, before and behind it, special tokens or not.
        ("llama 2", ["<0xE5>", "<0xA4>", "<0xA9>", "<s>", "<0xFF>", "<0xE5>", "<0xA4>", "<0xA9>"]),
        ("llama 2", ["<0xE5>", "<0xA4>", "</s>", "<0xA9>", "s", "<0xE5>"]),
        ("gguf", ["<0xE2>", "<0x96>", "<0x81>", "s"]),
        ("a pattern across tokens", ["a", "t", "s", "s", "a", "t"]),
    ],
)
def test_text_that_a_later_token_changes_is_held_back(kind: str, names: list[str]) -> None:
    tokenizer = FAST[kind]()
    ids = tokenizer.convert_tokens_to_ids(names)
    assert streamed(tokenizer, ids)[0] == whole(tokenizer, ids, kind)


@pytest.mark.parametrize(
    "ids",
    [
        [222, 161, 104, 244, 226, 266, 133, 31],
        [44, 33, 43, 101, 113, 31, 197, 4],
        [37, 169, 241, 51],
        [104, 147, 227, 46, 197, 162, 123, 148, 94],
    ],
)
def test_invalid_bytes_are_decoded_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    """The library's own stream raises on two of these and gives wrong text for the others."""
    tokenizer = llama()
    assert streamed(tokenizer, ids)[0] == tokenizer.decode(ids, skip_special_tokens=True)
    answer = AnswerText(tokenizer, joining_space=True)
    for id_ in ids:
        answer.push(id_, "base")
    answer.close()
    assert "\ufffd" in answer.text
    assert answer.offsets == sorted(answer.offsets)


PLAIN = [kind for kind in FAST if "cleaned" not in kind and kind != "a pattern across tokens"]


@pytest.mark.parametrize("kind", PLAIN)
def test_only_text_that_a_later_token_may_change_is_held_back(kind: str) -> None:
    """That is: bytes that may still become a character, at most three, or a run of valid ones."""
    tokenizer = FAST[kind]()
    for ids in sequences(tokenizer, budget(40)):
        detokenizer, released = Detokenizer(tokenizer), 0
        for count, id_ in enumerate(ids, 1):
            released += len(detokenizer.push(id_))
            waiting = [
                tokenizer.convert_ids_to_tokens(token) or "" for token in ids[released:count]
            ]
            if any(name.startswith("<0x") for name in waiting):
                run = bytes(int(name[3:5], 16) for name in waiting if name.startswith("<0x"))
                assert run.decode(errors="ignore").encode() == run[: len(run) - unfinished(run)]
            elif waiting:
                assert tokenizer.decode(ids[:count], skip_special_tokens=True)[-1] == "\ufffd"


def unfinished(run: bytes) -> int:
    """Number of bytes at the end of a run that begin an unfinished character."""
    return next(size for size in range(4) if _is_text(run[: len(run) - size]))


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (llama, ["<0xFF>"]),
        (llama, ["<0xE5>", "<0xA4>", "<0xA9>"]),
        (llama, ["<0xE5>", "<0x41>", "▁the"]),
        (bytes_in_words, ["ÿ"]),
        (bytes_in_words, ["å"]),
        (FAST["cleaned up, with bytes"], ["▁'", "▁the"]),
        (FAST["a pattern across tokens"], ["s"]),
    ],
)
def test_a_token_costs_the_same_however_long_the_text_is(
    make: Callable[[], Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, decoded = make(), [0]
    decode = Decoding.decode

    def counted(self: Decoding, ids: list[int]) -> str:
        decoded[0] += len(ids)
        return decode(self, ids)

    monkeypatch.setattr(Decoding, "decode", counted)
    ids = tokenizer.convert_tokens_to_ids(names) * (1500 // len(names))
    streamed(tokenizer, ids)
    assert decoded[0] < 60 * len(ids)


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        ("byte level", "Ġ"),
        ("llama 2", "▁"),
        ("llama 2", "▁▁▁▁"),
        ("strips two", "▁▁"),
        ("gemma", "▁▁▁▁"),
        ("metaspace first", "▁▁▁▁"),
        ("metaspace always", "▁"),
    ],
)
def test_only_one_space_joins_an_answer_to_its_prompt(kind: str, space: str) -> None:
    """Also where the tokenizer strips spaces: eight spaces of code, or seven after a space."""
    tokenizer = FAST[kind]()
    ids = tokenizer.convert_tokens_to_ids([space] * (8 // len(space)) + ["s"])
    for joining_space, left in ((True, 7), (False, 8)):
        answer = AnswerText(tokenizer, joining_space=joining_space)
        for id_ in ids:
            answer.push(id_, "aligned")
        answer.close()
        assert answer.text == " " * left + "s"


@pytest.mark.parametrize("kind", FAST)
def test_no_text_or_token_beyond_a_stop_string_is_released(kind: str) -> None:
    tokenizer = FAST[kind]()
    for seed, ids in enumerate(sequences(tokenizer, budget(60))):
        text, draw = whole(tokenizer, ids, kind), random.Random(seed)
        cuts = [draw.randrange(len(text) or 1) for _ in range(draw.randrange(3))]
        stops = [stop for at in cuts if (stop := text[at : at + draw.randrange(1, 6)])]
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops]
        body = text[: min(ends)[1]] if ends else text  # the stop that is complete first
        answer, shown, counts = AnswerText(tokenizer, stops), "", [0]
        for id_ in ids:
            pieces, stopped = answer.push(id_, "base")
            shown += "".join(piece.text for piece in pieces)
            counts.append(answer.tokens)
            if stopped:
                break
        else:
            pieces, stopped = answer.close()
            shown += "".join(piece.text for piece in pieces)
            counts.append(answer.tokens)
        assert shown == answer.text == body
        assert stopped == bool(stops)
        kept = sum(offset < len(body) for offset in answer.offsets) if stopped else len(ids)
        assert counts == sorted(counts)
        assert counts[-1] == kept
