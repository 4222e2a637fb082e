"""Methods by the names that a server's models have: ``NAME``, or ``NAME:THRESHOLD``."""

from dataclasses import dataclass, replace

from baco.errors import BacoError
from baco.evaluation.methods.method import Grid, Method, Threshold
from baco.evaluation.methods.registry import methods
from baco.evaluation.records import Setting


@dataclass(frozen=True, slots=True)
class ServedMethod:
    """A method at one setting.

    Attributes:
        spelling: its name, with the threshold if it has one.
        setting: without sampling parameters, which a request gives.
    """

    spelling: str
    setting: Setting


def served_examples() -> list[str]:
    """The spelling of every method that a server can run, at its example's threshold."""
    return [
        name if threshold is None else f"{name}:{threshold.example:g}"
        for name, method in methods().items()
        if _why_not(method) is None
        for threshold in [_threshold(method)]
    ]


def served_method(spelling: str) -> ServedMethod:
    """The method of a spelling.

    Raises:
        BacoError: no such method, one that no server can run, or a threshold out of its range.
    """
    name, colon, number = spelling.partition(":")
    method = methods().get(name)
    if method is None:
        raise BacoError(f"unknown method {name!r}: 'baco methods' lists them")
    why_not = _why_not(method)
    if why_not is not None:
        raise BacoError(f"the method {name} is no model of a server: {why_not}")
    setting = method.settings(Grid("quick", 1))[0]
    options = {key: value for key, value in setting.options.items() if key != "sampling"}
    options["sampling"] = {}
    threshold = _threshold(method)
    if threshold is None:
        if colon:
            raise BacoError(f"the method {name} takes no number: give {name!r}")
        return ServedMethod(name, replace(setting, value=None, options=options))
    value = _number(name, number, threshold)
    options["threshold"] = value
    return ServedMethod(f"{name}:{value:g}", replace(setting, value=value, options=options))


def _why_not(method: Method) -> str | None:
    return getattr(method, "not_served", None)


def _threshold(method: Method) -> Threshold | None:
    return getattr(method, "threshold", None)


def _number(name: str, number: str, threshold: Threshold) -> float:
    try:
        value = float(number)
    except ValueError:
        value = None
    if value is None or not threshold.low <= value <= threshold.high:
        raise BacoError(
            f"the method {name} needs a number from {threshold.low:g} to {threshold.high:g}, as in "
            f"{name}:{threshold.example:g}"
        )
    return value
