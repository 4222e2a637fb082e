"""Duplicates among the answers of a dataset, through an index on disk.

Two answers are *exact* duplicates if they are the same text, apart from white space at its ends.
They are *near* duplicates if the estimated Jaccard similarity of their sets of shingles (runs of
`SHINGLE` words) reaches a threshold. The estimate is the share of equal values among the
`PERMUTATIONS` of their MinHash signatures (Broder 1997); its standard error is at most 0.045.

Pairs are found by locality-sensitive hashing: a signature is cut into bands, and answers with an
equal band are compared. There are enough bands to find a pair at the threshold with a probability
of at least `RECALL`. Answers that are connected by a chain of duplicates form a group.

The index is one file of `ITEM`: 276 bytes an answer, written in order, so that it can be continued.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from baco.dataset.files import Answer
from baco.errors import BacoError
from baco.text.segmentation import bare_words

PERMUTATIONS, SHINGLE, SEED = 128, 3, 1
RECALL = 0.95
# The low 16 bits of a MinHash value are enough: two differing ones agree once in 65,536.
ITEM = np.dtype(
    [("text", "u8"), ("prompt", "u8"), ("words", "u4"), ("signature", "u2", (PERMUTATIONS,))]
)
ANSWERS_AT_ONCE = 2000
PAIRS_AT_ONCE = 100_000
# Answers that share a band without being alike, such as a common phrase in it, are compared with
# this many of the others.
COMPARED = 32

Keep = Literal["first", "longest"]
Numbers = NDArray[np.int64]
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """Which answers are duplicates, and which one of a group is kept.

    Attributes:
        threshold: the similarity of near duplicates, above 0; 1 for the same set of shingles.
        keep: ``first`` in the order of the rows, or ``longest`` in words, the first of equal ones.
        same_prompt: only answers to one prompt are compared.
    """

    threshold: float = 0.7
    keep: Keep = "first"
    same_prompt: bool = False

    def __post_init__(self) -> None:
        if not 0.1 <= self.threshold <= 1:
            raise BacoError(f"threshold is {self.threshold:g}: give a number from 0.1 to 1")
        if self.keep not in ("first", "longest"):
            raise BacoError(f"keep is {self.keep!r}: use first or longest")

    @property
    def rows_a_band(self) -> int:
        """MinHash values in a band: the most with which `RECALL` holds."""
        for size in range(PERMUTATIONS, 1, -1):
            bands = PERMUTATIONS // size
            if 1 - (1 - self.threshold**size) ** bands >= RECALL:
                return size
        return 1


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The duplicates of a dataset.

    Attributes:
        kept: int64 [N]: for every answer the one that is kept of its group; itself if it is kept.
        exact: bool [N]: an earlier answer is the same text.
        similarity: float32 [N]: estimated, to the kept answer; 1 for itself.
    """

    kept: Numbers
    exact: NDArray[np.bool_]
    similarity: NDArray[np.float32]

    @property
    def removed(self) -> NDArray[np.bool_]:
        """bool [N]: not kept."""
        removed: NDArray[np.bool_] = self.kept != np.arange(len(self.kept))
        return removed


def algorithm() -> dict[str, int]:
    """What the signatures of an index depend on.

    Raises:
        BacoError: the library is not installed.
    """
    version = int(_rensa().RMinHash.ALGORITHM_VERSION)
    return {"minhash": version, "permutations": PERMUTATIONS, "shingle": SHINGLE, "seed": SEED}


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise BacoError("duplicates need a library: pip install 'baco[dataset]'") from error
    return rensa


def write_index(path: Path, answers: Iterator[Answer], advance: Advance) -> None:
    """Write the index of answers, or continue it.

    Args:
        path: of the index. What is there must come from the same answers.
        answers: all of them.
        advance: receives numbers of answers.
    """
    there = path.stat().st_size // ITEM.itemsize if path.exists() else 0
    with path.open("ab") as file:
        file.truncate(there * ITEM.itemsize)
        advance(sum(1 for _ in islice(answers, there)))
        while some := list(islice(answers, ANSWERS_AT_ONCE)):
            file.write(_items(some).tobytes())
            file.flush()
            advance(len(some))


def read_index(path: Path) -> NDArray[Any]:
    """The items of an index, mapped from the disk."""
    if not path.stat().st_size:
        return np.zeros(0, ITEM)
    return np.memmap(path, ITEM, mode="r")


def _items(answers: Sequence[Answer]) -> NDArray[Any]:
    words = [bare_words(answer.text) for answer in answers]
    items = np.zeros(len(answers), ITEM)
    items["text"] = [_digest(answer.text.strip()) for answer in answers]
    items["prompt"] = [_digest(answer.prompt) for answer in answers]
    items["words"] = [len(row) for row in words]
    digests = _rensa().RMinHash.digests_from_token_sets(
        [_shingles(row) or [answer.text] for row, answer in zip(words, answers, strict=True)],
        PERMUTATIONS,
        SEED,
    )
    items["signature"] = np.array(digests, np.uint32).astype(np.uint16)
    return items


def _shingles(words: Sequence[str]) -> list[str]:
    """Runs of words; a shorter text is one run."""
    last = max(1, len(words) - SHINGLE + 1) if words else 0
    return [" ".join(words[start : start + SHINGLE]) for start in range(last)]


def _digest(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def find_duplicates(items: NDArray[Any], rule: Rule) -> Duplicates:
    """The groups of duplicates in an index.

    Args:
        items: `ITEM` [N].
        rule: what counts as a duplicate.
    """
    count = len(items)
    signatures = items["signature"]
    scope = items["prompt"] if rule.same_prompt else np.zeros(count, np.uint64)
    texts = _mixed(items["text"], scope)
    _, first, place = np.unique(texts, return_index=True, return_inverse=True)
    root: Numbers = first[place].astype(np.int64)
    exact = root != np.arange(count)
    distinct = np.sort(first).astype(np.int64)
    size = rule.rows_a_band
    for start in range(0, PERMUTATIONS - size + 1, size):
        band = np.array(scope[distinct])
        for column in range(start, start + size):
            band = _mixed(band, signatures[distinct, column].astype(np.uint64))
        _join_band(root, distinct, band, signatures, rule.threshold)
    kept = _kept(root, items["words"], rule.keep)
    similarity = np.ones(count, np.float32)
    for some in _parts(np.flatnonzero(kept != np.arange(count))):
        similarity[some] = _similarity(signatures, some, kept[some])
    return Duplicates(kept, exact, similarity)


def _join_band(
    root: Numbers,
    rows: Numbers,
    band: NDArray[np.uint64],
    signatures: NDArray[np.uint16],
    threshold: float,
) -> None:
    """Join the duplicates among rows with an equal band.

    In each round the rows of every band are compared with the first of them; those that are not
    like it are left for the next round.

    Args:
        root: int64 [N]: the first row of every row's group; changed.
        rows: increasing, [M].
        band: of each, [M].
        signatures: of all rows, uint16 [N, P].
        threshold: of similarity.
    """
    order = np.argsort(band, kind="stable")
    rows, band = rows[order], band[order]
    for _ in range(COMPARED):
        is_first = np.ones(len(band), np.bool_)
        is_first[1:] = band[1:] != band[:-1]
        leader = rows[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
        # The leaders are done, and so are rows whose band has no other.
        rows, band, leader = rows[~is_first], band[~is_first], leader[~is_first]
        apart = root[rows] != root[leader]
        rows, band, leader = rows[apart], band[apart], leader[apart]
        if not len(rows):
            return
        alike = np.zeros(len(rows), np.bool_)
        for some in _parts(np.arange(len(rows))):
            alike[some] = _similarity(signatures, rows[some], leader[some]) >= threshold
        _join(root, rows[alike], leader[alike])
        rows, band = rows[~alike], band[~alike]


def _join(root: Numbers, a: Numbers, b: Numbers) -> None:
    """Make one group of the groups of each a and b; its root is the first of its rows."""
    while len(a):
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)
        while (root != (above := root[root])).any():
            root[:] = above
        apart = root[a] != root[b]
        a, b = a[apart], b[apart]


def _kept(root: Numbers, words: NDArray[np.uint32], keep: Keep) -> Numbers:
    """The kept row of every row's group."""
    if keep == "first":
        return root
    order = np.lexsort((np.arange(len(root)), -words.astype(np.int64), root))
    groups, start = np.unique(root[order], return_index=True)
    kept = np.zeros(len(root), np.int64)
    kept[groups] = order[start]
    longest: Numbers = kept[root]
    return longest


def _similarity(signatures: NDArray[np.uint16], a: Numbers, b: Numbers) -> NDArray[np.float32]:
    equal: NDArray[np.float32] = (signatures[a] == signatures[b]).mean(axis=1, dtype=np.float32)
    return equal


def _parts(rows: Numbers) -> Iterator[Numbers]:
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        yield rows[start : start + PAIRS_AT_ONCE]


def _mixed(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One 64-bit hash of two (the finalizer of SplitMix64)."""
    value = (a ^ b) * np.uint64(0x9E3779B97F4A7C15) + a
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed
