"""Evaluate a pair in Inspect (inspect_ai) through its OpenAI API: accuracy, and distinct answers.

Without --url the script starts `baco serve` for the pair and ends it afterwards.
It needs: pip install 'baco[serve]' openai inspect-ai
"""

import argparse
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from openai_client import serving

EXAMPLE = "example: python examples/inspect_eval.py --routers Aligned P-Punc:0.4"
# A text that a right answer has; none where any answer is fine.
QUESTIONS = {
    "What is the capital of Norway?": "Oslo",
    "What is the capital of Italy?": "Rome",
    "Recommend a summer destination": "",
}


def main() -> None:
    """Evaluate every router, on a running server or one that is started."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--url", help="address of a server that runs")
    parser.add_argument("--pair", default="demo", help="pair of the server to start (demo)")
    parser.add_argument(
        "--routers",
        nargs="+",
        default=["Aligned", "P-Punc:0.4"],
        help="routers with thresholds (Aligned P-Punc:0.4)",
    )
    parser.add_argument("-n", type=int, default=4, help="answers to each question (4)")
    parser.add_argument("--logs", help="folder for Inspect's logs, for `inspect view`")
    args = parser.parse_args()
    try:
        import inspect_ai  # noqa: F401
    except ImportError:
        sys.exit("inspect_eval: Inspect is missing: pip install inspect-ai")
    with (
        nullcontext(args.url) if args.url else serving(args.pair) as url,
        nullcontext(args.logs) if args.logs else tempfile.TemporaryDirectory() as logs,
    ):
        for router in args.routers:
            report(router, evaluate(url, router, args.n, logs))


def evaluate(url: str, router: str, n: int, logs: str) -> Any:
    """Inspect's log of n answers to every question."""
    from inspect_ai import Epochs, Task
    from inspect_ai import eval as run
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    model = get_model(
        f"openai-api/baco/baco/{router}",  # the router is a part of the model's name
        base_url=f"{url.rstrip('/')}/v1",
        api_key=os.environ.get("BACO_API_KEY", "none"),
    )
    samples = [Sample(input=text, target=target) for text, target in QUESTIONS.items()]
    # No seed: each epoch asks again, and equal seeds would give equal answers.
    task = Task(MemoryDataset(samples), solver=generate(), scorer=includes())
    (log,) = run(task, model=model, epochs=Epochs(n), log_dir=logs, display="none")
    if log.status != "success":
        error = log.error.message if log.error else log.status
        sys.exit(f"inspect_eval: {url}: {' '.join(error.split())[:300]}")
    return log


def report(router: str, log: Any) -> None:
    """Print the accuracy, and how many answers to each question differ."""
    accuracy = log.results.scores[0].metrics["accuracy"].value
    answers: dict[str, list[str]] = {}
    for sample in log.samples:
        answers.setdefault(sample.input, []).append(sample.output.completion)
    print(f"{router}: accuracy {accuracy:.2f}")
    for question, texts in answers.items():
        print(f"  {len(set(texts))} of {len(texts)} differ: {question}")


if __name__ == "__main__":
    main()
