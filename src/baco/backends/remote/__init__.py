"""The pair on two servers that speak OpenAI's completions API, each scaled by its owner.

Not token by token: one half drafts a span, the other scores it in one call, the router is evaluated
along it by the code that every backend shares, and what agrees is kept.
"""

from baco.backends.remote.backend import CONCURRENCY, RemoteBackend, connect

__all__ = ["CONCURRENCY", "RemoteBackend", "connect"]
