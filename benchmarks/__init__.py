"""Measurements and studies, run from the repository as ``python -m benchmarks.NAME``."""
