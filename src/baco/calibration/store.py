"""Calibration curves kept per pair: which threshold gives how much diversity.

The paper tunes γ by hand, and the same γ has very different effects on different pairs. Calibration
measures the base share and the diversity of a router over its range of γ, on a set of prompts, and
keeps the curve for the pair. The dial runs from 0, the aligned model's own diversity, to 1, the
highest diversity of this router on this pair, and is linear in diversity.

Diversity here is distinct-2 of a prompt's pooled samples (Li et al. 2016): distinct pairs of
neighbouring words / all pairs, in [0, 1], averaged over prompts. `baco.text.segmentation` defines
words in each script.

A pair in one folder (base/ and aligned/) can have its curves in calibration.json beside the two.
Curves that a user measures are kept in the user's cache (or BACO_HOME) under a fingerprint of the
pair, and override those of the folder.
"""

import bisect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import platformdirs

from baco.errors import BacoError
from baco.files import locked, write_output
from baco.models.pair import Pair
from baco.models.weightless import WeightlessModel

MIDDLE = 0.5

# How long to wait for another process that writes the same calibration.
SECONDS_TO_KEEP = 60


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The non-decreasing sequence nearest to ``values`` in squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    return tuple(mean for mean, count in blocks for _ in range(count))


@dataclass(frozen=True, slots=True)
class Curve:
    """Base share and diversity of a router on a pair over the thresholds, lowest base share first.

    Attributes:
        thresholds: γ at each point.
        base_share: in [0, 1], non-decreasing.
        diversity: distinct-2, non-decreasing (an isotonic fit of the measured values).
        aligned: distinct-2 of the aligned model alone.
        prompts, samples, seed: what it was measured with.
    """

    thresholds: tuple[float, ...]
    base_share: tuple[float, ...]
    diversity: tuple[float, ...]
    aligned: float
    prompts: int
    samples: int
    seed: int

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """From the JSON object that ``asdict`` makes.

        Raises:
            TypeError, ValueError: fields are missing, or its columns do not belong together.
        """
        columns: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in row.items()
        }
        curve = cls(**columns)
        if not 0 < len(curve.thresholds) == len(curve.base_share) == len(curve.diversity):
            raise ValueError("columns of different lengths")
        return curve

    def at_diversity(self, dial: float) -> float:
        """γ at a dial position in [0, 1]."""
        low = min(self.aligned, self.diversity[0])
        target = low + dial * (self.diversity[-1] - low)
        return _interpolate(self.diversity, self.thresholds, target)

    def at_base_share(self, share: float) -> float:
        """γ at which this share of the tokens comes from the base model.

        Raises:
            BacoError: more than the router gives at any threshold.
        """
        if share > self.base_share[-1]:
            raise BacoError(
                f"base share {share:g} is out of reach: this router gives at most "
                f"{self.base_share[-1]:.2f} on this pair; ask for less, or choose another router"
            )
        return _interpolate(self.base_share, self.thresholds, share)


@dataclass
class Calibration:
    """The curves of one pair, by router spelling without its threshold."""

    curves: dict[str, Curve] = field(default_factory=dict)

    @classmethod
    def load(cls, pair: Pair) -> Self | None:
        """The curves beside the pair's weights and the user's own; None without any.

        Raises:
            BacoError: a file is not a calibration.
        """
        calibration = cls()
        # Without the weights there is no fingerprint.
        own = None if isinstance(pair.base, WeightlessModel) else _own(pair)
        for path in (_beside(pair), own):
            if path is not None and path.is_file():
                calibration.curves |= _read(path)
        return calibration if calibration.curves else None

    def threshold(self, router: str, diversity: float = MIDDLE) -> float:
        """γ of a router at a dial position; KeyError where it was not calibrated."""
        return self.curves[router].at_diversity(diversity)

    @classmethod
    def keep(cls, pair: Pair, router: str, curve: Curve, path: Path | None = None) -> Path:
        """Add a curve to the calibration in ``path``, or to the user's own; other curves stay.

        A lock keeps processes that calibrate at the same time from losing each other's curves.

        Raises:
            BacoError: the file cannot be written, or holds another pair's calibration.
        """
        target = path or _own(pair)
        check_writable(target)
        with locked(target, wait=SECONDS_TO_KEEP):
            calibration = cls.load(pair) or cls()
            if path is not None:
                calibration.curves |= cls.in_file(pair, path)
            calibration.curves[router] = curve
            return calibration.save(pair, path)

    @staticmethod
    def in_file(pair: Pair, path: Path) -> dict[str, Curve]:
        """The curves of a pair in a file; none where there is no such file.

        Raises:
            BacoError: it is not a calibration, or another pair's.
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
        """Write the curves atomically to ``path`` or to the user's own file for the pair.

        Raises:
            BacoError: the file cannot be written.
        """
        target = path or _own(pair)
        content = {"pair": pair.name, "curves": {k: asdict(v) for k, v in self.curves.items()}}
        check_writable(target)
        write_output(target, json.dumps(content, indent=1) + "\n")
        return target


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at the first place where the non-decreasing ``xs`` reach x."""
    upper = bisect.bisect_left(xs, x)
    if upper == 0:
        return ys[0]
    if upper == len(xs):
        return ys[-1]
    lower = upper - 1
    part = (x - xs[lower]) / (xs[upper] - xs[lower])
    return round(ys[lower] + part * (ys[upper] - ys[lower]), 4)


def middle(pair: Pair, router: str) -> float | None:
    """γ of a router at the middle of the pair's dial, None where it was not calibrated."""
    calibration = Calibration.load(pair)
    if calibration is None or router not in calibration.curves:
        return None
    return calibration.threshold(router)


def check_writable(target: Path | None) -> None:
    """Check, before hours of measuring, that a file can be written (None: in the user's cache).

    Raises:
        BacoError: it cannot be written.
    """
    target = target or _home() / "any.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise BacoError(f"cannot write {target}: {error.strerror}") from error


def _read(path: Path) -> dict[str, Curve]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["curves"]
        return {name: Curve.from_row(row) for name, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BacoError(
            f"{path} is not a calibration ({type(error).__name__}): delete it and run 'baco "
            "calibrate' again"
        ) from error


def _beside(pair: Pair) -> Path | None:
    base, aligned = Path(pair.base.name), Path(pair.aligned.name)
    # Folders of other names can lie beside those of other pairs; a hub id is not a folder.
    if (base.name, aligned) != ("base", base.parent / "aligned"):
        return None
    return base.parent / "calibration.json"


def home() -> Path:
    """The user's cache folder, or BACO_HOME."""
    return Path(os.environ.get("BACO_HOME") or platformdirs.user_cache_dir("baco"))


def _home() -> Path:
    return home() / "calibration"


def _own(pair: Pair) -> Path:
    return _home() / f"{pair.fingerprint}.json"
