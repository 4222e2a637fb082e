"""Registries are restored after tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from baco.evaluation.methods import registry as methods
from baco.evaluation.metrics import registry as metrics
from baco.routing import combiners
from baco.routing.rules import RULES
from baco.sampling import sampler_chain


@contextmanager
def restored() -> Iterator[None]:
    """Restore the registered rules, combiners, samplers, methods and metrics at the end."""
    registries: list[dict[str, Any]] = [
        cast(Any, RULES),
        cast(Any, combiners._COMBINERS),
        cast(Any, sampler_chain._SAMPLERS),
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
