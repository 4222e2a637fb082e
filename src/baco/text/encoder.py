"""From text to token ids; long texts are tokenised in pieces.

The ids are those of one call of the tokenizer, since a text is cut only where no token can span the
cut. Pieces allow to stop as soon as there are too many tokens, and to do other work in between.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from baco.errors import BacoError, ContextLengthError, prompt_too_long, shortened
from baco.text.token_bytes import parts_of, spell

# Characters of a piece: one or two milliseconds of work.
PIECE = 4096
# A text is cut before a space between two letters, where a word ends in any tokenizer …
_SEAM = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
# … unless it has tokens of several words.
_SPANS_WORDS = re.compile(rb"[A-Za-z] ")
# This text must have the same tokens whether it is cut at every seam or not at all.
_TRIAL = (
    "The quick brown fox can't jump over 12,345 lazy dogs, or can it\nWe walk  along the shore "
    'of Lisbon: Grüße aus München und Zürich, où est la bibliothèque\tand "all of this" is '
    "written as camelCase or snake_case or HTML <b>text</b> where 夏天去 the море is warm 🌊 too "
)
# Normalizers that never shorten a text; and by how much NFC can shorten it: three letters of Hangul
# become one syllable of as many bytes as each.
_NOT_SHORTENING, _NFC = {"Prepend", "ByteLevel"}, 3
# Pre-tokenizers that divide a text into words and drop nothing.
_DIVIDING = {"Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"}


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest prompt that a model can read.

    Attributes:
        name: the model, ``base`` or ``aligned``.
        context: its context window, in tokens.
        most: tokens of the longest prompt.
    """

    name: str
    context: int
    most: int


def no_pause() -> None:
    """Do nothing between two pieces."""


@contextlib.contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Turn all that a tokenizer raises into BacoError, panics of the tokenizers library too."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        kind, message = type(error).__name__, shortened(str(error))
        raise BacoError(
            f"the tokenizer of {name} fails on this prompt: {kind}{message and f': {message}'}; "
            "change the prompt, or repair the tokenizer's files"
        ) from error


class Encoder:
    """Tokenises prompts with one tokenizer of ``transformers``.

    Args:
        tokenizer: the model's own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(
        self,
        text: str,
        *,
        special: bool,
        limit: Limit | None = None,
        pause: Callable[[], None] = no_pause,
        before: int = 0,
    ) -> tuple[int, ...]:
        """Token ids of a text.

        Args:
            text: any text.
            special: let the tokenizer add its BOS token.
            limit: of the number of ids.
            pause: called between two pieces; an exception that it raises ends the work.
            before: ids that the same prompt has before these.

        Raises:
            BacoError: the text has too many tokens, or the tokenizer fails.
        """
        if limit is not None and self.longest is not None:
            size, most = _bytes(text), (limit.most - before) * self.longest
            if size > most:
                raise ContextLengthError(
                    f"prompt of {size} bytes: the {limit.name} model's context window is "
                    f"{limit.context} tokens, which is {most} bytes at most; shorten the prompt"
                )
        ids: list[int] = []
        for index, (piece, last) in enumerate(self._pieces(text, special)):
            if index:
                pause()
            ids += piece
            if limit is not None and before + len(ids) > limit.most:
                raise prompt_too_long(before + len(ids), limit.name, limit.context, more=not last)
        return tuple(ids)

    def _pieces(self, text: str, special: bool) -> Iterator[tuple[list[int], bool]]:
        """The ids of each piece, and whether it is the last."""
        cuts = self._cuts(text) if len(text) > PIECE else []
        prefix = self._special_prefix if cuts and special else ()
        if not cuts or prefix is None:
            yield self._whole(text, special), True
            return
        ids = list(prefix)
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._call(text[start + self._skipped(start) : stop], special=False)
            yield ids, stop == len(text)
            ids = []

    def _skipped(self, start: int) -> int:
        """Characters to leave out at the start of a piece, because the tokenizer adds them."""
        return int(bool(start) and self._adds_space is True)

    def _cuts(self, text: str) -> list[int]:
        """Where to cut a text into pieces of PIECE characters or a little more."""
        if self._adds_space is None:
            return []
        cuts, at = [], 0
        while (seam := _SEAM.search(text, at + PIECE)) is not None:
            cuts.append(at := seam.start())
        return cuts

    def _whole(self, text: str, special: bool) -> list[int]:
        ids = self._call(text, special=special)
        end = getattr(self.tokenizer, "eos_token_id", None)
        if special and len(ids) > 1 and ids[-1] == end:
            ids = ids[:-1]  # some tokenizers also add EOS, after which nothing could follow
        return ids

    def _call(self, text: str, *, special: bool) -> list[int]:
        with tokenizing(self.tokenizer):
            ids: list[int] = self.tokenizer(text, add_special_tokens=special, **self._options)[
                "input_ids"
            ]
        return ids

    def prepare(self) -> None:
        """Compute now what is otherwise computed for the first long text."""
        _ = self.longest, self._adds_space

    @cached_property
    def longest(self) -> int | None:
        """The most bytes of a text that one token can stand for; None if unbounded."""
        return self._vocabulary[0]

    @cached_property
    def _options(self) -> dict[str, bool]:
        """Arguments that suppress masks and warnings about long texts, where supported."""
        if not getattr(self.tokenizer, "is_fast", False):
            return {}
        return dict.fromkeys(("verbose", "return_attention_mask", "return_token_type_ids"), False)

    @cached_property
    def _vocabulary(self) -> tuple[int | None, bool]:
        """`longest`, and whether no token spans a seam."""
        try:
            spelled = list(spell(self.tokenizer))
        except BacoError:
            return None, False
        added = self.tokenizer.added_tokens_decoder
        names = {id_: token.content.encode() for id_, token in added.items()}
        texts = [names.get(token.id, token.data) for token in spelled]
        cuttable = not any(map(_SPANS_WORDS.search, texts))
        stripping = [token for token in added.values() if token.lstrip or token.rstrip]
        cuttable &= not any(token.content[:1].isalpha() for token in stripping if token.lstrip)
        cuttable &= not any(token.content[-1:].isalpha() for token in stripping if token.rstrip)
        shortening = None if stripping else self._max_shortening
        # Without a token for every byte, the unknown token can stand for any text.
        has_bytes = {bytes([byte]) for byte in (*range(0xC0), *range(0xC2, 0xF5))} <= set(texts)
        longest = shortening * max(map(len, texts)) if has_bytes and shortening else None
        return longest, cuttable

    @property
    def _max_shortening(self) -> int | None:
        """The largest factor by which normalisation can shorten a text; None if unbounded."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        for state in parts_of(backend.pre_tokenizer):
            if state["type"] not in _DIVIDING or state.get("behavior") == "Removed":
                return None
        factor = 1
        for state in parts_of(backend.normalizer):
            spaces = state["type"] == "Replace" and state["pattern"] == {"String": " "}
            if state["type"] == "NFC":
                factor *= _NFC
            elif state["type"] not in (*_NOT_SHORTENING, "Sequence") and not (
                spaces and state["content"]
            ):
                return None
        return factor

    @cached_property
    def _adds_space(self) -> bool | None:
        """Whether the tokenizer adds a space before a text; None where texts cannot be cut."""
        if not self._vocabulary[1]:
            return None
        cuts = [0, *(seam.start() for seam in _SEAM.finditer(_TRIAL)), len(_TRIAL)]
        whole = self._call(_TRIAL, special=False)
        for skipped in (0, 1):
            starts = [cut + skipped * (cut > 0) for cut in cuts[:-1]]
            spans = zip(starts, cuts[1:], strict=True)
            pieces = [self._call(_TRIAL[start:stop], special=False) for start, stop in spans]
            if [token for piece in pieces for token in piece] == whole:
                return bool(skipped)
        return None

    @cached_property
    def _special_prefix(self) -> tuple[int, ...] | None:
        """The special tokens that the tokenizer puts before a text; None if it does more."""
        plain, marked = self._call("a", special=False), self._whole("a", special=True)
        prefix = tuple(marked[: len(marked) - len(plain)])
        return prefix if [*prefix, *plain] == marked else None


def _bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text.encode(errors="surrogatepass"))
