"""Routers by name: the spelling users type, and the place where a new router is announced.

A spelling is ``Name[-Name…][:argument,…]``: at most one logit rule and any content rules, in any
order; a bare number is the threshold γ; ``role=source`` is a row of the ``Role`` table;
``predict=base|aligned|either`` says whose most likely next token counts as the predicted one.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from baco.errors import BacoError
from baco.routing.routers import (
    CONTENT_ROLES,
    LOGIT_RULES,
    Constant,
    Custom,
    Router,
    Rule,
    Source,
)
from baco.routing.signals import Predictor
from baco.vocabulary import Role


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue: a router's name, how it is written, what it does."""

    name: str
    example: str
    sentence: str


_BUILT_IN = (
    Entry("P", "P:0.3", "base where max P_base < γ: the base model is unsure, so it has a choice"),
    Entry("H", "H:1.5", "base where the entropy of P_base is above γ nats"),
    Entry(
        "Gap", "Gap:0.5", "base where H(P_base) − H(P_aligned) > γ: alignment took diversity away"
    ),
    Entry("Punc", "Punc", "aligned for punctuation, format and end of text, else base"),
    Entry("FC", "FC", "aligned for function words, else base"),
    Entry(
        "Role",
        "Role:number=aligned,name=aligned,opinion=base",
        "by a table from the predicted token's role to a source; roles not named go to base",
    ),
    Entry("P-Punc", "P-Punc:0.4", "Punc locks words to aligned; the rest goes by P"),
    Entry("H-Punc", "H-Punc:1.5", "Punc locks words to aligned; the rest goes by H"),
    Entry("P-FC", "P-FC:0.4", "FC locks words to aligned; the rest goes by P"),
    Entry("H-FC", "H-FC:1.5", "FC locks words to aligned; the rest goes by H"),
    Entry("P-Punc-FC", "P-Punc-FC:0.4", "both content rules lock; the rest goes by P"),
    Entry("Rand", "Rand:0.5", "base with probability γ, whatever the models think"),
    Entry("Nudging", "Nudging:0.3", "aligned where max P_base < γ, else base (Fei et al. 2024)"),
    Entry("Base", "Base", "the base model alone"),
    Entry("Aligned", "Aligned", "the aligned model alone"),
)
_custom: dict[str, tuple[Callable[..., Any], bool, str]] = {}


def catalogue() -> list[Entry]:
    """Every router that can be written, the users' own included."""
    own = [
        Entry(name, f"{name}:0.5" if takes_threshold else name, sentence)
        for name, (_, takes_threshold, sentence) in _custom.items()
    ]
    return [*_BUILT_IN, *own]


def register_router(name: str, rule: Callable[..., Tensor] | type, *, help: str = "") -> None:
    """Make a rule of your own usable wherever a router's spelling is.

    Args:
        name: one word of letters, digits and ``_``; not a built-in name.
        rule: a function ``(signals) → bool [B]`` or ``(signals, threshold) → bool [B]``, True where
            the base model is to speak; or a class whose instances are such functions.
        help: a sentence for ``baco routers``.

    Raises:
        BacoError: a name that is taken or cannot be typed, or a rule of another signature.
    """
    if not name.isidentifier():
        raise BacoError(f"router name {name!r}: use one word of letters, digits and _")
    if name in LOGIT_RULES or name in CONTENT_ROLES or name in ("Role", "Base", "Aligned"):
        raise BacoError(f"router name {name!r} is built in: choose another")
    decide = rule() if isinstance(rule, type) else rule
    if not callable(decide):
        raise BacoError(f"router {name!r} is {rule!r}: give a function of (signals[, threshold])")
    takes = len(inspect.signature(decide).parameters)
    if takes not in (1, 2):
        raise BacoError(f"router {name!r} takes {takes} arguments: give (signals[, threshold])")
    sentence = help or (inspect.getdoc(rule) or "a router of your own").splitlines()[0]
    _custom[name] = (decide, takes == 2, sentence)


def family(spelling: str) -> str:
    """The part of a spelling before its arguments: ``P-Punc`` of ``P-Punc:0.4``."""
    return spelling.partition(":")[0].strip()


def needs_threshold(spelling: str) -> bool:
    """Does this router compare something with γ? BacoError where there is no such router."""
    names = family(spelling).split("-")
    if len(names) == 1 and names[0] in _custom:
        return _custom[names[0]][1]
    return any(name in LOGIT_RULES for name in _known(names, spelling))


def router(spelling: str, threshold: float | None = None) -> Router:
    """The router a spelling names.

    Args:
        spelling: such as ``P-Punc:0.4``, ``Role:number=aligned,opinion=base``, ``Aligned``.
        threshold: γ for a spelling that gives none.

    Raises:
        BacoError: no such router, a missing or needless threshold, one out of its range.
    """
    if not isinstance(spelling, str) or not spelling.strip():
        raise BacoError(
            f"router {spelling!r}: give a spelling such as P-Punc:0.4 (see 'baco routers')"
        )
    names = _known(family(spelling).split("-"), spelling)
    given, table, predict = _arguments(spelling)
    gamma = given if given is not None else threshold
    if len(names) == 1 and names[0] in _custom:
        decide, takes, _ = _custom[names[0]]
        _check_threshold(spelling, gamma, takes, -math.inf, math.inf)
        _refuse_rest(spelling, table, predict)
        return Custom(names[0], decide, gamma if takes else None)
    if names in (["Base"], ["Aligned"]):
        _check_threshold(spelling, given, False, 0, 0)
        _refuse_rest(spelling, table, predict)
        return Constant("base" if names == ["Base"] else "aligned")
    logits = [name for name in names if name in LOGIT_RULES]
    contents = tuple(name for name in names if name not in LOGIT_RULES)
    if len(logits) > 1 or len(set(names)) != len(names):
        raise BacoError(
            f"router {spelling!r}: combine at most one of {', '.join(LOGIT_RULES)} with content "
            f"rules ({', '.join(CONTENT_ROLES)}, Role), each once, such as P-Punc-FC:0.4"
        )
    if table and "Role" not in contents:
        raise BacoError(
            f"router {spelling!r}: role=source belongs to Role, as in Role:name=aligned"
        )
    logit = logits[0] if logits else None
    if logit:
        _check_threshold(spelling, gamma, True, LOGIT_RULES[logit].low, LOGIT_RULES[logit].high)
    else:
        _check_threshold(spelling, given, False, 0, 0)
    return Rule(logit, contents, gamma if logit else None, table, predict)


def _known(names: list[str], spelling: str) -> list[str]:
    every = [*LOGIT_RULES, *CONTENT_ROLES, "Role", "Base", "Aligned", *_custom]
    single = {"Base", "Aligned", *_custom}
    for name in names:
        if name not in every:
            raise BacoError(
                f"unknown router {spelling!r}: {name!r} is none of {', '.join(every)} "
                "(see 'baco routers')"
            )
        if name in single and len(names) > 1:
            raise BacoError(f"router {spelling!r}: {name} stands alone, it cannot be combined")
    return names


def _arguments(spelling: str) -> tuple[float | None, tuple[tuple[str, Source], ...], Predictor]:
    gamma: float | None = None
    table: dict[str, Source] = {}
    predict: Predictor = "base"
    _, colon, text = spelling.partition(":")
    for argument in text.split(",") if colon else ():
        key, equals, value = (part.strip() for part in argument.partition("="))
        if not equals:
            gamma = _threshold(spelling, key, gamma)
        elif key == "predict" and value in get_args(Predictor):
            predict = value  # type: ignore[assignment]
        elif key.upper() in Role.__members__ and value in get_args(Source):
            table[key] = value  # type: ignore[assignment]
        else:
            raise BacoError(
                f"router {spelling!r}: {argument.strip()!r} is no argument: give a threshold, "
                f"role=base|aligned (roles: {', '.join(r.name.lower() for r in Role)}) "
                "or predict=base|aligned|either"
            )
    return gamma, tuple(table.items()), predict


def _threshold(spelling: str, text: str, earlier: float | None) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number) or earlier is not None:
        raise BacoError(f"router {spelling!r}: give one number after the colon, such as P-Punc:0.4")
    return number


def _check_threshold(
    spelling: str, gamma: float | None, takes: bool, low: float, high: float
) -> None:
    if not takes:
        if gamma is not None:
            raise BacoError(f"router {spelling!r}: {family(spelling)} takes no threshold")
        return
    if gamma is None:
        raise BacoError(f"router {spelling!r} needs a threshold, such as {family(spelling)}:0.4")
    if not low <= gamma <= high or math.isinf(gamma):
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise BacoError(f"router {spelling!r}: threshold {gamma:g}, expected a number {bounds}")


def _refuse_rest(spelling: str, table: tuple[tuple[str, Source], ...], predict: Predictor) -> None:
    if table or predict != "base":
        raise BacoError(f"router {spelling!r}: {family(spelling)} takes a threshold at most")
