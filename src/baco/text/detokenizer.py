"""Incremental detokenization: token by token, the same text that decoding all tokens at once gives.

It knows tokenizers. It does not know answers, stop strings or sources.

Most tokens have the same text everywhere, which is looked up. The others are decoded by the
tokenizer's own decoder over a window of the last tokens. Text that a later token can still change
is held back: bytes of an unfinished character, a run of byte tokens (one invalid byte invalidates
the whole run), and spaces that the tokenizer cleans up. The cost of a token does not depend on the
length of the text.
"""

import codecs
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, proxy

from baco.text.token_bytes import parts_of

REPLACEMENT = "\ufffd"
# An unfinished character decodes to up to three of them, one per byte.
_UNFINISHED = re.compile(f"{REPLACEMENT}{{1,3}}\\Z")
# Text that clean-up of white space can still change: ` ' ' '`, ` n`, ` v`.
_UNCLEAN = re.compile(r"[ 'nvr]+\Z")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LETTER = re.compile("[A-Za-z]")
# Decoder types that decode each token by itself (bytes excepted) and join the texts.
_JOINING = {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace", "WordPiece"}
# The longest match assumed for a decoder's pattern, in characters.
_MAX_MATCH = 32
_MAX_CHARACTER_BYTES = 4
# Tokens that a long window is cut to while its end is not final.
_KEPT = 16


class Decoding:
    """How a tokenizer decodes; shared by all texts of that tokenizer.

    Attributes:
        context: tokens put before a window, so that the window is not decoded like the start of a
            text; empty where no token is suitable.
        cleans: whether it cleans up white space after decoding.
        implies_spaces: whether it inserts spaces that no token contains.
        bytes: the byte of every byte token. Byte tokens are decoded together with their
            neighbours.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = proxy(tokenizer)  # it is the weak key of this object
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._backend, self._size = backend, len(tokenizer)
        self.cleans = _cleans(tokenizer)
        self._direct = backend is not None and not self.cleans and not _decodes_itself(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        if backend is not None:
            added = backend.get_added_tokens_decoder().items()
            self._special = {id_ for id_, token in added if token.special}
        parts = [] if backend is None else list(parts_of(backend.decoder))
        self._joins = self._direct and bool(parts) and all(map(_joins, parts))
        self._reach = max(map(_reach, parts), default=0)
        has_bytes = any(part["type"] == "ByteFallback" for part in parts)
        self.bytes = dict(_byte_tokens(backend)) if has_bytes else {}
        self._alone: dict[int, str | None] = {}
        self._texts: dict[int, str | None] = {}
        token = None if self._reach else self._find_context()
        self.context = [] if token is None else [token]
        self.implies_spaces = token is not None and self._inserts_space(token)

    def decode(self, ids: list[int]) -> str:
        """The text of ordinary tokens."""
        if self._direct:
            text: str = self._backend.decode(ids, skip_special_tokens=False)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def alone(self, token: int) -> str | None:
        """The text of the context and a token; None where the token never has text: special, or
        unknown.
        """
        if token not in self._alone:
            has_text = token not in self._special and self._token(token) is not None
            self._alone[token] = self.decode([*self.context, token]) if has_text else None
        return self._alone[token]

    def text(self, token: int) -> str | None:
        """The text of a token that is the same everywhere; None where it may differ."""
        if token not in self._texts:
            self._texts[token] = self._text(token)
        return self._texts[token]

    def _text(self, token: int) -> str | None:
        alone = self.alone(token)
        if not self._joins or not self.context or alone is None or token in self.bytes:
            return None
        text = alone.removeprefix(self.decode(self.context))
        return None if REPLACEMENT in text else text

    def final(self, text: str) -> int:
        """How many characters of a window's text no later token can change."""
        end = max(len(text) - self._reach, 0)
        if not self.bytes and (match := _UNFINISHED.search(text)):
            end = match.start()
        if self.cleans and (match := _UNCLEAN.search(text, 0, end)):
            end = match.start()
        return end

    def _token(self, id_: int) -> str | None:
        token: str | None = None
        if self._backend is not None:
            token = self._backend.id_to_token(id_)
        elif 0 <= id_ < self._size:
            token = self._tokenizer.convert_ids_to_tokens(id_)
        return token

    def _find_context(self) -> int | None:
        """A token of ASCII letters that decodes to the same letters after another token."""
        for id_ in range(self._size):
            name = self._token(id_)
            if id_ in self._special or id_ in self.bytes or not name or not _LETTER.search(name):
                continue
            text = self.decode([id_])
            if text.isascii() and text.isalpha() and self.decode([id_, id_]).startswith(text):
                return id_
        return None

    def _inserts_space(self, token: int) -> bool:
        text, name = self.decode([token]), self._token(token)
        follows = self.decode([token, token])[len(text) :]
        return follows[:1].isspace() and name is not None and name.startswith(text)


def _cleans(tokenizer: Any) -> bool:
    """Whether `transformers` cleans up white space after decoding: not with BPE, unless forced."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = backend is not None and type(backend.model).__name__ == "BPE"
    return not is_bpe or bool(getattr(tokenizer, forced, False))


def _decodes_itself(tokenizer: Any) -> bool:
    """Whether this class of `transformers` overrides its backend's decoding."""
    from transformers import PreTrainedTokenizerFast

    return getattr(type(tokenizer), "_decode", None) is not PreTrainedTokenizerFast._decode


def _joins(part: dict[str, Any]) -> bool:
    """Whether a part of a decoder works on each token by itself."""
    if part["type"] == "Sequence":
        return True  # its parts are checked too
    return part["type"] in _JOINING and not part.get("stop") and not _reach(part)


def _reach(part: dict[str, Any]) -> int:
    """How far before the end of a text a replacement by this part can begin."""
    if part["type"] != "Replace":
        return 0
    return len(part["pattern"].get("String", _MAX_MATCH * " ")) - 1


def _byte_tokens(backend: Any) -> Iterator[tuple[int, int]]:
    for token, id_ in backend.get_vocab(with_added_tokens=True).items():
        if match := _BYTE.fullmatch(token):
            yield id_, int(match[1], 16)


_DECODINGS: WeakKeyDictionary[Any, Decoding] = WeakKeyDictionary()


def decoding_of(tokenizer: Any) -> Decoding:
    """The `Decoding` of a tokenizer, computed once."""
    decoding = _DECODINGS.get(tokenizer)
    if decoding is None:
        decoding = _DECODINGS[tokenizer] = Decoding(tokenizer)
    return decoding


class Detokenizer:
    """One growing text.

    Tokens are pushed one by one. The text of each is returned, in order, once it is final. A
    character that several tokens spell belongs to the last of them. The texts join to the decoding
    of all tokens in the middle of a text, without special tokens. So a space that the first token
    contains is kept, although many decoders strip it, and a space that it does not contain is not
    added.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decoding = decoding_of(tokenizer)
        # A window of the last tokens, its decoding after the context, and how many of these
        # characters were returned. Where `_last` is set, the window is that token alone.
        self._last: int | None = None
        self._window: list[int] = []
        self._decoded = (
            self._decoding.decode(self._decoding.context) if self._decoding.context else ""
        )
        self._returned = len(self._decoded)
        # For every token whose text is still held back: where the final text ended when it was
        # pushed, and the text after that, which belongs to it unless it changes.
        self._waiting: list[tuple[int, str]] = []
        # A run of byte tokens, and of tokens without text between them.
        self._run: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        # The last tokens of a run up to its first invalid byte, if the run continues.
        self._bad: list[int] = []
        self._begun = not self._decoding.implies_spaces

    def push(self, token: int) -> list[str]:
        """Add a token; returns the texts of the earliest waiting tokens that are now final."""
        texts = self._push(token)
        return texts if self._begun else self._begin(texts)

    def close(self) -> list[str]:
        """End the text; returns the texts of all tokens that were still waiting."""
        texts = self._end_run() if self._run else []
        texts += self._settle(len(self._decoded))
        return texts if self._begun else self._begin(texts)

    def _begin(self, texts: list[str]) -> list[str]:
        """Remove the space that the tokenizer inserts before the first text."""
        for index, text in enumerate(texts):
            if text:
                self._begun = True
                texts[index] = text.removeprefix(" ")
                break
        return texts

    def _push(self, token: int) -> list[str]:
        decoding, texts = self._decoding, list[str]()
        if token in decoding.bytes and not self._bad:
            self._run.append(token)
            try:
                self._utf8.decode(bytes([decoding.bytes[token]]))
            except UnicodeDecodeError:
                run = [token for token in self._run if token in decoding.bytes]
                self._bad = run[-_MAX_CHARACTER_BYTES:]
                return self._end_run()
            return []
        if decoding.alone(token) is None:
            return self._push_without_text(token)
        if token not in decoding.bytes:
            texts, self._bad = self._end_run() if self._run else [], []
            text = decoding.text(token)
            if text is not None and not self._waiting:
                self._last = token
                return [*texts, text]
        self._decode([token])
        final = decoding.final(self._decoded)
        self._waiting.append((final, self._decoded[final:]))
        return texts + self._settle(final)

    def _push_without_text(self, token: int) -> list[str]:
        if self._run:
            self._run.append(token)
        elif self._waiting:
            self._waiting.append(self._waiting[-1])
        else:
            return [""]
        return []

    def _decode(self, tokens: list[int]) -> None:
        if self._last is not None:
            self._restart([self._last])
        self._window += tokens
        self._decoded = self._decoding.decode([*self._decoding.context, *self._window])

    def _restart(self, window: list[int]) -> None:
        """Replace the window by one whose whole text was returned."""
        decoding = self._decoding
        self._last, self._window = None, window
        alone = decoding.alone(window[0]) if len(window) == 1 else None
        self._decoded = decoding.decode([*decoding.context, *window]) if alone is None else alone
        self._returned = len(self._decoded)

    def _end_run(self) -> list[str]:
        """Decode a run of bytes that has ended or has an invalid byte, and so no characters."""
        run, self._run = self._run, []
        spelled = [self._decoding.bytes.get(token) for token in run]
        self._utf8.reset()
        data = bytes(byte for byte in spelled if byte is not None)
        shown = _show(data)
        if self._last is not None:
            self._restart([self._last])
        before = self._decoded
        self._decode([token for token in run if token in self._decoding.bytes])
        end, final = len(before), self._decoding.final(self._decoded)
        if self._decoded != before + "".join(shown):  # other decoder parts change the text
            shown = [self._decoded[end:], *[""] * (len(data) - 1)]
        texts = iter(shown)
        for byte in spelled:
            end += 0 if byte is None else len(next(texts))
            at = min(end, final)
            self._waiting.append((at, self._decoded[at:end]))
        return self._settle(final)

    def _settle(self, final: int) -> list[str]:
        """Return the texts of the tokens that end in the final part of the decoded text."""
        texts = []
        for at, shown in self._waiting:
            end = at + len(shown) if self._decoded.startswith(shown, at) else at
            if end > final:
                break
            end = max(end, self._returned)
            texts.append(self._decoded[self._returned : end])
            self._returned = end
        del self._waiting[: len(texts)]
        if not self._waiting and texts and texts[-1]:
            self._restart(list(self._bad or self._window[-1:]))
        elif len(self._window) > 2 * _KEPT and not self._decoding.cleans:
            self._cut_back()
        return texts

    def _cut_back(self) -> None:
        """Shorten a long window whose end is not final yet."""
        window = self._window[-_KEPT:]
        decoded = self._decoding.decode([*self._decoding.context, *window])
        cut = len(self._decoded) - len(decoded)
        held = self._decoded[self._returned :]
        if self._returned < cut or decoded[self._returned - cut :] != held:
            return
        self._window, self._decoded = window, decoded
        self._returned -= cut
        self._waiting = [
            (max(at - cut, 0), shown[max(cut - at, 0) :]) for at, shown in self._waiting
        ]


def _show(data: bytes) -> list[str]:
    """The text of each byte: the character that it completes, or U+FFFD in an invalid run."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    try:
        shown = [utf8.decode(bytes([byte])) for byte in data]
        utf8.decode(b"", final=True)
    except UnicodeDecodeError:
        return [REPLACEMENT] * len(data)
    return shown
