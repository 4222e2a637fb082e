"""How long scoring takes, and whether its memory stays flat.

    python -m benchmarks.metrics [--json]

Every figure is of one call in a process of its own: a metric scores 100 prompts × 10 samples of the
demo pair's length, then, in another process, 800 × 10. `MiB` is the most memory such a process ever
took, its libraries and model included; `before` is what it had taken when the call began. The last
row is a run's directory scored by all lexical metrics, as `baco score` does it.
"""

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from baco.demo.world import aligned_examples
from baco.evaluation.metrics import metric, names
from baco.evaluation.plan import machine
from baco.evaluation.records import Prompt

PROMPTS, SAMPLES, MORE = 100, 10, 8
LEXICAL = names("lexical")
METRICS = (*LEXICAL, "embedding_distance", "vendi")
RUN = "a run, all lexical"
LIBRARIES = ("torch", "sacrebleu", "rapidfuzz", "sentence-transformers")
Material = tuple[list[Prompt], list[list[str]]]


def material(prompts: int, seed: int = 0) -> Material:
    """Prompts and their samples: the demo world's answers with words left out at random."""
    random_ = random.Random(seed)
    asked = [Prompt(str(i), ({"role": "user", "content": f"prompt {i}"},)) for i in range(prompts)]
    said = iter(aligned_examples(prompts * SAMPLES, seed))
    rows = [
        [
            " ".join(word for word in next(said)[1].split() if random_.random() < 0.95)
            for _ in range(SAMPLES)
        ]
        for _ in range(prompts)
    ]
    return asked, rows


def one_metric(name: str, prompts: int) -> Callable[[], object]:
    """A call that scores, its libraries and model loaded, none of its samples seen before."""
    figure = metric(name)
    figure.score(*material(1, seed=1))
    asked, rows = material(prompts)
    return lambda: figure.score(asked, rows)


def one_run(prompts: int, folder: Path) -> Callable[[], object]:
    """A call that scores the samples of a run's directory."""
    from baco.batch.job import append
    from baco.evaluation.plan import Plan
    from baco.evaluation.records import Sample, Setting
    from baco.evaluation.score import requested_metrics, score
    from baco.evaluation.store import begin, sample_line
    from baco.evaluation.tasks import Task

    asked, rows = material(prompts)
    task = Task("made", "made", tuple(asked))
    plan = Plan([], [task], [Setting("made", "made")], SAMPLES, 0)
    run = begin(folder / "run", plan.config(), {"made": asked})
    append(
        run.path / "samples.jsonl",
        (
            sample_line(
                Sample("made", "made", prompt.id, "made", "made", None, index, text, (),
                       len(text.split()), None, None, "stop", 0)
            )
            for prompt, row in zip(asked, rows, strict=True)
            for index, text in enumerate(row)
        ),
    )  # fmt: skip
    metrics = requested_metrics(run, LEXICAL, {})
    del asked, rows, task, plan
    return lambda: score(run, metrics, workers=1)


def peak() -> float:
    """The most memory this process ever took, in MiB."""
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return taken / (1024 * 1024 if sys.platform == "darwin" else 1024)


def measure(name: str, prompts: int) -> dict[str, float]:
    """Seconds and MiB of one call in this process."""
    with tempfile.TemporaryDirectory() as folder:
        call = one_run(prompts, Path(folder)) if name == RUN else one_metric(name, prompts)
        before, started = peak(), time.perf_counter()
        call()
        seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 3), "before": round(before), "peak": round(peak())}


def apart(name: str, prompts: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, __file__, "--one", name, str(prompts)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--one", nargs=2, metavar=("METRIC", "PROMPTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]))))
        return
    made = {
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "samples": SAMPLES,
        "metrics": {
            name: {str(count): apart(name, count) for count in (PROMPTS, PROMPTS * MORE)}
            for name in (*METRICS, RUN)
        },
    }
    print(json.dumps(made) if given.json else table(made))


def table(made: dict[str, Any]) -> str:
    """The figures as text."""
    versions = ", ".join(f"{name} {told}" for name, told in made["versions"].items())
    few, many = (f"{count} × {SAMPLES}" for count in (PROMPTS, PROMPTS * MORE))
    lines = [
        f"{made['machine']}; Python {made['python']}, {versions}",
        f"{'':20}{few:>26}{many:>26}",
        f"{'metric':20}" + 2 * f"{'seconds':>10}{'before':>8}{'MiB':>8}",
    ]
    for name, told in made["metrics"].items():
        cells = [told[str(count)] for count in (PROMPTS, PROMPTS * MORE)]
        figures = "".join("{seconds:10.2f}{before:8}{peak:8}".format(**cell) for cell in cells)
        lines.append(f"{name:20}{figures}")
    lexical = sum(made["metrics"][name][str(PROMPTS)]["seconds"] for name in LEXICAL)
    return "\n".join([*lines, f"all lexical metrics, {few}: {lexical:.2f} s"])


if __name__ == "__main__":
    main()
