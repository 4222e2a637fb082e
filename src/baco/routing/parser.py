"""Routers by name: the spelling users type.

A spelling is ``Name[-Name…][:argument,…]``: at most one logit rule and any content rules, in any
order; a bare number is the threshold γ; ``role=source`` is a row of the ``Role`` table;
``predict=base|aligned|either`` says whose most likely next token counts as the predicted one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from baco.errors import BacoError
from baco.plugins import plugins
from baco.routing.router import Constant, Router, Rule
from baco.routing.rules import (
    BUILT_IN,
    COMBINATIONS,
    RULES,
    AnyRule,
    ContentRule,
    LogitRule,
    add_rule,
    logit_rule,
)
from baco.routing.signals import Predictor
from baco.source import Source
from baco.text.vocabulary import Role

CONSTANTS = {
    "Base": "the base model alone",
    "Aligned": "the aligned model alone",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the catalogue: a router's name, how it is written, what it does."""

    name: str
    example: str
    sentence: str


def rules() -> dict[str, AnyRule]:
    """Every rule by its name: built-in ones, those of installed packages, the user's own.

    Raises:
        BacoError: an installed package's rule cannot be loaded or is no rule.
    """
    for name, part in plugins("routers").items():
        if name in RULES:
            continue
        if isinstance(part, LogitRule | ContentRule):
            add_rule(part)
        elif callable(part):
            logit_rule(name)(part)
        else:
            raise BacoError(
                f"entry point {name!r} in baco.routers is {part!r}: give a rule of "
                "baco.routing.rules or a function of (signals[, threshold])"
            )
    return RULES


def catalogue() -> list[Entry]:
    """Every router that is listed, the users' own included."""
    lines = []
    for rule in rules().values():
        if isinstance(rule, ContentRule):
            lines.append(Entry(rule.name, rule.example, rule.help))
        else:
            example = f"{rule.name}:{rule.example:g}" if rule.threshold else rule.name
            lines.append(Entry(rule.name, example, rule.help))
    lines += map(_combination, COMBINATIONS)
    return lines + [Entry(name, name, sentence) for name, sentence in CONSTANTS.items()]


def _combination(example: str) -> Entry:
    logit, contents = _sorted(example)
    keeping = " and ".join(rule.name for rule in contents)
    verb = "keeps" if len(contents) == 1 else "keep"
    rest = "is base" if logit is None else f"goes by {logit.name}"
    return Entry(family(example), example, f"{keeping} {verb} words for aligned; the rest {rest}")


def register_router(name: str, rule: Callable[..., Tensor] | type, **details: Any) -> None:
    """Make a rule of your own usable wherever a router's spelling is.

    Args:
        name: one word of letters, digits and ``_``; not a built-in name.
        rule: a function ``(signals) → bool [B]`` or ``(signals, threshold) → bool [B]``, True where
            the base model writes the word; or a class whose instances are such functions.
        details: what :func:`baco.routing.rules.logit_rule` takes: ``help``, a sentence for
            ``baco routers``; ``low``, ``high`` and ``grid`` of γ; ``reads``; and more.

    Raises:
        BacoError: a name that is taken or cannot be typed, or a rule of another signature.
    """
    decide = rule() if isinstance(rule, type) else rule
    if not callable(decide):
        raise BacoError(f"router {name!r} is {rule!r}: give a function of (signals[, threshold])")
    logit_rule(name, **details)(decide)


def family(spelling: str) -> str:
    """The part of a spelling before its arguments: ``P-Punc`` of ``P-Punc:0.4``.

    Names are matched in any case and come back as they are listed; an unknown one comes back as it
    is.
    """
    listed = {name.casefold(): name for name in (*rules(), *CONSTANTS)}
    parts = spelling.partition(":")[0].strip().split("-")
    return "-".join(listed.get(part.strip().casefold(), part) for part in parts)


def listed(spelling: str) -> str:
    """A router's name as it is listed, whatever case and order its parts are written in.

    Raises:
        BacoError: no such router.
    """
    if family(spelling) in CONSTANTS:
        return family(spelling)
    logit, contents = _sorted(spelling)
    return Rule(logit, contents).family


def logit_rule_of(spelling: str) -> LogitRule | None:
    """The logit rule of a spelling, with or without its arguments; None where it has none.

    Raises:
        BacoError: no such router.
    """
    return None if family(spelling) in CONSTANTS else _sorted(spelling)[0]


def needs_threshold(spelling: str) -> bool:
    """Does this router compare something with γ? BacoError where there is no such router."""
    rule = logit_rule_of(spelling)
    return rule is not None and rule.threshold


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
    name = family(spelling)
    given, table, predict = _arguments(spelling)
    if name in CONSTANTS:
        if given is not None:
            raise BacoError(f"router {spelling!r}: {name} takes no threshold")
        if table or predict != "base":
            raise BacoError(f"router {spelling!r}: {name} takes no arguments")
        return Constant("base" if name == "Base" else "aligned")
    logit, contents = _sorted(spelling)
    if table and not any(rule.name == "Role" for rule in contents):
        raise BacoError(
            f"router {spelling!r}: role=source belongs to Role, as in Role:name=aligned"
        )
    if logit is None or not logit.threshold:
        if given is not None:
            raise BacoError(f"router {spelling!r}: {name} takes no threshold")
        return Rule(logit, contents, None, table, predict)
    gamma = given if given is not None else threshold
    _check_threshold(spelling, gamma, logit)
    return Rule(logit, contents, gamma, table, predict)


def portable(router: Router) -> bool:
    """Can another process make the router of its spelling? Not of rules that only this one has."""
    if isinstance(router, Constant):
        return True
    installed = BUILT_IN | plugins("routers").keys()
    return isinstance(router, Rule) and {rule.name for rule in router.rules} <= installed


def _sorted(spelling: str) -> tuple[LogitRule | None, tuple[ContentRule, ...]]:
    """The rules that a spelling combines."""
    known = rules()
    parts = family(spelling).split("-")
    for part in parts:
        if part in CONSTANTS and len(parts) > 1:
            raise BacoError(f"router {spelling!r}: {part} stands alone, it cannot be combined")
        if part not in known:
            raise BacoError(
                f"unknown router {spelling!r}: {part!r} is none of "
                f"{', '.join([*known, *CONSTANTS])} (see 'baco routers')"
            )
    named = [known[part] for part in parts]
    logits = [rule for rule in named if isinstance(rule, LogitRule)]
    contents = tuple(rule for rule in named if isinstance(rule, ContentRule))
    if len(logits) > 1 or len(set(parts)) != len(parts):
        raise BacoError(
            f"router {spelling!r}: combine at most one of {', '.join(names(LogitRule))} with "
            f"content rules ({', '.join(names(ContentRule))}), each once, such as P-Punc-FC:0.4"
        )
    return (logits[0] if logits else None), contents


def names(kind: type[AnyRule]) -> list[str]:
    """The rules of a kind."""
    return [name for name, rule in RULES.items() if isinstance(rule, kind)]


def _arguments(spelling: str) -> tuple[float | None, tuple[tuple[str, Source], ...], Predictor]:
    gamma: float | None = None
    table: dict[str, Source] = {}
    predict: Predictor = "base"
    _, colon, text = spelling.partition(":")
    for argument in text.split(",") if colon else ():
        key, equals, value = (part.strip().lower() for part in argument.partition("="))
        if not equals:
            gamma = _threshold(spelling, key, gamma)
        elif key == "predict" and value in get_args(Predictor):
            predict = value  # type: ignore[assignment]
        elif key.upper() in Role.__members__ and value in get_args(Source):
            table[key] = value  # type: ignore[assignment]
        else:
            raise BacoError(
                f"router {spelling!r}: {argument.strip()!r} is not an argument: give a threshold, "
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


def _check_threshold(spelling: str, gamma: float | None, rule: LogitRule) -> None:
    if gamma is None:
        raise BacoError(
            f"router {spelling!r} needs a threshold, such as {family(spelling)}:{rule.example:g}"
        )
    if not rule.low <= gamma <= rule.high or math.isinf(gamma):
        low, high = rule.low, rule.high
        bounds = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
        raise BacoError(f"router {spelling!r}: threshold {gamma:g}, expected a number {bounds}")
