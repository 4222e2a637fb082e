"""How long scoring takes, and whether its memory stays flat.

    python -m benchmarks.metrics [--json]

Every figure is of one call in a process of its own: a metric scores 100 prompts × 10 samples of the
demo pair's length, then, in another process, 800 × 10. `MiB` is the peak memory of such a process,
with libraries and model; `before` is its peak when the call began. The last row is a run's folder
scored by all lexical metrics, as `baco score` does it.
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
from benchmarks import launch

PROMPTS, SAMPLES, MORE = 100, 10, 8
LEXICAL = names("lexical")
METRICS = (*LEXICAL, "embedding_distance", "vendi")
RUN = "a run, all lexical"
LIBRARIES = ("torch", "sacrebleu", "rapidfuzz", "sentence-transformers")
Material = tuple[list[Prompt], list[list[str]]]


def material(prompts: int, seed: int = 0) -> Material:
    """Prompts and their samples: the demo world's answers with words left out at random."""
    random_ = random.Random(seed)
    prompt_list = [
        Prompt(str(i), ({"role": "user", "content": f"prompt {i}"},)) for i in range(prompts)
    ]
    examples = iter(aligned_examples(prompts * SAMPLES, seed))
    rows = [
        [
            " ".join(word for word in next(examples)[1].split() if random_.random() < 0.95)
            for _ in range(SAMPLES)
        ]
        for _ in range(prompts)
    ]
    return prompt_list, rows


def one_metric(name: str, prompts: int) -> Callable[[], object]:
    """A call that scores new samples, with its libraries and model already loaded."""
    figure = metric(name)
    figure.score(*material(1, seed=1))
    prompt_list, rows = material(prompts)
    return lambda: figure.score(prompt_list, rows)


def one_run(prompts: int, folder: Path) -> Callable[[], object]:
    """A call that scores the samples of a run's directory."""
    from baco.batch.job import append
    from baco.evaluation.plan import Plan
    from baco.evaluation.records import Sample, Setting
    from baco.evaluation.score import requested_metrics, score
    from baco.evaluation.store import begin, sample_line
    from baco.evaluation.tasks import Task

    prompt_list, rows = material(prompts)
    task = Task("made", "made", tuple(prompt_list))
    plan = Plan([], [task], [Setting("made", "made")], SAMPLES, 0)
    run = begin(folder / "run", plan.config(), {"made": prompt_list})
    append(
        run.path / "samples.jsonl",
        (
            sample_line(
                Sample("made", "made", prompt.id, "made", "made", None, index, text, (),
                       len(text.split()), None, None, "stop", 0)
            )
            for prompt, row in zip(prompt_list, rows, strict=True)
            for index, text in enumerate(row)
        ),
    )  # fmt: skip
    metrics = requested_metrics(run, LEXICAL, {})
    del prompt_list, rows, task, plan
    return lambda: score(run, metrics, workers=1)


def peak() -> float:
    """Peak memory of this process, in MiB."""
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
    """The same as `measure`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.metrics", "--one", name, str(prompts)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--one", nargs=2, metavar=("METRIC", "PROMPTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]))))
        return
    report = {
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "samples": SAMPLES,
        "metrics": {
            name: {str(count): apart(name, count) for count in (PROMPTS, PROMPTS * MORE)}
            for name in (*METRICS, RUN)
        },
    }
    print(json.dumps(report) if given.json else table(report))


def table(report: dict[str, Any]) -> str:
    """The figures as text."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    small, large = (f"{count} × {SAMPLES}" for count in (PROMPTS, PROMPTS * MORE))
    lines = [
        f"{report['machine']}; Python {report['python']}, {versions}",
        f"{'':20}{small:>26}{large:>26}",
        f"{'metric':20}" + 2 * f"{'seconds':>10}{'before':>8}{'MiB':>8}",
    ]
    for name, by_prompts in report["metrics"].items():
        cells = [by_prompts[str(count)] for count in (PROMPTS, PROMPTS * MORE)]
        figures = "".join("{seconds:10.2f}{before:8}{peak:8}".format(**cell) for cell in cells)
        lines.append(f"{name:20}{figures}")
    lexical = sum(report["metrics"][name][str(PROMPTS)]["seconds"] for name in LEXICAL)
    return "\n".join([*lines, f"all lexical metrics, {small}: {lexical:.2f} s"])


if __name__ == "__main__":
    launch(main)
