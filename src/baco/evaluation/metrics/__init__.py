"""Diversity and quality of the answers to a prompt: eleven diversity and two quality metrics.

Every module of this folder is imported, and its metrics register themselves. `docs/metrics.md`
lists them with sources, ranges and costs.
"""

from importlib import import_module
from pkgutil import iter_modules

from baco.evaluation.metrics.protocols import Equivalence, Metric, MetricUnavailable, Reward
from baco.evaluation.metrics.registry import (
    ROLES,
    Entry,
    entries,
    entry,
    metric,
    names,
    register_metric,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ROLES",
    "Entry",
    "Equivalence",
    "Metric",
    "MetricUnavailable",
    "Reward",
    "entries",
    "entry",
    "metric",
    "names",
    "register_metric",
]
