"""The numbers that samplers and combiners take: read off a function, and off a spelling.

A spelling is ``name[:number,…]``, such as ``xtc:0.5,threshold=0.1``.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baco.errors import BacoError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a part takes.

    Attributes:
        name: as in the function's signature.
        default: None where the number must be given.
        low, high: its range, both ends allowed.
        whole: only whole numbers are allowed.
    """

    name: str
    default: float | None
    low: float
    high: float
    whole: bool

    @property
    def example(self) -> float:
        """An allowed value: the default if there is one."""
        if self.default is not None:
            return self.default
        value = min(max(self.low, 1.0), self.high)
        return int(value) if self.whole else value

    def check(self, part: str, value: float) -> float:
        """The value as the part takes it; BacoError where it is out of range."""
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a number"
            bounds = (
                ""
                if math.isinf(self.low) and math.isinf(self.high)
                else (
                    f" from {self.low:g} to {self.high:g}"
                    if self.high < math.inf
                    else f" of at least {self.low:g}"
                )
            )
            raise BacoError(f"{part}: {self.name} is {value:g}: give {kind}{bounds}")
        return int(value) if self.whole else value


def first_line(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring, which lists show."""
    return (inspect.getdoc(function) or "no description").splitlines()[0].rstrip(".")


def parameters_of(
    part: str,
    signature: str,
    function: Callable[..., Any],
    others: int,
    ranges: Mapping[str, tuple[float, float]],
) -> tuple[Parameter, ...]:
    """The numbers that a function takes.

    Args:
        part: what it is, for errors, such as ``sampler 'xtc'``.
        signature: the arguments that it takes, for errors.
        others: how many arguments come before the numbers.
        ranges: for each number (lowest, highest), both allowed.

    Raises:
        BacoError: it takes other arguments.
    """
    taken = list(inspect.signature(function).parameters.values())
    numbers = taken[others:]
    unknown = ranges.keys() - {parameter.name for parameter in numbers}
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if len(taken) < others or unknown or any(parameter.kind not in kinds for parameter in taken):
        raise BacoError(
            f"{part}: give a function of {signature} whose further arguments are numbers, and "
            "ranges of those alone"
        )
    return tuple(_parameter(parameter, ranges) for parameter in numbers)


def _parameter(taken: inspect.Parameter, ranges: Mapping[str, tuple[float, float]]) -> Parameter:
    default: Any = None if taken.default is taken.empty else taken.default
    low, high = ranges.get(taken.name, (-math.inf, math.inf))
    return Parameter(taken.name, default, low, high, taken.annotation in (int, "int"))


def read_numbers(
    kind: str, spelling: str, name: str, parameters: Sequence[Parameter], example: str
) -> tuple[float, ...]:
    """The numbers that a spelling gives, and the defaults of the others.

    Args:
        kind: ``sampler`` or ``combiner``.
        spelling: as the user wrote it.
        name: of the part that it names.
        parameters: the numbers that the part takes.
        example: a spelling of the part.

    Raises:
        BacoError: a number is missing, out of range or one too many.
    """
    text = spelling.partition(":")[2].strip()
    named = {parameter.name: parameter.default for parameter in parameters}
    given: dict[str, float] = {}
    for place, argument in enumerate(text.split(",") if text else ()):
        key, equals, number = (part.strip() for part in argument.partition("="))
        if not equals:
            key, number = (list(named)[place] if place < len(named) else ""), key
        if key not in named or key in given:
            takes = ", ".join(named) or "none"
            raise BacoError(
                f"{kind} {spelling!r}: {argument.strip()!r} is one number too many or has another "
                f"name: {name} takes {takes}, as in {example}"
            )
        given[key] = _number(kind, spelling, number)
    missing = [key for key, value in named.items() if value is None and key not in given]
    if missing:
        raise BacoError(f"{kind} {spelling!r} needs {missing[0]}, as in {example}")
    values = named | given
    return tuple(p.check(f"{kind} {name}", values[p.name] or 0.0) for p in parameters)


def _number(kind: str, spelling: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BacoError(f"{kind} {spelling!r}: {text!r} is not a number")
    return number


def spelled(name: str, numbers: Sequence[float]) -> str:
    """How a part is written with all its numbers."""
    text = ",".join(map(str, numbers))
    return f"{name}:{text}" if text else name


def written(number: float) -> str:
    """The shortest text that is read as this number: of six digits, or of as many as it takes."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
