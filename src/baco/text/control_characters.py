"""Characters that a terminal, a picture or a page must not get.

Prompts, answers, file names and servers' messages may hold control characters. A terminal would
obey them; XML 1.0 and HTML forbid most of them, even as escapes.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# C0 and C1 but the tab and the new line.
CONTROL = [code for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"]
_ESCAPES = {code: f"\\x{code:02x}" for code in CONTROL}
# JSON leaves these as they are; a terminal takes some for the beginning of a command, and half a
# surrogate pair cannot be written.
_UNESCAPED = re.compile("[\x7f-\x9f\ud800-\udfff]")
# Control characters but tab and line ends, halves of surrogate pairs, and what is no character.
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
    return _UNESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def well_formed(text: str) -> str:
    """A text with U+FFFD for every character that a picture or a page may not hold."""
    return _FORBIDDEN.sub("\ufffd", text)


def well_formed_values(value: Any) -> Any:
    """The same of all texts in lists and mappings, keys too."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {well_formed_values(key): well_formed_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [well_formed_values(each) for each in value]
    return value
