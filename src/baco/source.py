"""Which model of the pair wrote a token."""

from typing import Literal

Source = Literal["base", "aligned"]
MODELS: tuple[Source, ...] = ("base", "aligned")
