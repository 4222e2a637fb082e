"""Where files come from: a folder, the hub, or the cache of the hub.

The hub's own client asks again and again where there is no network, file after file, for a minute.
So the hub is asked once here, before anything is read from it.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baco.errors import BacoError

log = logging.getLogger("baco")

# The longest wait for the hub, and how long its answer, or that there was none, counts.
SECONDS_TO_CONNECT = 10.0
SECONDS_TO_REMEMBER = 60.0

_asked: dict[str, tuple[float, bool]] = {}


class NotHereError(BacoError):
    """There is no way to the hub, and its cache does not have what was asked for.

    Attributes:
        reason: why not, without what to do.
    """

    reason = ""


def local_files_only(name: str) -> bool:
    """Must the files of a model come from the cache, because there is no way to the hub?

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
        told = f"cannot download {name}: {reason}; connect to the hub or give a folder"
        error = NotHereError(told)
        error.reason = reason
        raise error
    log.info("%s: reading %s from the cache", reason, name)
    return True


def out_of_reach() -> str | None:
    """Why the hub cannot be asked; None where it can."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return None if _answers(constants.ENDPOINT) else f"{constants.ENDPOINT} does not answer"


@contextmanager
def reading(name: str | None = None) -> Iterator[None]:
    """Let libraries read a model in this block, or what else the hub has: from the cache alone
    where there is no way to the hub. They ask it for some files whatever they are told otherwise.

    Raises:
        NotHereError: see :func:`local_files_only`.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    alone = out_of_reach() is not None if name is None else local_files_only(name)
    constants.HF_HUB_OFFLINE = before or alone
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def model_folder(name: str) -> Path | None:
    """The folder that holds the files of a model on this machine; None where there is none."""
    return Path(name) if Path(name).is_dir() else cached(name)


def cached(name: str) -> Path | None:
    """The copy of a model in the cache of the hub; None where there is none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    newest = repository / "refs" / "main"
    if not newest.is_file():
        return None
    folder = repository / "snapshots" / newest.read_text(encoding="utf-8").strip()
    return folder if folder.is_dir() else None


def _answers(endpoint: str) -> bool:
    moment, answered = _asked.get(endpoint, (-SECONDS_TO_REMEMBER, False))
    if time.monotonic() - moment >= SECONDS_TO_REMEMBER:
        from huggingface_hub import get_session

        try:
            get_session().head(endpoint, timeout=SECONDS_TO_CONNECT)
        except Exception as error:  # of whichever HTTP library the client stands on
            log.debug("%s does not answer: %s", endpoint, error)
            answered = False
        else:
            answered = True
        _asked[endpoint] = (time.monotonic(), answered)
    return answered
