"""The digest of a prompt, which keys the noise of its draws.

It covers the role and the text of every message, a system message and a prefill included. Dates and
template arguments are not part of it. It imports neither torch nor numpy.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence


def chat_digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """A conversation's digest: of the role and the text of every message, and of nothing else."""
    told = json.dumps([[message["role"], message["content"]] for message in messages])
    return _digest(told.encode())


def text_digest(text: str) -> bytes:
    """A raw text's digest: of its UTF-8 bytes."""
    return _digest(text.encode("utf-8", "surrogatepass"))


def ids_digest(ids: Iterable[int]) -> bytes:
    """The digest of token ids whose text is not at hand."""
    return _digest(b"".join(token.to_bytes(8, "little") for token in ids))


def _digest(told: bytes) -> bytes:
    return hashlib.blake2b(told, digest_size=16).digest()
