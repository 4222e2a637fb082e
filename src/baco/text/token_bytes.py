"""The bytes of text that every token id of a tokenizer stands for.

The kind of tokenizer is read from its decoder (or its pre-tokenizer and model), not guessed from
its tokens. Byte-level BPE writes bytes as printable characters. SentencePiece writes a space as
``▁`` and rare bytes as ``<0xE4>``. WordPiece marks the continuation of a word with ``##``, older
BPE the end of a word with ``</w>``. Whole-word tokenizers mark nothing.

A leading space belongs to the first token as to every other, also where the tokenizer adds a space
before a text or strips it while decoding.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from baco.errors import BacoError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token and the text it stands for.

    Attributes:
        id: token id.
        data: its bytes in UTF-8; may begin or end inside a character.
        special: a control token without text.
        apart: whether the tokenizer separates the token from the one before it; None where the
            token's text shows it.
    """

    id: int
    data: bytes
    special: bool = False
    apart: bool | None = None

    @property
    def continues_character(self) -> bool:
        """Whether its first byte continues a character that an earlier token began."""
        return 0x80 <= self.data[0] <= 0xBF if self.data else False

    @property
    def readings(self) -> tuple[str, ...]:
        """Its text; two texts where it ends inside a character.

        These end with the first and the last character that its bytes can become. U+FFFD stands for
        bytes that belong to no character.
        """
        try:
            return (self.data.decode("utf-8"),)
        except UnicodeDecodeError:
            whole, unfinished = _split_unfinished(self.data)
            head = whole.decode("utf-8", errors="replace")
            return tuple(head + character for character in _possible_characters(unfinished))


def spell(tokenizer: Any) -> Iterator[Spelled]:
    """Every token of a ``transformers`` tokenizer, in no particular order.

    Raises:
        BacoError: the tokenizer does not tell how its tokens are spelled.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    read = _reader(tokenizer, vocabulary)
    # Added tokens that are not special are plain text, and decoded like all others.
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(id_ for id_, token in added if token.special)}
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    unknown = getattr(model, "unk_token", None)
    for token, id_ in vocabulary.items():
        if id_ in special or token == unknown:
            yield Spelled(id_, b"", special=True)
        else:
            yield read(id_, token)


# --- kinds of tokenizers --------------------------------------------------------------------------


def _reader(tokenizer: Any, vocabulary: dict[str, int]) -> Callable[[int, str], Spelled]:
    """The function that reads this tokenizer's ordinary tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _slow_reader(tokenizer, vocabulary)
    model = backend.model
    parts = list(parts_of(backend.pre_tokenizer if backend.decoder is None else backend.decoder))
    by_type = {part["type"]: part for part in parts}
    if "ByteLevel" in by_type:
        return _byte_level
    if "WordPiece" in by_type:
        return partial(_word_piece, prefix=by_type["WordPiece"]["prefix"])
    if "BPEDecoder" in by_type:
        return partial(_word_ends, suffix=by_type["BPEDecoder"]["suffix"])
    if type(model).__name__ == "WordPiece":
        return partial(_word_piece, prefix=model.continuing_subword_prefix)
    if backend.decoder is None and "Metaspace" not in by_type:
        return partial(_word_piece, prefix=None)  # such a backend joins tokens with spaces
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    for part in parts:
        if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]:
            spaces.append(part["pattern"]["String"])
    has_bytes = "ByteFallback" in by_type or getattr(model, "byte_fallback", False)
    return partial(_sentencepiece, spaces=spaces, has_bytes=has_bytes)


def _slow_reader(tokenizer: Any, vocabulary: dict[str, int]) -> Callable[[int, str], Spelled]:
    if hasattr(tokenizer, "byte_decoder"):
        return _byte_level
    if any(token.startswith("\u2581") for token in vocabulary):
        return partial(_sentencepiece, spaces=["\u2581"], has_bytes=True)
    raise BacoError(
        f"{type(tokenizer).__name__} does not say how its tokens are spelled: give a tokenizer "
        "that has a tokenizer.json, or one of SentencePiece's"
    )


def parts_of(component: Any) -> Iterator[dict[str, Any]]:
    """The state of a normalizer, pre-tokenizer or decoder, and of those inside it."""
    if component is None:
        return
    # The component's own state: the state of the whole backend would include the vocabulary.
    is_state = isinstance(component, dict)
    state: dict[str, Any] = component if is_state else json.loads(component.__getstate__())
    yield state
    several = (state.get(name) for name in ("normalizers", "pretokenizers", "decoders"))
    for inner in next(filter(None, several), []):
        yield from parts_of(inner)


@cache
def _byte_of() -> dict[str, int]:
    """The bytes behind GPT-2's printable characters (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level(id_: int, token: str) -> Spelled:
    try:
        return Spelled(id_, bytes(map(_byte_of().__getitem__, token)))
    except KeyError:  # an added token, in plain text
        return Spelled(id_, token.encode())


def _sentencepiece(id_: int, token: str, *, spaces: list[str], has_bytes: bool) -> Spelled:
    byte = _BYTE.fullmatch(token) if has_bytes else None
    if byte:
        return Spelled(id_, bytes([int(byte[1], 16)]))
    for space in spaces:
        token = token.replace(space, " ")
    return Spelled(id_, token.encode())


def _word_piece(id_: int, token: str, *, prefix: str | None) -> Spelled:
    if prefix and token.startswith(prefix) and token != prefix:
        return Spelled(id_, token.removeprefix(prefix).encode(), apart=False)
    return Spelled(id_, token.encode(), apart=True)


def _word_ends(id_: int, token: str, *, suffix: str) -> Spelled:
    return Spelled(id_, token.replace(suffix, " ").encode())


# --- unfinished characters ------------------------------------------------------------------------

# After some first bytes, the second byte has a narrower range (RFC 3629, section 4).
_SECOND = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


def _split_unfinished(data: bytes) -> tuple[bytes, bytes]:
    """Split off an unfinished character at the end of some bytes (empty if there is none)."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if 0xC2 <= byte <= 0xF4 and _length(byte) > back:
            return data[:-back], data[-back:]
        if not 0x80 <= byte <= 0xBF:
            break
    return data, b""


def _length(lead: int) -> int:
    """The number of bytes of a character that begins with this byte."""
    return 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _possible_characters(unfinished: bytes) -> tuple[str, ...]:
    """The first and the last character that begin with these bytes; an empty text for no bytes."""
    if not unfinished:
        return ("",)
    bounds = [_SECOND.get(unfinished[0], (0x80, 0xBF)), (0x80, 0xBF), (0x80, 0xBF)]
    missing = bounds[len(unfinished) - 1 : _length(unfinished[0]) - 1]
    first, last = (unfinished + bytes(bound[end] for bound in missing) for end in (0, 1))
    return first.decode("utf-8", errors="replace"), last.decode("utf-8", errors="replace")
