"""Diversity and quality of the answers to a prompt: eleven metrics of one, two of the other.

`docs/metrics.md` has them in a table with sources, ranges and costs.
"""

from baco.evaluation.metrics.protocols import Equivalence, Metric, MetricUnavailable, Reward
from baco.evaluation.metrics.registry import (
    DIVERSITY,
    LEXICAL,
    METRICS,
    QUALITY,
    SEMANTIC,
    UTILITY,
    Entry,
    entry,
    metric,
)

__all__ = [
    "DIVERSITY",
    "LEXICAL",
    "METRICS",
    "QUALITY",
    "SEMANTIC",
    "UTILITY",
    "Entry",
    "Equivalence",
    "Metric",
    "MetricUnavailable",
    "Reward",
    "entry",
    "metric",
]
