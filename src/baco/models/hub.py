"""Where files come from: a folder, the hub, or the cache of the hub.

Without a network the hub's own client retries every file for a minute. So this module asks the hub
once before anything is read from it.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baco.errors import BacoError

log = logging.getLogger("baco")

# The longest wait for the hub, and how long its answer, or the lack of one, is remembered.
SECONDS_TO_CONNECT = 10.0
SECONDS_TO_REMEMBER = 60.0

_answered_at: dict[str, tuple[float, bool]] = {}


class NotHereError(BacoError):
    """The hub cannot be reached, and its cache does not have what is needed.

    Attributes:
        reason: why the hub cannot be reached, without advice.
    """

    reason = ""


def local_files_only(name: str) -> bool:
    """Must the files of a model come from the cache because the hub cannot be reached?

    Args:
        name: hub id or folder.

    Raises:
        NotHereError: they must, and the cache does not have them.
    """
    if Path(name).exists():
        return False
    reason = out_of_reach()
    if reason is None:
        return False
    if cached(name) is None:
        error = NotHereError(
            f"cannot download {name}: {reason}; connect to the hub or give a folder"
        )
        error.reason = reason
        raise error
    log.info("%s: reading %s from the cache", reason, name)
    return True


def out_of_reach() -> str | None:
    """Why the hub cannot be reached; None where it can."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return None if _answers(constants.ENDPOINT) else f"{constants.ENDPOINT} does not answer"


@contextmanager
def reading(name: str | None = None) -> Iterator[None]:
    """Let libraries read a model, or something else of the hub, in this block.

    Where the hub cannot be reached, they read from the cache alone. The switch is global, since
    libraries ask the hub for some files even with ``local_files_only``.

    Raises:
        NotHereError: see :func:`local_files_only`.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    offline = out_of_reach() is not None if name is None else local_files_only(name)
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def model_folder(name: str) -> Path | None:
    """The folder with the files of a model on this machine; None where there is none."""
    return Path(name) if Path(name).is_dir() else cached(name)


def cached(name: str) -> Path | None:
    """The copy of a model in the cache of the hub; None where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder_name = repo_folder_name(repo_id=name, repo_type="model")
    except HFValidationError:  # a path where nothing is
        return None
    repository = Path(constants.HF_HUB_CACHE) / folder_name
    newest = repository / "refs" / "main"
    if not newest.is_file():
        return None
    folder = repository / "snapshots" / newest.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def _answers(endpoint: str) -> bool:
    moment, answered = _answered_at.get(endpoint, (-SECONDS_TO_REMEMBER, False))
    if time.monotonic() - moment >= SECONDS_TO_REMEMBER:
        from huggingface_hub import get_session

        try:
            get_session().head(endpoint, timeout=SECONDS_TO_CONNECT)
        except Exception as error:  # of whichever HTTP library the client uses
            log.debug("%s does not answer: %s", endpoint, error)
            answered = False
        else:
            answered = True
        _answered_at[endpoint] = (time.monotonic(), answered)
    return answered
