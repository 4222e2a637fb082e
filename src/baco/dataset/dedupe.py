"""A copy of a dataset without duplicates, made in steps that can be continued.

OUT/README.md                the card of the dataset, with what was done
OUT/_manifest.json           the rule, and the digest of every file
OUT/data/NAME                the rows that are kept, of every file, unchanged
OUT/removed.jsonl            the place of every removed answer, and of the one that is kept
OUT/_result.json             how many were removed; written last
OUT/_index.bin               while it is made: see `baco.dataset.near_duplicates`
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baco.batch.job import as_manifest, begin_folder, check_folder, line, read_manifest
from baco.dataset.files import CARD, Dataset, rows
from baco.dataset.near_duplicates import (
    PERMUTATIONS,
    SHINGLE,
    Duplicates,
    Rule,
    algorithm,
    find_duplicates,
    read_index,
    write_index,
)
from baco.errors import BacoError
from baco.files import allow_long_cells, locked, replacing, write_atomic

FORMAT = 1
MANIFEST, INDEX, RESULT = "_manifest.json", "_index.bin", "_result.json"
REMOVED, DATA = "removed.jsonl", "data"
NO_CARD = "\n# Dataset\n"
_HEADER = re.compile(r"---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
# Keys of a header that describe files and count rows, with their values on the lines below.
_OF_FILES = re.compile(r"^(?:configs|dataset_info|size_categories):.*\n(?:[ -].*\n)*", re.MULTILINE)
KIND, OTHER, COMMAND = "deduplicated dataset", "another directory", "baco dataset dedupe"
Kept = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Result:
    """What was removed.

    Attributes:
        rows: of the dataset.
        exact: removed rows whose text is that of an earlier row.
        near: removed rows that are near duplicates only.
    """

    rows: int
    exact: int
    near: int

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return self.rows - self.exact - self.near


def dedupe(
    dataset: Dataset,
    out: Path,
    rule: Rule,
    advance: Callable[[int], None],
    provenance: dict[str, Any],
) -> Result:
    """Write a dataset without its duplicates; the same call continues a stopped one.

    Args:
        dataset: one answer a row.
        out: the folder to write.
        rule: what is removed.
        advance: receives numbers of rows that were read into the index.
        provenance: what the manifest says besides, such as the command.

    Raises:
        BacoError: rows without an answer or with several, or a folder of something else, of another
            rule or dataset, that another process writes to, or that cannot be written.
    """
    if out.resolve() == dataset.path.resolve():
        raise BacoError(f"{out} is the dataset itself: give {OTHER}")
    check_folder(out, [MANIFEST], KIND, OTHER)
    card = _read_card(dataset)
    settings = {
        "files": {file.name: _digest(file) for file in dataset.files},
        "column": dataset.column,
        **asdict(rule),
        **algorithm(),
    }
    manifest = {"format": FORMAT, "settings": settings, "made": provenance}
    if begin_folder(out, {MANIFEST: as_manifest(manifest)}, KIND, OTHER):
        begun = read_manifest(out / MANIFEST, FORMAT, KIND, COMMAND)["settings"]
        if differing := sorted(name for name in settings if begun.get(name) != settings[name]):
            raise BacoError(
                f"{out} was begun with other settings ({', '.join(differing)}): give the same ones "
                f"to continue it, or choose {OTHER}"
            )
    with locked(out):
        result = _result(out)
        if result is None:
            try:
                result = _carry_out(dataset, card, out, rule, advance)
            except OSError as error:
                raise BacoError(f"cannot write {out}: {error.strerror or error}") from error
        (out / INDEX).unlink(missing_ok=True)
    return result


def _carry_out(
    dataset: Dataset, card: str, out: Path, rule: Rule, advance: Callable[[int], None]
) -> Result:
    write_index(out / INDEX, iter(dataset), advance)
    duplicates = find_duplicates(read_index(out / INDEX), rule)
    removed = duplicates.removed
    exact = removed & duplicates.exact
    result = Result(len(removed), int(exact.sum()), int((removed & ~exact).sum()))
    (out / DATA).mkdir(exist_ok=True)
    starts = [0]
    for file in dataset.files:
        target = out / DATA / file.name
        if target.exists():
            count = sum(1 for _ in rows(file))
        else:
            with replacing(target) as partial:
                count = _copy(file, partial, ~removed[starts[-1] :])
        starts.append(starts[-1] + count)
    write_atomic(out / CARD, _card(card, dataset, rule, result))
    names = [file.name for file in dataset.files]
    with replacing(out / REMOVED) as partial, partial.open("w", encoding="utf-8") as write:
        write.writelines(_removed_lines(duplicates, names, np.array(starts)))
    write_atomic(out / RESULT, as_manifest(asdict(result)))
    return result


def _copy(source: Path, target: Path, keep: Kept) -> int:
    """Copy the rows of a file that are kept.

    Args:
        source, target: the files.
        keep: of its rows, and those of the files after it.

    Returns:
        Its rows.
    """
    if source.suffix.lower() == ".parquet":
        return _copy_parquet(source, target, keep)
    if source.suffix.lower() == ".csv":
        return _copy_csv(source, target, keep)
    count = 0
    with source.open("rb") as read, target.open("wb") as write:
        for text in read:
            if text.decode("utf-8-sig").strip():  # reading skips other lines
                if keep[count]:
                    write.write(text if text.endswith(b"\n") else text + b"\n")
                count += 1
    return count


def _copy_csv(source: Path, target: Path, keep: Kept) -> int:
    count = 0
    allow_long_cells()
    with (
        source.open(encoding="utf-8-sig", newline="") as read,
        target.open("w", encoding="utf-8", newline="") as write,
    ):
        writer = csv.writer(write, lineterminator="\n")
        reader = csv.reader(read, strict=True)
        for heading in islice(reader, 1):
            writer.writerow(heading)
        for row in reader:
            if row:
                if keep[count]:
                    writer.writerow(row)
                count += 1
    return count


def _copy_parquet(source: Path, target: Path, keep: Kept) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with (
        pq.ParquetFile(source) as read,
        pq.ParquetWriter(target, read.schema_arrow, compression="zstd") as write,
    ):
        for batch in read.iter_batches():
            write.write_batch(batch.filter(pa.array(keep[count : count + batch.num_rows])))
            count += batch.num_rows
    return count


def _removed_lines(
    duplicates: Duplicates, names: Sequence[str], starts: NDArray[np.int64]
) -> Iterator[str]:
    """A line for every removed answer."""

    def place(number: int) -> dict[str, Any]:
        file = int(np.searchsorted(starts, number, side="right")) - 1
        return {"file": names[file], "row": number - int(starts[file])}

    for number in np.flatnonzero(duplicates.removed).tolist():
        yield line(
            {
                **place(number),
                "kept": place(int(duplicates.kept[number])),
                "exact": bool(duplicates.exact[number]),
                "similarity": round(float(duplicates.similarity[number]), 3),
            }
        )


def _result(out: Path) -> Result | None:
    """What a finished folder says was removed; None where it is not finished."""
    try:
        return Result(**json.loads((out / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _read_card(dataset: Dataset) -> str:
    """The card of a dataset; empty where it has none."""
    if dataset.card is None:
        return ""
    try:
        return dataset.card.read_text(encoding="utf-8-sig").rstrip() + "\n"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BacoError(f"cannot read {dataset.card}: {reason}") from error


def _card(card: str, dataset: Dataset, rule: Rule, result: Result) -> str:
    """The dataset's card with a section about the duplicates."""
    # What a header says of other files, or of the number of rows, is not true of the copy.
    if "data_files: data/" not in card or "num_examples" in card:
        header = _HEADER.match(card)
        about, body = (header[1], card[header.end() :]) if header else ("", card)
        suffixes = sorted({file.suffix for file in dataset.files})
        files = "".join(f"  - data/*{suffix}\n" for suffix in suffixes)
        own = f"configs:\n- config_name: default\n  data_files:\n{files}"
        card = f"---\n{_OF_FILES.sub('', about)}{own}---\n{body or NO_CARD}"
    scope = "answers to the same prompt" if rule.same_prompt else "all answers"
    return (
        card
        + f"""
## Duplicates

{result.kept:,} of {result.rows:,} rows are left; {result.exact:,} exact and {result.near:,} near
duplicates were removed ([BACo](https://arxiv.org/abs/2511.05650), `baco dataset dedupe`).
Compared were {scope}. Near duplicates have an estimated Jaccard similarity of at least
{rule.threshold:g} (shingles of {SHINGLE} words, MinHash with {PERMUTATIONS} permutations). Of rows
that are connected by a chain of duplicates the {rule.keep} one is kept.
"""
    )


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as read:
            return hashlib.file_digest(read, "sha256").hexdigest()
    except OSError as error:
        raise BacoError(f"cannot read {file}: {error.strerror}") from error
