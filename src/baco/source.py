"""Which model of the pair wrote a token."""

from typing import Literal

Source = Literal["base", "aligned"]
# What lists, pages and reports say where a token comes from both models at once. In data its source
# is null.
MIXED = "mixed"
MODELS: tuple[Source, ...] = ("base", "aligned")
# A model that can draft tokens: one of the pair, or a small draft model beside it.
Drafter = Literal["base", "aligned", "draft"]
