"""Lone surrogates, which reach a text through JSON escapes and undecodable arguments."""

from baco.errors import BacoError


def fault_of(text: str) -> str | None:
    """Why a text is not valid Unicode, as the end of a sentence; None where it is valid."""
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
    """Raise BacoError if a text has half a surrogate pair, which no tokenizer can read."""
    fault = fault_of(text)
    if fault is not None:
        raise BacoError(f"{name} {fault}")
