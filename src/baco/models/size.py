"""How large a model is, as far as a forward's cost depends on it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Of a model: layers, parameters that every token is multiplied with, bytes they take."""

    layers: int
    parameters: int
    bytes: int
