"""Which tokens an answer's structure allows at a position: automata over a vocabulary.

:mod:`llguidance` compiles structures and computes masks. It is an optional dependency:
``pip install "baco[structured]"``.

A *forced* token is the only one that is allowed. Where the structure determines the next bytes of
the text (a key, a brace), that token is the tokenizer's own first token for these bytes. So what is
forced is a function of the answer so far and needs no model.

It knows bytes of tokens and structures. It does not know models, routers or logits.
"""

import re
import string
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baco.errors import BacoError, shortened
from baco.limited_process import EndedError, LimitedProcess
from baco.sampling.structure import Structure, with_calendar

# int32 words of 32 tokens, the lowest bit first; the W words of a row cover all V tokens.
Mask = NDArray[np.int32]

_INSTALL = 'structured answers need llguidance: pip install "baco[structured]"'
# Limits of compiling a structure without a vocabulary: CPU seconds, bytes of the process.
SECONDS = 2.0
_MEMORY = 512 * 2**20
_PROGRAM = Path(__file__).with_name("structure_process.py")
# Compiled structures that a vocabulary keeps, and the characters of their texts, for the memory.
_KEPT, _KEPT_CHARACTERS = 64, 2**20
# A compiled structure is tried on an answer of this many tokens, of which this stride picks each.
_REHEARSED, _STRIDE = 48, 7919
# Texts that precede a text while it is encoded, so that it is not encoded as the start of a text.
_ANCHORS = ("\n", "(", "a")
# What shows where a beginning of a JSON text is: strings, of which the last may be open, and marks.
_JSON_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[][{},:]', re.DOTALL)


class Place(IntEnum):
    """What a structure leaves open at a position.

    Free text is where every letter from a to z may come next, or every one from A to Z: inside
    strings of JSON, but not in keys, values of an enum, numbers or literals. All else is structure.
    A position inside a character is of the kind of the position where the character begins.
    """

    STRUCTURE = 0
    BEGINNING = 1  # the first position of a free text
    INSIDE = 2  # another one


class Following(NamedTuple):
    """What the structure of an answer allows a model to write next.

    Attributes:
        mask: over the model's tokens.
        forced: whether it allows one token, or only the end of the answer.
        begins: whether a free text begins here.
    """

    mask: Mask
    forced: bool = False
    begins: bool = False


class Automaton:
    """Where one answer is in its structure. One thread uses it at a time."""

    def __init__(self, matcher: Any, vocabulary: "_TokenTable", kind: str) -> None:
        self._matcher, self._vocabulary, self._kind = matcher, vocabulary, kind
        self._read = 0  # tokens of the answer that the matcher has consumed
        self._followed: list[int] = []  # these tokens, where two models share the text
        self._masks: dict[tuple[int, ...], Mask] = {}  # after the answer so far and these tokens
        self._places: list[Place] = []  # of the tokens that the matcher has consumed

    def masks(self, answer: Sequence[int], drafted: Sequence[int]) -> list[Mask]:
        """What is allowed after an answer, and after each of its draft tokens.

        Args:
            answer: its tokens. Since the last call it may have grown, or lost its last tokens.
            drafted: draft tokens behind it. Behind one that is not allowed, and behind an end
                token, everything is.

        Returns:
            A mask for each of the ``len(drafted) + 1`` positions.

        Raises:
            BacoError: no token is allowed, or the structure is too complex to go on.
        """
        if answer and answer[-1] in self._vocabulary.ends:
            return [self._vocabulary.anything] * (len(drafted) + 1)
        self._catch_up(answer)
        masks, consumed = [self._mask(())], 0
        for place, token in enumerate(drafted):
            if not _holds(masks[-1], token) or token in self._vocabulary.ends:
                masks += [self._vocabulary.anything] * (len(drafted) - place)
                break
            after = tuple(drafted[: place + 1])
            if after not in self._masks:
                self._consume(drafted[consumed : place + 1])
                consumed = place + 1
            masks.append(self._mask(after))
        self._matcher.rollback(consumed)
        return masks

    def after(self, text: bytes, ids: Sequence[int]) -> Following:
        """What may follow a text that two models share; errors as for `masks`.

        Args:
            text: the answer so far.
            ids: those that the model has for it. Some may have taken the place of others since the
                last call. Where they spell another text, as after characters that a tokenizer
                normalizes, the bytes of the text are followed.
        """
        spelled = self._vocabulary.bytes_of(ids) == text
        tokens = list(ids) if spelled else self._vocabulary.byte_ids(text)
        pairs = enumerate(zip(self._followed, tokens, strict=False))
        same = next((at for at, (old, new) in pairs if old != new), len(tokens))
        if same < self._read:
            self._catch_up(tokens[:same])
        self._followed = tokens
        [mask], [place] = self.follow(tokens, ())
        return Following(mask, self.is_forced(mask), place is Place.BEGINNING)

    def follow(
        self, answer: Sequence[int], drafted: Sequence[int]
    ) -> tuple[list[Mask], list[Place]]:
        """The masks and the places after an answer, and after each of its draft tokens; as for
        `masks`.
        """
        masks, places = self.masks(answer, drafted), self._places[-1:]
        for count, mask in enumerate(masks):
            places.append(self._place(mask, [*answer, *drafted[:count]], places[-1:]))
        return masks, places[-len(masks) :]

    def places(self, answer: Sequence[int], drafted: Sequence[int]) -> list[Place]:
        """The places alone."""
        return self.follow(answer, drafted)[1]

    def ends_text(self, answer: Sequence[int], drafted: Sequence[int], token: int) -> bool:
        """Whether a token after these ends the free text that they are in."""
        if token in self._vocabulary.ends:
            return True
        return self.places(answer, [*drafted, token])[-1] is not Place.INSIDE

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        """The next tokens that are forced, up to ``most``; errors as for `masks`."""
        self._catch_up(answer)
        tokens: list[int] = []
        while len(tokens) < most:
            token = only_token(self._mask(tuple(tokens)))
            if token is None:
                break
            tokens.append(token)
            if token in self._vocabulary.ends:
                break
            self._consume([token])
        self._matcher.rollback(len(tokens) - (bool(tokens) and tokens[-1] in self._vocabulary.ends))
        return tokens

    def rehearse(self, tokens: int) -> None:
        """Follow some possible answer for a number of tokens; errors as for `masks`."""
        answer: list[int] = []
        while len(answer) < tokens:
            allowed = np.flatnonzero(unpack_words(self.masks(answer, ())[0]))
            going_on = [token for token in allowed.tolist() if token not in self._vocabulary.ends]
            if not going_on:
                break
            answer.append(going_on[_STRIDE * len(answer) % len(going_on)])

    @property
    def is_unsatisfiable(self) -> bool:
        """Whether nothing can follow, whatever the vocabulary."""
        reason: str = self._matcher.get_error()
        return reason.startswith("NoExtensionBias")

    @property
    def is_too_complex(self) -> bool:
        """Whether it cannot be followed any more, whatever the vocabulary."""
        is_error: bool = self._matcher.is_error()
        return is_error

    def is_forced(self, mask: Mask) -> bool:
        """Whether a mask allows one token, or only the end of the answer."""
        if only_token(mask) is not None:
            return True
        return not (mask & self._vocabulary.continuing).any()

    def _catch_up(self, answer: Sequence[int]) -> None:
        if len(answer) == self._read:
            return
        if len(answer) < self._read:
            self._matcher.rollback(self._read - len(answer))
            del self._places[len(answer) :]
            self._masks.clear()
        else:
            fresh = tuple(answer[self._read :])
            for count, token in enumerate(fresh):
                before = answer[: self._read + count]
                self._places.append(
                    self._place(self._possible(fresh[:count]), before, self._places[-1:])
                )
                self._consume([token])
            self._masks = {
                after[len(fresh) :]: mask
                for after, mask in self._masks.items()
                if after[: len(fresh)] == fresh
            }
        self._read = len(answer)

    def _consume(self, tokens: Sequence[int]) -> None:
        if not self._matcher.consume_tokens(list(tokens)):
            self._fail()

    def _mask(self, after: tuple[int, ...]) -> Mask:
        """The mask in the matcher's state, which is after the answer and these tokens."""
        mask = self._possible(after)
        if not mask.any():
            self._fail()
        return mask

    def _possible(self, after: tuple[int, ...]) -> Mask:
        """The same, which can be empty where another tokenizer's text is followed."""
        mask = self._masks.get(after)
        if mask is None:
            mask = self._vocabulary.anything.copy()
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if self._matcher.is_error():
                self._fail()
            mask &= self._vocabulary.writable
            self._masks[after] = mask
        return mask

    def _place(self, mask: Mask, before: Sequence[int], earlier: Sequence[Place]) -> Place:
        """The place where a mask holds, after these tokens; ``earlier`` ends with the place of the
        last of them.
        """
        vocabulary = self._vocabulary
        if mask is vocabulary.anything:  # after a draft token that is not allowed
            return Place.INSIDE
        was_text = bool(earlier) and earlier[-1] is not Place.STRUCTURE
        if not vocabulary.allows_letters(mask):
            in_character = was_text and not (mask & vocabulary.beginning).any()
            return Place.INSIDE if in_character else Place.STRUCTURE
        if self._kind == "choice":
            return Place.STRUCTURE
        if self._kind != "schema":
            return Place.INSIDE if was_text else Place.BEGINNING
        data = vocabulary.data
        opened = bool(before) and b'"' in data[before[-1]].replace(b'\\"', b"")
        if was_text and not opened:
            return Place.INSIDE
        if _in_key(b"".join(data[token] for token in before)):
            return Place.STRUCTURE
        return Place.BEGINNING if opened else Place.INSIDE

    def _fail(self) -> None:
        reason = self._matcher.get_error() or "the tokenizer has no token for what has to come next"
        raise BacoError(f"the answer's {self._kind} cannot be followed: {_tidy(reason)}")


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """A structure that is compiled for a vocabulary.

    Attributes:
        structure: the structure that it was compiled from.
        joining_space: whether one space may precede the answer's text.
    """

    structure: Structure
    _matcher: Any
    _vocabulary: "_TokenTable"
    joining_space: bool = False

    @property
    def before(self) -> Mask:
        """What is allowed before the answer, while a model thinks: all but the end of text."""
        return self._vocabulary.unended

    def begin(self) -> Automaton:
        """The automaton of a new answer."""
        return Automaton(self._matcher.deep_copy(), self._vocabulary, self.structure.kind)


class StructureCompiler:
    """Compiles structures for one vocabulary, and keeps the latest. Any thread may use it.

    Args:
        data: the bytes of each token; empty for special tokens.
        ends: the tokens that end an answer.
        special: tokens that no structure allows, whatever their bytes; end tokens are not counted.
        encode: a text's tokens as the tokenizer has them, without special ones.
    """

    def __init__(
        self,
        data: Sequence[bytes],
        ends: Collection[int],
        special: Iterable[int],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self._make_vocabulary = partial(_TokenTable, data, ends, special, encode)
        self._vocabulary: _TokenTable | None = None  # made when it is first needed
        self._kept: OrderedDict[tuple[Structure, bool], Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, structure: Structure, *, joining_space: bool = False) -> Constraint:
        """A structure as an automaton over the vocabulary.

        Args:
            structure: of the answer's text.
            joining_space: whether one space may precede the text.

        Raises:
            BacoError: the structure is wrong, cannot be satisfied or is too complex; or llguidance
                is not installed.
        """
        key = (structure, joining_space)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._make_vocabulary()
            constraint = self._kept.pop(key, None)
        # Without the lock: a thread that finds its structure ready waits for no other.
        if constraint is None:
            constraint = _compile(structure, self._vocabulary, joining_space=joining_space)
        with self._lock:
            self._kept[key] = constraint
            while len(self._kept) > 1 and self._keeps_too_much:
                self._kept.popitem(last=False)
        return constraint

    @property
    def _keeps_too_much(self) -> bool:
        characters = sum(len(structure.text) for structure, _ in self._kept)
        return len(self._kept) > _KEPT or characters > _KEPT_CHARACTERS


def _compile(structure: Structure, vocabulary: "_TokenTable", *, joining_space: bool) -> Constraint:
    from llguidance import LLMatcher, LLParserLimits

    grammar = _tried_out(structure, joining_space=joining_space)
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise BacoError(_explained(structure, matcher.get_error()))
    constraint = Constraint(structure, matcher, vocabulary, joining_space)
    automaton = constraint.begin()
    try:
        automaton.rehearse(_REHEARSED)
    except BacoError as error:
        if automaton.is_unsatisfiable:
            raise BacoError(f"no answer can satisfy the {structure.kind}") from error
        if not automaton.is_too_complex:
            raise
        raise BacoError(
            f"the {structure.kind} is too complex ({error}): make it simpler, for example with "
            "fewer nested repetitions"
        ) from error
    return constraint


def _tried_out(structure: Structure, *, joining_space: bool) -> str:
    """A structure as llguidance reads it, once it has been compiled within limits.

    Raises:
        BacoError: it is wrong, or compiling it takes too long or too much memory.
    """
    is_schema = structure.kind == "schema"
    request = {
        "kind": structure.kind,
        "text": with_calendar(structure.text) if is_schema else structure.text,
        "joining_space": joining_space,
    }
    try:
        reply = _process.ask(request, SECONDS)
    except EndedError as error:
        if error.timed_out:
            fault = f"compiling it takes longer than {SECONDS:g} seconds of computing"
        else:
            fault = f"it ends the process that compiles it, {error}"
        raise BacoError(f"the {structure.kind} is too complex ({fault}): make it simpler") from None
    if reply["fault"]:
        raise BacoError(_explained(structure, reply["fault"]))
    grammar: str = reply["grammar"]
    return grammar


class _TokenTable:
    """A vocabulary as llguidance reads it.

    Attributes:
        tokenizer: llguidance's.
        ends: the tokens that end an answer.
        anything: the mask of all tokens.
        unended: the same without the end tokens.
        writable: the mask of the tokens that a structure can allow.
        continuing: those of them that are no end tokens.
        beginning: those of the writable that do not continue a character that an earlier token
            began.
        data: the bytes of each token.
    """

    def __init__(
        self,
        data: Sequence[bytes],
        ends: Collection[int],
        special: Iterable[int],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise BacoError(_INSTALL) from error
        if not ends:
            raise BacoError("structured answers need an end token, and neither model names one")
        self.ends = frozenset(ends)
        apart = {*special, *ends, *(token for token, text in enumerate(data) if not text)}
        self.data = [
            b"\xff[%d]" % token if token in apart else text for token, text in enumerate(data)
        ]
        self._ids = {text: token for token, text in enumerate(self.data) if token not in apart}
        self._longest = max(map(len, self._ids), default=1)
        # Bytes without a token have one behind the vocabulary, which is never allowed.
        self._byte_ids = dict[int, int]()
        for byte in range(256):
            self._byte_ids[byte] = self._ids.get(bytes([byte]), len(self.data))
            if self._byte_ids[byte] == len(self.data):
                self.data.append(bytes([byte]))
        size = len(self.data)
        self._encode_text = encode
        # What `TokenizerWrapper` reads.
        self.tokens, self.special_token_ids = self.data, sorted(apart)
        self.eos_token_id, self.bos_token_id = min(ends), None
        self.tokenizer = LLTokenizer(TokenizerWrapper(self), size, sorted(ends))
        words, writable = (size + 31) // 32, np.ones(len(data), dtype=np.bool_)
        writable[sorted(apart - self.ends)] = False
        self.writable = pack(writable, words)
        writable[sorted(self.ends)] = False
        self.continuing = pack(writable, words)
        # The first byte of a token that continues a character is 10xxxxxx.
        inside = [id for id in range(len(data)) if self.data[id][0] & 0xC0 == 0x80]
        writable[inside] = False
        self.beginning = pack(writable, words) | (self.writable & ~self.continuing)
        self._alphabets = [
            np.array([id for c in letters if (id := self._ids.get(c.encode())) is not None])
            for letters in (string.ascii_lowercase, string.ascii_uppercase)
        ]
        self.anything = np.full_like(self.writable, -1)
        self.unended = self.anything & ~(self.writable & ~self.continuing)

    def __call__(self, text: bytes | str) -> list[int]:
        """The ids of a text that continues another one; they spell it byte by byte."""
        data = text if isinstance(text, bytes) else text.encode()
        try:
            decoded = data.decode()
        except UnicodeDecodeError:
            return self._greedy(data)
        for anchor in _ANCHORS:
            ids = list(self._encode_text(anchor + decoded))
            begin, size = 0, 0
            while begin < len(ids) and size < len(anchor):
                size += len(self.data[ids[begin]].lstrip(b" "))
                begin += 1
            if b"".join(self.data[token] for token in ids[begin:]) == data:
                return ids[begin:]
        return self._greedy(data)

    def allows_letters(self, mask: Mask) -> bool:
        """Whether a mask allows every letter from a to z, or from A to Z, as a token."""
        return any(
            len(ids) > 0 and bool((mask[ids >> 5] >> (ids & 31) & 1).all())
            for ids in self._alphabets
        )

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        """The text that ids spell."""
        return b"".join([self.data[token] for token in ids])

    def byte_ids(self, text: bytes) -> list[int]:
        """An id for each byte of a text; some are behind the vocabulary."""
        return [self._byte_ids[byte] for byte in text]

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token at each place."""
        ids, at = list[int](), 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                if (token := self._ids.get(data[at:end])) is not None:
                    ids.append(token)
                    break
            else:
                end = at + 1
                ids.append(self._byte_ids[data[at]])
            at = end
        return ids


def only_token(mask: Mask) -> int | None:
    """The one token that a mask allows; None where it allows several."""
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    bits = int(mask[words[0]]) & 0xFFFFFFFF
    return int(words[0]) * 32 + bits.bit_length() - 1 if bits & (bits - 1) == 0 else None


def pack(tokens: NDArray[np.bool_], words: int) -> Mask:
    """From tokens that are allowed, bool [V], to a mask of ``words`` words."""
    padded = np.zeros(32 * words, dtype=np.bool_)
    padded[: len(tokens)] = tokens
    return np.packbits(padded, bitorder="little").view(np.int32)


def unpack(masks: Tensor, size: int) -> Tensor:
    """From masks, int32 [N, W], to the tokens that they allow, bool [N, V]."""
    if masks.device.type == "cpu":
        words: NDArray[np.int32] = masks.numpy()
        return torch.from_numpy(unpack_words(words)[:, :size])
    bit = torch.arange(32, dtype=torch.int32, device=masks.device)
    return (masks[:, :, None] >> bit & 1).flatten(1)[:, :size].bool()


def unpack_words(masks: Mask) -> NDArray[np.bool_]:
    """From masks [..., W] to bool [..., 32 · W]."""
    return np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little").view(np.bool_)


def _holds(mask: Mask, token: int) -> bool:
    return bool(int(mask[token >> 5]) >> (token & 31) & 1)


def _in_key(text: bytes) -> bool:
    """Whether a beginning of a JSON text, which ends inside a string, ends in a property's name."""
    opened, is_key = list[bytes](), False
    for part in _JSON_PARTS.findall(text):
        if part in (b"{", b"["):
            opened.append(part)
            is_key = part == b"{"
        elif part in (b"}", b"]"):
            opened.pop()
        elif part == b",":
            is_key = opened[-1] == b"{"
        elif part == b":":
            is_key = False
    return is_key


def _tidy(message: str) -> str:
    """The line of an error message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    causes = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    return (causes or lines or [message])[0].rstrip(".")


def _explained(structure: Structure, message: str) -> str:
    """An error of the compiler in one line."""
    cause = shortened(_tidy(message).partition("Regex is empty: ")[0])
    if structure.kind == "schema":
        if cause == "Unsatisfiable schema:":
            return "no answer can satisfy the schema: no text is all that it says of a string"
        if cause.startswith("oneOf constraints"):
            return (
                "the schema's oneOf cannot be enforced, since an answer may fit several of its "
                "schemas: use anyOf, or give each schema a property with a const of its own"
            )
        if cause.startswith("Unimplemented keys: "):
            return f"the schema has keywords that are not supported: {cause.partition(': ')[2]}"
        if cause.startswith("Unsatisfiable schema: "):
            return f"no answer can satisfy the schema: {cause.partition(': ')[2]}"
    return f"the {structure.kind} cannot be used: {cause or 'simplify it'}"


_process = LimitedProcess(_PROGRAM, _MEMORY, "compiles structures")
