"""The library llama.cpp, by the low-level functions of the package ``llama-cpp-python``."""

import ctypes
import importlib.util
import logging
import re
from collections import deque
from functools import cache
from typing import Any

from baco.errors import BacoError, one_line

log = logging.getLogger("baco")

PACKAGE, ENGINE = "llama_cpp", "llama.cpp"
INSTALL = (
    "install it with pip install 'baco[llamacpp]', which compiles it with a C++ compiler and cmake "
    "unless pip is given one of its prebuilt wheels (docs/llamacpp.md)"
)
# Levels of its log messages.
_WARNING, _ERROR = 2, 3
# The name of the function that an error message begins with, and what says nothing to a user.
_PREFIX = re.compile(r"^(?:\w+: )+(?:error loading model(?: \w+)?: )?")
_errors: deque[str] = deque(maxlen=16)


def installed() -> bool:
    """Is the package there?"""
    return importlib.util.find_spec(PACKAGE) is not None


@cache
def library() -> Any:
    """The module of low-level functions; its messages go to the log of this package.

    Raises:
        BacoError: it is not installed, or cannot be loaded here.
    """
    if not installed():
        raise BacoError(f"the llamacpp backend needs llama-cpp-python: {INSTALL}")
    try:
        from llama_cpp import llama_cpp as functions
    except Exception as error:  # a library for another machine fails in many ways
        raise BacoError(
            f"llama-cpp-python is installed and cannot be loaded ({one_line(error)}): {INSTALL}"
        ) from error
    functions.llama_log_set(_callback(functions), ctypes.c_void_p(0))
    functions.llama_backend_init()
    return functions


@cache
def _callback(functions: Any) -> Any:
    """Kept for as long as the library may call it."""

    def receive(level: int, text: bytes, _: Any) -> None:
        message = text.decode(errors="replace").strip()
        if level == _ERROR and message:
            _errors.append(message)
        if level in (_WARNING, _ERROR) and message:
            log.debug("llama.cpp: %s", message)

    return functions.llama_log_callback(receive)


def forget_errors() -> None:
    """Forget the errors that the library has reported, before a call that may fail."""
    _errors.clear()


def reason() -> str:
    """The first error that the library reported since then, for a user."""
    first = next(iter(_errors), "")
    return _PREFIX.sub("", first) or "llama.cpp gives no reason"
