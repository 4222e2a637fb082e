"""What a pair with different tokenizers costs beside its forwards.

    python -m benchmarks.two_tokenizers --base FOLDER --aligned FOLDER [-r P-Punc:0.4] [-n 1 8]

For each number of samples: time per character of the answers, and its ratio to the time of the
forwards alone, both of one run; the share of encoding; the share of the tokens read that were
rolled back. Each model alone decodes the same prompts for comparison.
"""

import argparse
import time
from typing import Any

from baco import Baco
from benchmarks import launch

PROMPTS = (
    "Recommend a summer destination",
    "Write the opening of a short story about a lighthouse",
    "Give me three ideas for a birthday present",
)


def measure(baco: Baco, router: str, n: int, max_tokens: int) -> str:
    """One line of figures, over all prompts."""
    decoder, characters = baco.decoder(), 0
    stats: Any = decoder.engine.stats
    forwards = 0.0
    for cache in stats.caches.values():
        extend = cache.extend

        def timed(*args: Any, extend: Any = extend, **keywords: Any) -> Any:
            nonlocal forwards
            began = time.perf_counter()
            logits = extend(*args, **keywords)
            forwards += time.perf_counter() - began
            return logits

        cache.extend = timed
    seconds = reading = 0.0
    for prompt in PROMPTS:
        decoder.submit(prompt, router=baco.router(router), n=n, seed=1, max_tokens=max_tokens)
        decoder.step()  # reads the prompt, which other forwards do
        began, before = time.perf_counter(), forwards
        while decoder.busy:
            for chunk in decoder.step():
                characters += len(chunk.text)
        seconds += time.perf_counter() - began
        reading += forwards - before
    counts = stats.forwards
    return (
        f"{router:12} n={n}  {1000 * seconds / characters:6.2f} ms/character  "
        f"{seconds / reading:.3f} × its forwards  "
        f"encoding {stats.encoding.seconds / seconds:.2%}  "
        f"rolled back {stats.rolled_back / max(stats.read, 1):.2%} of {stats.read}  "
        f"whole {stats.encoding.whole}  forwards base {counts['base']} aligned {counts['aligned']}"
    )


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options of a measurement of a pair with two tokenizers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", required=True)
    parser.add_argument("--aligned", required=True)
    parser.add_argument("-r", "--router", default="P-Punc:0.4")
    parser.add_argument("-n", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-tokens", type=int, default=48)
    return parser


def main() -> None:
    """Measure and print."""
    given = argument_parser(__doc__.splitlines()[0]).parse_args()
    baco = Baco.load(base=given.base, aligned=given.aligned, separate_tokenizers=True)
    for n in given.n:
        for router in ("Base", "Aligned", given.router):
            print(measure(baco, router, n, given.max_tokens), flush=True)


if __name__ == "__main__":
    launch(main)
