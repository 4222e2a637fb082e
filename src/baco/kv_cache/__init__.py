"""KV caches: what the models have read of every sequence. Storage and protocol; no model."""
