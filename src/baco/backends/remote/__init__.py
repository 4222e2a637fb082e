"""The pair on two servers with OpenAI's completions API.

One model drafts a span and the other scores it in one call. The shared rules are evaluated along
the span, and the tokens that plain decoding would have drawn are accepted.
"""

from baco.backends.remote.backend import CONCURRENCY, RemoteBackend, connect

__all__ = ["CONCURRENCY", "RemoteBackend", "connect"]
