"""Adapters around a model's own cache, and for models without one."""
