"""Time, peak memory and accuracy of `baco dataset dedupe` on synthetic rows.

    python -m benchmarks.near_duplicates [--rows 1000000] [--folder FOLDER]
    python -m benchmarks.near_duplicates --libraries     # signatures a second; needs datasketch

Rows are answers of 60 words, drawn from 20,000 words by Zipf's law. One in ten is a copy of an
earlier row, and one in ten is an earlier row with one or two words replaced: similarity 0.9 or 0.8
of their runs of three words. FOLDER must have room for two copies of the rows, 400 bytes each, and
an index of 276 bytes a row.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import launch

WORDS, VOCABULARY = 60, 20_000
# The peak of this program alone: `ru_maxrss` begins with that of the process that started it.
MEASURE = """
import pathlib, re, sys
from baco.cli import run
code = run(sys.argv[1:])
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 1024, file=sys.stderr)
sys.exit(code)
"""


def write_rows(path: Path, count: int) -> tuple[int, int]:
    """Write synthetic rows.

    Returns:
        How many are copies, and how many are near copies, of a row that is neither.
    """
    random = np.random.default_rng(1)
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    frequency /= frequency.sum()
    names = np.array([f"word{number:x}" for number in range(VOCABULARY)])
    originals = np.empty((count, WORDS), np.uint16)
    own = exact = near = 0
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            size = min(10_000, count - start)
            drawn = random.choice(VOCABULARY, (size, WORDS), p=frequency)
            kinds = random.random(size)
            for words, kind in zip(drawn, kinds, strict=True):
                row = words
                if own and kind < 0.2:
                    row = originals[random.integers(own)].copy()
                    if kind < 0.1:
                        exact += 1
                    else:
                        near += 1
                        changed = random.integers(WORDS, size=1 + near % 2)
                        row[changed] = random.integers(VOCABULARY, size=len(changed))
                else:
                    originals[own] = row
                    own += 1
                file.write(json.dumps({"answer": " ".join(names[row].tolist())}) + "\n")
    return exact, near


def compare_libraries(count: int = 5000) -> None:
    """Print how many signatures of 128 permutations rensa and datasketch make a second."""
    import datasketch
    import rensa

    random = np.random.default_rng(1)
    drawn = random.integers(5000, size=(count, WORDS)).tolist()
    texts = [[f"w{a} w{b} w{c}" for a, b, c in zip(r, r[1:], r[2:], strict=False)] for r in drawn]
    data = [[shingle.encode() for shingle in row] for row in texts]
    started = time.perf_counter()
    rensa.RMinHash.digests_from_token_sets(texts, 128, 1)
    between = time.perf_counter()
    datasketch.MinHash.bulk(data, num_perm=128)
    seconds = between - started, time.perf_counter() - between
    print(f"rensa {count / seconds[0]:,.0f} a second, datasketch {count / seconds[1]:,.0f}")


def main() -> None:
    """Write rows, remove their duplicates in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--libraries", action="store_true")
    args = parser.parse_args()
    if args.libraries:
        compare_libraries()
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        exact, near = write_rows(path, args.rows)
        started = time.perf_counter()
        command = [sys.executable, "-c", MEASURE, "dataset", "dedupe", str(path), str(out)]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
        processor = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = json.loads(done.stdout)
        peak = float(done.stderr.splitlines()[-1])
        print(f"rows {args.rows:,}, {path.stat().st_size / 2**20:.0f} MiB")
        print(f"seconds {seconds:.0f}, of the processor {processor.ru_utime:.0f}")
        print(f"peak memory {peak:.0f} MiB, index {args.rows * 276 / 2**20:.0f} MiB on disk")
        print(f"copies {exact:,}, removed as exact {result['exact']:,}")
        print(f"near copies {near:,}, removed as near {result['near']:,}")


if __name__ == "__main__":
    launch(main)
