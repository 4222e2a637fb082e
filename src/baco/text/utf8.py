"""Text without UTF-8: lone surrogates come in by JSON escapes and by undecodable arguments."""

from baco.errors import BacoError


def fault_of(text: str) -> str | None:
    """What keeps a text from being valid Unicode, as the end of a sentence; None where nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"holds half a surrogate pair ({half!a}), which is no character: give Unicode text"
    return None


def check_characters(name: str, text: str) -> None:
    """BacoError where a text holds half a surrogate pair, which no tokenizer reads."""
    fault = fault_of(text)
    if fault is not None:
        raise BacoError(f"{name} {fault}")
