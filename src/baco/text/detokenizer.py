"""From token ids to text, one token at a time: the very text that decoding them all at once gives.

It knows tokenizers, and nothing of answers, stop strings and sources.

Most tokens spell the same text wherever they are; it is looked up. The others are decoded by the
tokenizer's own decoder, over a window of the last tokens. What a later token may still change
waits: bytes of an unfinished character, a run of byte tokens (one bad byte makes all bytes of a run
bad), and spaces that the tokenizer cleans up. So a token costs the same however long the text is.
"""

import codecs
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, proxy

from baco.text.token_bytes import parts_of

REPLACEMENT = "\ufffd"
# An unfinished character shows as up to three of them: one for each of its bytes.
_UNFINISHED = re.compile(f"{REPLACEMENT}{{1,3}}\\Z")
# What later text may still change where white space is cleaned up: ` ' ' '`, ` n`, ` v`.
_UNCLEAN = re.compile(r"[ 'nvr]+\Z")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LETTER = re.compile("[A-Za-z]")
# Decoders of tokenizers that join what each token spells by itself, bytes apart.
_JOINING = {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip", "Metaspace", "WordPiece"}
# What a pattern of a decoder is taken to match at most, in characters.
_LONGEST = 32
_LONGEST_CHARACTER = 4  # in bytes
# Tokens that a window is cut back to while its end is not certain.
_KEPT = 16


class Decoding:
    """How a tokenizer decodes; shared by all texts of that tokenizer.

    Attributes:
        context: tokens that are put before a window, so that nothing in it counts as the
            beginning of a text; empty where there is no suitable token.
        cleans: it cleans up white space after decoding.
        implies_spaces: it sets spaces between tokens that none of them holds.
        bytes: of every token that stands for one byte and is decoded together with those beside it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = proxy(tokenizer)  # it is the key that this object is kept by
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
        found = None if self._reach else self._find_context()
        self.context = [] if found is None else [found]
        self.implies_spaces = found is not None and self._sets_space(found)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens none of which is special."""
        if self._direct:
            text: str = self._backend.decode(ids, skip_special_tokens=False)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def alone(self, token: int) -> str | None:
        """The text of a token behind the context, the context's text included.

        None where the token has no part in any text: special, or unknown.
        """
        if token not in self._alone:
            has_text = token not in self._special and self._token(token) is not None
            self._alone[token] = self.decode([*self.context, token]) if has_text else None
        return self._alone[token]

    def text(self, token: int) -> str | None:
        """The text of a token that spells the same wherever it is; None where it may not."""
        if token not in self._texts:
            self._texts[token] = self._text(token)
        return self._texts[token]

    def _text(self, token: int) -> str | None:
        alone = self.alone(token)
        if not self._joins or not self.context or alone is None or token in self.bytes:
            return None
        text = alone.removeprefix(self.decode(self.context))
        return None if REPLACEMENT in text else text

    def certain(self, text: str) -> int:
        """How many characters of a window's text no later token can change."""
        end = max(len(text) - self._reach, 0)
        if not self.bytes and (found := _UNFINISHED.search(text)):
            end = found.start()
        if self.cleans and (found := _UNCLEAN.search(text, 0, end)):
            end = found.start()
        return end

    def _token(self, id_: int) -> str | None:
        token: str | None = None
        if self._backend is not None:
            token = self._backend.id_to_token(id_)
        elif 0 <= id_ < self._size:
            token = self._tokenizer.convert_ids_to_tokens(id_)
        return token

    def _find_context(self) -> int | None:
        """A token of ASCII letters that decodes to them behind any other too."""
        for id_ in range(self._size):
            name = self._token(id_)
            if id_ in self._special or id_ in self.bytes or not name or not _LETTER.search(name):
                continue
            text = self.decode([id_])
            if text.isascii() and text.isalpha() and self.decode([id_, id_]).startswith(text):
                return id_
        return None

    def _sets_space(self, token: int) -> bool:
        text, name = self.decode([token]), self._token(token)
        follows = self.decode([token, token])[len(text) :]
        return follows[:1].isspace() and name is not None and name.startswith(text)


def _cleans(tokenizer: Any) -> bool:
    """Does `transformers` clean up white space after decoding? Not after BPE, unless forced."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = backend is not None and type(backend.model).__name__ == "BPE"
    return not is_bpe or bool(getattr(tokenizer, forced, False))


def _decodes_itself(tokenizer: Any) -> bool:
    """Has this class of `transformers` a decoding of its own, beside its backend's?"""
    from transformers import PreTrainedTokenizerFast

    return getattr(type(tokenizer), "_decode", None) is not PreTrainedTokenizerFast._decode


def _joins(part: dict[str, Any]) -> bool:
    """Does a decoder's part work on each token by itself?"""
    if part["type"] == "Sequence":
        return True  # its parts are looked at too
    return part["type"] in _JOINING and not part.get("stop") and not _reach(part)


def _reach(part: dict[str, Any]) -> int:
    """How far before the end of a text what a decoder's part replaces may begin."""
    if part["type"] != "Replace":
        return 0
    return len(part["pattern"].get("String", _LONGEST * " ")) - 1


def _byte_tokens(backend: Any) -> Iterator[tuple[int, int]]:
    for token, id_ in backend.get_vocab(with_added_tokens=True).items():
        if found := _BYTE.fullmatch(token):
            yield id_, int(found[1], 16)


_DECODINGS: WeakKeyDictionary[Any, Decoding] = WeakKeyDictionary()


def decoding_of(tokenizer: Any) -> Decoding:
    """How a tokenizer decodes, looked up once."""
    found = _DECODINGS.get(tokenizer)
    if found is None:
        found = _DECODINGS[tokenizer] = Decoding(tokenizer)
    return found


class Detokenizer:
    """One growing text.

    Tokens are handed in one by one; the text of each comes back, in order, once it is certain to
    stay. A character that several tokens spell belongs to the last of them. The texts join to what
    the tokenizer decodes all tokens to behind others, special ones left out: so a space that the
    first token holds is kept, where many decoders take it off; but not one that it does not hold.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._how = decoding_of(tokenizer)
        # A window on the last tokens, what it decodes to behind the context, and how many of those
        # characters were given. Where a last token is known, the window is that token.
        self._last: int | None = None
        self._window: list[int] = []
        self._decoded = self._how.decode(self._how.context) if self._how.context else ""
        self._given = len(self._decoded)
        # Of every token whose text is still to come: up to where its text was certain when it came,
        # and what followed, which belongs to it if it stays so.
        self._waiting: list[tuple[int, str]] = []
        # Byte tokens that came one after another, and silent ones between them.
        self._run: list[int] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        # The last tokens of a run up to its first bad byte, if the run goes on.
        self._bad: list[int] = []
        self._begun = not self._how.implies_spaces

    def push(self, token: int) -> list[str]:
        """Take a token in; the texts of the earliest waiting tokens that are now certain."""
        texts = self._push(token)
        return texts if self._begun else self._begin(texts)

    def close(self) -> list[str]:
        """The text has ended: the texts of all tokens that were still waiting."""
        texts = self._end_run() if self._run else []
        texts += self._settle(len(self._decoded))
        return texts if self._begun else self._begin(texts)

    def _begin(self, texts: list[str]) -> list[str]:
        """Take the space off that the tokenizer sets before the first text."""
        for index, text in enumerate(texts):
            if text:
                self._begun = True
                texts[index] = text.removeprefix(" ")
                break
        return texts

    def _push(self, token: int) -> list[str]:
        how, texts = self._how, list[str]()
        if token in how.bytes and not self._bad:
            self._run.append(token)
            try:
                self._utf8.decode(bytes([how.bytes[token]]))
            except UnicodeDecodeError:
                self._bad = [one for one in self._run if one in how.bytes][-_LONGEST_CHARACTER:]
                return self._end_run()
            return []
        if how.alone(token) is None:
            return self._push_silent(token)
        if token not in how.bytes:
            texts, self._bad = self._end_run() if self._run else [], []
            text = how.text(token)
            if text is not None and not self._waiting:
                self._last = token
                return [*texts, text]
        self._decode([token])
        certain = how.certain(self._decoded)
        self._waiting.append((certain, self._decoded[certain:]))
        return texts + self._settle(certain)

    def _push_silent(self, token: int) -> list[str]:
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
        self._decoded = self._how.decode([*self._how.context, *self._window])

    def _restart(self, window: list[int]) -> None:
        """Put a window, all of whose text was given, in place of the present one."""
        how = self._how
        self._last, self._window = None, window
        alone = how.alone(window[0]) if len(window) == 1 else None
        self._decoded = how.decode([*how.context, *window]) if alone is None else alone
        self._given = len(self._decoded)

    def _end_run(self) -> list[str]:
        """Decode a run of bytes, which has ended or has a bad byte and so no character at all."""
        run, self._run = self._run, []
        spelled = [self._how.bytes.get(token) for token in run]
        self._utf8.reset()
        data = bytes(byte for byte in spelled if byte is not None)
        shown = _show(data)
        if self._last is not None:
            self._restart([self._last])
        before = self._decoded
        self._decode([token for token in run if token in self._how.bytes])
        end, certain = len(before), self._how.certain(self._decoded)
        if self._decoded != before + "".join(shown):  # more decoders work on the text
            shown = [self._decoded[end:], *[""] * (len(data) - 1)]
        texts = iter(shown)
        for byte in spelled:
            end += 0 if byte is None else len(next(texts))
            at = min(end, certain)
            self._waiting.append((at, self._decoded[at:end]))
        return self._settle(certain)

    def _settle(self, certain: int) -> list[str]:
        """Give the texts of the tokens that end in the certain part of the decoded text."""
        texts = []
        for at, shown in self._waiting:
            end = at + len(shown) if self._decoded.startswith(shown, at) else at
            if end > certain:
                break
            end = max(end, self._given)
            texts.append(self._decoded[self._given : end])
            self._given = end
        del self._waiting[: len(texts)]
        if not self._waiting and texts and texts[-1]:
            self._restart(list(self._bad or self._window[-1:]))
        elif len(self._window) > 2 * _KEPT and not self._how.cleans:
            self._cut_back()
        return texts

    def _cut_back(self) -> None:
        """Shorten a window whose end is not certain yet."""
        window = self._window[-_KEPT:]
        decoded = self._how.decode([*self._how.context, *window])
        cut = len(self._decoded) - len(decoded)
        if self._given < cut or decoded[self._given - cut :] != self._decoded[self._given :]:
            return
        self._window, self._decoded = window, decoded
        self._given -= cut
        self._waiting = [
            (max(at - cut, 0), shown[max(cut - at, 0) :]) for at, shown in self._waiting
        ]


def _show(data: bytes) -> list[str]:
    """What each byte of a run shows: the character that it completes; U+FFFD in a bad run."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    try:
        shown = [utf8.decode(bytes([byte])) for byte in data]
        utf8.decode(b"", final=True)
    except UnicodeDecodeError:
        return [REPLACEMENT] * len(data)
    return shown
