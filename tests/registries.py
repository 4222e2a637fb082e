"""What tests register is forgotten after them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from baco.evaluation.methods import registry as methods
from baco.evaluation.metrics import registry as metrics
from baco.routing.rules import RULES


@contextmanager
def restored() -> Iterator[None]:
    """Rules, methods and metrics are afterwards what they were before."""
    registries: list[dict[str, Any]] = [
        cast(Any, RULES),
        cast(Any, metrics._ENTRIES),
        cast(Any, methods._METHODS),
    ]
    before = [dict(registered) for registered in registries]
    try:
        yield
    finally:
        for registered, had in zip(registries, before, strict=True):
            registered.clear()
            registered.update(had)
