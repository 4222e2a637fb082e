"""How long scoring takes, and whether its memory stays flat.

    python benchmarks/metrics.py [--json]

Every metric scores 100 prompts × 10 samples of the demo pair's length. Embeddings are made once and
shared, so the second metric on them costs next to nothing. Memory is the peak of a process of its
own that scores that many prompts, and of one that scores eight times as many.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import time
from importlib.metadata import version

from baco.demo.world import aligned_examples
from baco.evaluation.metrics import LEXICAL, metric
from baco.evaluation.records import Prompt

PROMPTS, SAMPLES, MORE = 100, 10, 8
SEMANTIC = ("embedding_distance", "vendi")


def material(prompts: int, seed: int = 0) -> tuple[list[Prompt], list[list[str]]]:
    """Prompts and their samples: the demo world's answers with words left out at random."""
    random_ = random.Random(seed)
    asked = [
        Prompt(str(i), ({"role": "user", "content": f"prompt {i}"},), None, {})
        for i in range(prompts)
    ]
    said = iter(aligned_examples(prompts * SAMPLES, seed))
    rows = [
        [
            " ".join(word for word in next(said)[1].split() if random_.random() < 0.95)
            for _ in range(SAMPLES)
        ]
        for _ in range(prompts)
    ]
    return asked, rows


def seconds(name: str, prompts: int) -> float:
    """How long one metric takes, its model once loaded."""
    asked, rows = material(prompts)
    figure = metric(name)
    figure.score(asked[:1], rows[:1])
    started = time.perf_counter()
    figure.score(asked, rows)
    return time.perf_counter() - started


def peak(name: str, prompts: int) -> float:
    """Peak memory in MiB of a process that scores so many prompts, a hundred at a time."""
    command = [sys.executable, __file__, "--peak", name, str(prompts)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(told.split()[-1])


def _measure_peak(name: str, prompts: int) -> None:
    figure = metric(name)
    for seed in range(0, prompts, PROMPTS):  # new answers every time, none is known before
        figure.score(*material(PROMPTS, seed))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--peak", nargs=2, metavar=("METRIC", "PROMPTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        _measure_peak(given.peak[0], int(given.peak[1]))
        return
    rows = []
    for name in (*LEXICAL, *SEMANTIC):
        few, many = peak(name, PROMPTS), peak(name, PROMPTS * MORE)
        rows.append(
            {
                "metric": name,
                "seconds": round(seconds(name, PROMPTS), 3),
                "peak_mib": round(few),
                "peak_mib_more": round(many),
            }
        )
    made = {
        "machine": f"{platform.machine()}, {platform.processor() or 'unnamed'} processor",
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("sacrebleu", "rapidfuzz", "sentence-transformers")},
        "prompts": PROMPTS,
        "samples": SAMPLES,
        "more": PROMPTS * MORE,
        "metrics": rows,
    }
    if given.json:
        print(json.dumps(made))
        return
    print(f"{PROMPTS} prompts × {SAMPLES} samples; {made['machine']}, {made['versions']}")
    print(f"{'metric':20}{'seconds':>9}{'MiB':>8}{f'MiB at {MORE}×':>14}")
    for row in rows:
        print("{metric:20}{seconds:9.2f}{peak_mib:8}{peak_mib_more:14}".format(**row))
    lexical = sum(row["seconds"] for row in rows if row["metric"] in LEXICAL)
    print(f"all lexical metrics: {lexical:.2f} s")


if __name__ == "__main__":
    main()
