"""A dial that means the same on every pair: which threshold gives how much diversity.

The paper leaves γ to be tuned by hand, and the same γ does very different things to different
pairs. Calibrating measures, on a set of prompts, the base share and the diversity of a router over
its range of γ, and remembers the curve for the pair. The dial runs from 0, the aligned model's own
diversity, to 1, the most that this router gives this pair; in between it is linear in diversity.

Diversity here is distinct-2 of a prompt's pooled samples (Li et al. 2016): distinct pairs of
neighbouring words / all of them, in [0, 1], averaged over prompts. What a word is in each script,
`baco.text.segmentation` says.

A pair in one folder (base/ and aligned/) may bring its curves along, in calibration.json beside the
two. What a user measures goes to the user's own cache (or BACO_HOME), under a fingerprint of the
pair, and goes before what the folder brought.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Self

import platformdirs
import torch

from baco.calibration.curve import Curve
from baco.errors import BacoError
from baco.files import locked
from baco.models.forward.fused_linear import FUSED
from baco.models.forward.packed_linear import own_weights
from baco.models.pair import Pair
from baco.models.weightless import WeightlessModel

MIDDLE = 0.5

# Another process holds a calibration for as long as it takes to write one.
SECONDS_TO_KEEP = 60


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The never falling sequence nearest to ``values`` in squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return tuple(mean for mean, count in blocks for _ in range(count))


@dataclass
class Calibration:
    """The curves of one pair, by router spelling without its threshold."""

    curves: dict[str, Curve] = field(default_factory=dict)

    @classmethod
    def load(cls, pair: Pair) -> Self | None:
        """The user's own calibration of a pair, else the one kept beside its weights, else None.

        Raises:
            BacoError: a file that is no calibration.
        """
        found = cls()
        # Weights that are elsewhere cannot be told from others, so nothing here is surely theirs.
        own = None if isinstance(pair.base, WeightlessModel) else _own(pair)
        for path in (_beside(pair), own):
            if path is not None and path.is_file():
                found.curves |= _read(path)
        return found if found.curves else None

    def threshold(self, router: str, diversity: float = MIDDLE) -> float:
        """γ of a router at a dial position; KeyError where it was not calibrated."""
        return self.curves[router].at_diversity(diversity)

    @classmethod
    def keep(cls, pair: Pair, router: str, curve: Curve, path: Path | None = None) -> Path:
        """Add a curve to the calibration in ``path``, or to the user's own; other curves stay.

        Processes that calibrate at once take turns here, so that none loses the curve of another.

        Raises:
            BacoError: a place that cannot be written, or that holds another pair's calibration.
        """
        target = path or _own(pair)
        check_writable(target)
        with locked(target, wait=SECONDS_TO_KEEP):
            found = cls.load(pair) or cls()
            if path is not None:
                found.curves |= cls.in_file(pair, path)
            found.curves[router] = curve
            return found.save(pair, path)

    @staticmethod
    def in_file(pair: Pair, path: Path) -> dict[str, Curve]:
        """The curves of a pair in a file; none where there is no such file.

        Raises:
            BacoError: it holds something else, or another pair's calibration.
        """
        if not path.is_file():
            return {}
        curves = _read(path)
        name = json.loads(path.read_text(encoding="utf-8")).get("pair")
        if name != pair.name:
            raise BacoError(
                f"{path} holds the calibration of {name}: remove it, or choose another --output"
            )
        return curves

    def save(self, pair: Pair, path: Path | None = None) -> Path:
        """Write the curves, whole or not at all, to ``path`` or the user's own place for the pair.

        Raises:
            BacoError: a place that cannot be written.
        """
        target = path or _own(pair)
        told = {"pair": pair.name, "curves": {k: asdict(v) for k, v in self.curves.items()}}
        check_writable(target)
        partial = _partial(target)
        try:
            partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
            partial.replace(target)
        except OSError as error:
            raise BacoError(f"cannot write {target}: {error.strerror}") from error
        return target


def middle(pair: Pair, router: str) -> float | None:
    """γ of a router at the middle of the pair's dial, None where it was not calibrated."""
    found = Calibration.load(pair)
    return found.threshold(router) if found is not None and router in found.curves else None


def check_writable(target: Path | None) -> None:
    """Find out before hours of measuring whether a curve can be kept there (None: in the cache).

    Raises:
        BacoError: it cannot.
    """
    target = target or _home() / "any.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        partial = _partial(target)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise BacoError(f"cannot write {target}: {error.strerror}") from error


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}.partial")


def _read(path: Path) -> dict[str, Curve]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["curves"]
        return {name: Curve.from_row(row) for name, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BacoError(
            f"{path} is no calibration ({type(error).__name__}): delete it and run 'baco "
            "calibrate' again"
        ) from error


def _beside(pair: Pair) -> Path | None:
    base, aligned = Path(pair.base.name), Path(pair.aligned.name)
    # Two folders of any names may share theirs with other pairs; a hub id is no folder at all.
    if (base.name, aligned) != ("base", base.parent / "aligned"):
        return None
    return base.parent / "calibration.json"


def _home() -> Path:
    return Path(os.environ.get("BACO_HOME") or platformdirs.user_cache_dir("baco")) / "calibration"


def _own(pair: Pair) -> Path:
    return _home() / f"{fingerprint(pair)}.json"


@torch.inference_mode()
def fingerprint(pair: Pair) -> str:
    """Stands for the pair: names, configurations, templates, and a few numbers of most weights.

    It is the same however weights are laid out: layers that may be joined to another are left out,
    and what is held twice counts once.
    """
    joined = {name for names in FUSED.values() for name in names[1:]}
    digest = hashlib.sha256()
    for half, template in (
        (pair.base, pair.renderer.base_template),
        (pair.aligned, pair.renderer.aligned_template),
    ):
        config = half.model.config.to_dict()
        config.pop("transformers_version", None)  # an upgrade leaves the model as it is
        digest.update(f"{half.name} {json.dumps(config, sort_keys=True, default=str)}".encode())
        digest.update(str(template).encode())
        # Weights kept on disk have no numbers at hand, quantised ones need not take part in sums.
        seen: set[int] = set()
        samples = [
            sample
            for name, module in half.model.named_modules()
            if name.rpartition(".")[2] not in joined
            for sample, _, _ in own_weights(module, seen)
            if len(sample)
        ]
        numbers = set[str]()
        for device in dict.fromkeys(sample.device for sample in samples):
            few = [sample.float() for sample in samples if sample.device == device]
            values = iter(torch.cat(few).tolist())  # one wait a device
            numbers |= {str(list(islice(values, len(sample)))) for sample in few}
        digest.update(str(sorted(numbers)).encode())
    return digest.hexdigest()[:16]
