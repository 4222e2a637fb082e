"""Sampling parameters, checked when they are given."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from baco.errors import BacoError
from baco.sampling.structure import (
    Schema,
    Structure,
    check_choice,
    check_pattern,
    check_schema,
    structure_of,
)
from baco.text.invalid_characters import check_characters

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 2**16
DRY_BREAKERS = ("\n", ":", '"', "*")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw the samples of one prompt. Every field is checked when the object is made.

    Args:
        n: samples per prompt, at least 1.
        seed: 0 … 2**63 - 1; None takes a random one, which the results record.
        temperature: 0 takes the most likely token; at most 100.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        min_p: keep tokens at least this fraction of the most likely one, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in the
            active source's prompt or in the answer (Keskar et al. 2019); 1 is off.
        presence_penalty: subtracted once from the logits of tokens in the answer, -2 … 2.
        frequency_penalty: subtracted once per occurrence in the answer, -2 … 2.
        repetition_window: the three penalties count only the last this many tokens of the active
            source's prompt and the answer; 0 counts all.
        dry_multiplier: strength of DRY, which lowers tokens that would extend a sequence that
            occurred before in the active source's prompt or the answer; 0 is off.
        dry_base: the penalty grows by this factor with each token of the sequence, 1 … 10.
        dry_allowed_length: sequences of fewer tokens are free, at least 1.
        dry_window: DRY reads only the last this many tokens; 0 reads all.
        dry_breakers: a sequence goes beyond no token that contains one of these texts.
        logit_bias: token id → number added to its logit, -100 … 100, whichever model writes.
        max_tokens: longest answer, in tokens.
        stop: strings that end an answer; they are cut off.
        logprobs: also return this many most likely tokens per position, at most 65,536.
        samplers: spellings of further samplers, such as ``top_n_sigma:1.0``, which run in this
            order after penalties and logit_bias and before temperature. ``baco samplers`` lists
            them.
        schema: the answer is JSON of this schema: a mapping, JSON text or a pydantic model.
        regex: the whole answer matches this regular expression.
        choice: the answer is one of these texts.
        grammar: the answer is a sentence of this grammar, in Lark's notation. At most one of these
            four may be given.

    Raises:
        BacoError: a value is out of its range.
    """

    n: int = 1
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_window: int = 0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 0
    dry_breakers: tuple[str, ...] = DRY_BREAKERS
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    samplers: tuple[str, ...] = ()
    schema: Schema | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "dry_breakers"):
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        _whole("n", self.n, 1, 65_536)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        _number("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise BacoError("top_p is 0: give a number above 0 and up to 1 (1 keeps every token)")
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _whole("repetition_window", self.repetition_window, 0, 2**31 - 1)
        _number("dry_multiplier", self.dry_multiplier, 0.0, 100.0)
        _number("dry_base", self.dry_base, 1.0, 10.0)
        _whole("dry_allowed_length", self.dry_allowed_length, 1, 2**31 - 1)
        _whole("dry_window", self.dry_window, 0, 2**31 - 1)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        object.__setattr__(self, "samplers", _samplers(self.samplers))
        object.__setattr__(self, "schema", check_schema(self.schema))
        object.__setattr__(self, "choice", check_choice(self.choice))
        check_pattern("regex", self.regex)
        check_pattern("grammar", self.grammar)
        structure_of(self.schema, self.regex, self.choice, self.grammar)

    @property
    def structure(self) -> Structure | None:
        """What the answer has to be; None where anything goes."""
        return structure_of(self.schema, self.regex, self.choice, self.grammar)

    @property
    def penalises(self) -> bool:
        """Whether any penalty is on."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def reads_history(self) -> bool:
        """Whether it has DRY, or penalties within a window."""
        return self.dry_multiplier > 0 or (self.penalises and self.repetition_window > 0)

    def updated(self, changes: Mapping[str, Any]) -> Self:
        """A copy with ``changes``; BacoError for a name that is not a sampling parameter."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise BacoError(
                    f"unknown sampling parameter {name!r}: known are {', '.join(known)}"
                )
        return replace(self, **changes)

    def seeded(self) -> Self:
        """A copy that has a seed: its own, or a fresh one."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**31))


def _texts(name: str, given: object) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(s, str) and s for s in texts):
        raise BacoError(f"{name} is {given!r}: give a string or a list of non-empty strings")
    for text in texts:
        check_characters(name, text)
    return tuple(texts)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BacoError(f"{name} is {value!r}: give a whole number from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BacoError(f"{name} is {value!r}: give a number from {low:g} to {high:g}")


def _samplers(given: object) -> tuple[str, ...]:
    """The spellings with all their numbers."""
    spellings = (given,) if isinstance(given, str) else given
    if not isinstance(spellings, list | tuple):
        raise BacoError(f"samplers is {given!r}: give spellings such as top_n_sigma:1.0")
    if not spellings:
        return ()
    from baco.sampling.sampler_chain import parse_chain  # imports torch

    return tuple(step.spelling for step in parse_chain(spellings))


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise BacoError(f"logit_bias is {given!r}: give a mapping from token ids to numbers")
    for token, value in pairs:
        _whole("a token id of logit_bias", token, 0, 2**31 - 1)
        _number(f"logit_bias of token {token}", value, -100.0, 100.0)
    return tuple(sorted((int(token), float(value)) for token, value in pairs))
