"""The digest of a prompt, which keys the noise of its draws.

It covers the role and the text of every message, system message and prefill included, but not dates
and template arguments. This module imports neither torch nor NumPy.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence


def chat_digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """The digest of a conversation: of the role and the text of every message."""
    roles_and_texts = json.dumps([[message["role"], message["content"]] for message in messages])
    return _digest(roles_and_texts.encode())


def text_digest(text: str) -> bytes:
    """The digest of a raw text: of its UTF-8 bytes."""
    return _digest(text.encode("utf-8", "surrogatepass"))


def ids_digest(ids: Iterable[int]) -> bytes:
    """The digest of token ids whose text is not available."""
    return _digest(b"".join(token.to_bytes(8, "little") for token in ids))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
