"""Forwards of a model over the rows of a KV cache."""
