"""Text to token ids, piece by piece where a text is long.

The ids are those of one call of the tokenizer: a text is only cut where no token can reach over.
Pieces make it possible to stop as soon as there are too many tokens, and to do something else in
between.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from baco.errors import BacoError, prompt_too_long
from baco.text.templates import one_line
from baco.text.token_bytes import parts_of, spell

# Characters of a piece: one or two milliseconds of work.
PIECE = 4096
# A cut is made in front of a space between two letters, where a word ends in any tokenizer …
_SEAM = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
# … unless it has tokens of several words.
_ACROSS = re.compile(rb"[A-Za-z] ")
# Cut at every seam, it has to come to the same tokens as in one piece.
_TRIAL = (
    "The quick brown fox can't jump over 12,345 lazy dogs, or can it\nWe walk  along the shore "
    'of Lisbon: Grüße aus München und Zürich, où est la bibliothèque\tand "all of this" is '
    "written as camelCase or snake_case or HTML <b>text</b> where 夏天去 the море is warm 🌊 too "
)
# Normalisations that leave as many bytes as there were, or more; and by how much NFC may shrink a
# text: three letters of Hangul become one syllable of the same length.
_KEEPING, _NFC = {"Prepend", "ByteLevel"}, 3
# What divides a text into words and leaves nothing out.
_DIVIDING = {"Sequence", "ByteLevel", "Split", "Digits", "Punctuation", "Metaspace"}


@dataclass(frozen=True, slots=True)
class Limit:
    """How long a prompt may be.

    Attributes:
        name: of the model that reads it.
        context: its context window.
        most: tokens that the prompt may have.
    """

    name: str
    context: int
    most: int


def no_pause() -> None:
    """Go on at once."""


@contextlib.contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Whatever a tokenizer raises is a BacoError, a panic of the tokenizers library included."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise BacoError(
            f"the tokenizer of {name} fails on this prompt: {type(error).__name__}"
            f"{one_line(str(error))}; change the prompt, or repair the tokenizer's files"
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
            special: let the tokenizer open it with its own mark (BOS).
            limit: how many ids there may be; any number where there is none.
            pause: called between two pieces; what it raises ends the work.
            before: ids of the same prompt that come before these.

        Raises:
            BacoError: the text has too many tokens, or the tokenizer fails.
        """
        if limit is not None and self.longest is not None:
            size, most = _bytes(text), (limit.most - before) * self.longest
            if size > most:
                raise BacoError(
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
        """Ids of a text, and whether no more follow."""
        cuts = self._cuts(text) if len(text) > PIECE else []
        mark = self._mark if cuts and special else ()
        if not cuts or mark is None:
            yield self._whole(text, special), True
            return
        ids = list(mark)
        for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
            ids += self._call(text[start + self._skipped(start) : stop], special=False)
            yield ids, stop == len(text)
            ids = []

    def _skipped(self, start: int) -> int:
        """Characters that are left out at the beginning of a piece, which the tokenizer adds."""
        return int(bool(start) and self._adds_space is True)

    def _cuts(self, text: str) -> list[int]:
        """Where a text is cut, in pieces of PIECE characters or a little more."""
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
            ids = ids[:-1]  # some tokenizers close a text too: then there is nothing to continue
        return ids

    def _call(self, text: str, *, special: bool) -> list[int]:
        with tokenizing(self.tokenizer):
            ids: list[int] = self.tokenizer(text, add_special_tokens=special, **self._options)[
                "input_ids"
            ]
        return ids

    def prepare(self) -> None:
        """Find out now what is otherwise found out with the first long text."""
        _ = self.longest, self._adds_space

    @cached_property
    def longest(self) -> int | None:
        """Bytes of a text that one token stands for at most; None where there is no bound."""
        return self._vocabulary[0]

    @cached_property
    def _options(self) -> dict[str, bool]:
        """Nothing but ids is asked for, and no word about long texts, where that can be said."""
        if not getattr(self.tokenizer, "is_fast", False):
            return {}
        return dict.fromkeys(("verbose", "return_attention_mask", "return_token_type_ids"), False)

    @cached_property
    def _vocabulary(self) -> tuple[int | None, bool]:
        """`longest`, and whether a text may be cut at seams for all that tokens spell."""
        try:
            spelled = list(spell(self.tokenizer))
        except BacoError:
            return None, False
        added = self.tokenizer.added_tokens_decoder
        names = {id_: token.content.encode() for id_, token in added.items()}
        texts = [names.get(one.id, one.data) for one in spelled]
        cuttable = not any(map(_ACROSS.search, texts))
        eaters = [one for one in added.values() if one.lstrip or one.rstrip]
        cuttable &= not any(token.content[:1].isalpha() for token in eaters if token.lstrip)
        cuttable &= not any(token.content[-1:].isalpha() for token in eaters if token.rstrip)
        growth = None if eaters else self._shrinks
        # Without a token for every byte, one for what is unknown may stand for any text.
        whole = {bytes([byte]) for byte in (*range(0xC0), *range(0xC2, 0xF5))} <= set(texts)
        longest = growth * max(map(len, texts)) if whole and growth else None
        return longest, cuttable

    @property
    def _shrinks(self) -> int | None:
        """How many times shorter normalisation makes a text at most; None: there is no bound."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        for state in parts_of(backend.pre_tokenizer):
            if state["type"] not in _DIVIDING or state.get("behavior") == "Removed":
                return None
        times = 1
        for state in parts_of(backend.normalizer):
            spaces = state["type"] == "Replace" and state["pattern"] == {"String": " "}
            if state["type"] == "NFC":
                times *= _NFC
            elif state["type"] not in (*_KEEPING, "Sequence") and not (spaces and state["content"]):
                return None
        return times

    @cached_property
    def _adds_space(self) -> bool | None:
        """Does the tokenizer put a space in front of a text? None where texts are not to be cut."""
        if not self._vocabulary[1]:
            return None
        cuts = [0, *(seam.start() for seam in _SEAM.finditer(_TRIAL)), len(_TRIAL)]
        whole = self._call(_TRIAL, special=False)
        for skipped in (0, 1):
            starts = [cut + skipped * (cut > 0) for cut in cuts[:-1]]
            each = zip(starts, cuts[1:], strict=True)
            pieces = [self._call(_TRIAL[start:stop], special=False) for start, stop in each]
            if [token for piece in pieces for token in piece] == whole:
                return bool(skipped)
        return None

    @cached_property
    def _mark(self) -> tuple[int, ...] | None:
        """What the tokenizer opens a text with; None where that is not just so many tokens."""
        plain, opened = self._call("a", special=False), self._whole("a", special=True)
        mark = tuple(opened[: len(opened) - len(plain)])
        return mark if [*mark, *plain] == opened else None


def _bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text.encode(errors="surrogatepass"))
