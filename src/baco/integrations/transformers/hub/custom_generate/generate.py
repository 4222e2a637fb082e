"""The ``generate()`` that `transformers` loads from here; it is that of the installed `baco`."""

from baco.integrations.transformers.custom_generate import generate

__all__ = ["generate"]
