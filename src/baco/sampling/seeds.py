"""The seed of a prompt's noise, from the user's seed and the prompt's digest.

Different prompts draw independently, and equal prompts draw equal answers. This module imports
neither torch nor NumPy, so that commands without draws start quickly.
"""

import hashlib
from pathlib import Path

from baco.errors import BacoError

# Increases whenever the same seed gives other answers. 1: draws are keyed by seed, sample, position
# and token; 2: by the prompt too.
NOISE_VERSION = 2

_LARGEST = 2**63 - 1  # seeds are int64 in tensors


def noise_seed(seed: int, digest: bytes) -> int:
    """The seed of one prompt's draws, 0 … 2**63 - 1."""
    mixed = hashlib.blake2b(digest, key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(mixed, "little") & _LARGEST


def check_version(begun: object, output: Path) -> None:
    """Check that an unfinished output can be continued with the same draws.

    Args:
        begun: the version of the noise that its manifest names; None where it names none.
        output: the file or folder.

    Raises:
        BacoError: another version.
    """
    if begun != NOISE_VERSION:
        raise BacoError(
            f"{output} was begun with version {1 if begun is None else begun} of the noise and "
            f"this BACo draws with version {NOISE_VERSION}, so its answers cannot be continued: "
            "remove it, choose another output, or finish it with the BACo that began it"
        )
