"""Control characters and lone surrogates, in prompts, answers, file names and servers' messages.

Control characters must not reach a terminal, which would execute them, nor a picture or a page: XML
1.0 and HTML forbid most of them, even as escapes. Lone surrogates reach a text through JSON escapes
and undecodable arguments; no tokenizer can read them.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from baco.errors import BacoError

# C0 and C1 except tab and new line.
CONTROL = [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"]
_ESCAPES = {code: f"\\x{code:02x}" for code in CONTROL}
# JSON does not escape these. A terminal executes some of them, and half a surrogate pair cannot be
# written.
_UNESCAPED = re.compile("[\x7f-\x9f\ud800-\udfff]")
# Control characters except tab and line ends, halves of surrogate pairs, and noncharacters.
_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufdcf\ufdf0-\ufffd"
    + "".join(f"{chr(plane << 16)}-{chr((plane << 16) + 0xFFFD)}" for plane in range(1, 17))
    + "]"
)


def escaped(text: str) -> str:
    r"""A text with control characters as escapes such as ``\x1b``, for messages."""
    return text.translate(_ESCAPES)


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """A value as JSON in one line without control characters, whatever texts it holds."""
    line = json.dumps(value, ensure_ascii=False, default=default)
    return _UNESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def well_formed(text: str) -> str:
    """A text with U+FFFD for every character that is forbidden in a picture or a page."""
    return _FORBIDDEN.sub("\ufffd", text)


def well_formed_values(value: Any) -> Any:
    """The same for all texts in lists and mappings, keys included."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {well_formed_values(key): well_formed_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [well_formed_values(item) for item in value]
    return value


def fault_of(text: str) -> str | None:
    """Why a text is not valid Unicode, as the end of a sentence; None if it is valid."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = text[error.start]
        return (
            f"holds half a surrogate pair ({surrogate!a}), which is not a character: give Unicode "
            "text"
        )
    return None


def check_characters(name: str, text: str) -> None:
    """Raise BacoError if a text has half a surrogate pair."""
    fault = fault_of(text)
    if fault is not None:
        raise BacoError(f"{name} {fault}")
