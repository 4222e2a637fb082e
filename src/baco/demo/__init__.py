"""The embedded pair: its toy world, its training, its weights."""

from pathlib import Path


def path() -> Path:
    """The folder of the shipped pair: `base/`, `aligned/` and `baco.json`."""
    return Path(__file__).parent / "weights"
