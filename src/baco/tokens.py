"""How tokenizers spell: the bytes of text that every token id stands for.

The kind is read off the tokenizer's own decoder, not guessed from its tokens: byte-level BPE writes
bytes as printable characters, SentencePiece writes a space as ``▁`` and rare bytes as ``<0xE4>``,
WordPiece marks what carries on a word with ``##``, and whole-word tokenizers mark nothing.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token and the text it stands for.

    Attributes:
        id: token id.
        data: its bytes in UTF-8; may begin or end inside a character.
        special: a control token that stands for no text.
        starts_word: set where the tokenizer itself says so; None where the text tells.
    """

    id: int
    data: bytes
    special: bool = False
    starts_word: bool | None = None

    @property
    def text(self) -> str:
        """Its text, U+FFFD for the parts of unfinished characters."""
        return self.data.decode("utf-8", errors="replace")


def spell(tokenizer: Any) -> Iterator[Spelled]:
    """Every token of a ``transformers`` tokenizer, in no particular order."""
    read = _reader(tokenizer)
    added = tokenizer.added_tokens_decoder
    special_ids = set(tokenizer.all_special_ids)
    for token, id_ in tokenizer.get_vocab().items():
        if id_ in special_ids or (id_ in added and added[id_].special):
            yield Spelled(id_, b"", special=True)
        elif id_ in added:
            yield Spelled(id_, str(added[id_].content).encode())
        else:
            yield read(id_, token)


def _reader(tokenizer: Any) -> Callable[[int, str], Spelled]:
    """How this tokenizer's ordinary tokens are to be read."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _sentencepiece
    state = json.loads(backend.to_str())
    kinds = {part["type"] for part in _parts(state.get("decoder"))}
    if "ByteLevel" in kinds:
        return _byte_level
    if state["model"]["type"] == "WordPiece":
        prefix = state["model"].get("continuing_subword_prefix") or "##"
        return lambda id_, token: _word_piece(id_, token, prefix)
    if state["model"]["type"] == "WordLevel" and "Metaspace" not in kinds:
        return lambda id_, token: Spelled(id_, token.encode(), starts_word=True)
    return _sentencepiece


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """A decoder and the decoders inside it."""
    if component:
        yield component
        for inner in component.get("decoders", ()):
            yield from _parts(inner)


@cache
def _byte_of() -> dict[str, int]:
    """The bytes behind GPT-2's printable characters (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level(id_: int, token: str) -> Spelled:
    table = _byte_of()
    try:
        return Spelled(id_, bytes([table[character] for character in token]))
    except KeyError:  # put in by hand, as plain text
        return Spelled(id_, token.encode())


def _sentencepiece(id_: int, token: str) -> Spelled:
    byte = _BYTE.fullmatch(token)
    if byte:
        return Spelled(id_, bytes([int(byte[1], 16)]))
    return Spelled(id_, token.replace("\u2581", " ").encode())


def _word_piece(id_: int, token: str, prefix: str) -> Spelled:
    if token.startswith(prefix) and len(token) > len(prefix):
        return Spelled(id_, token[len(prefix) :].encode(), starts_word=False)
    return Spelled(id_, token.encode(), starts_word=True)
