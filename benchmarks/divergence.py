"""How often bfloat16 answers part from plain decoding's, and whether each parting is a tie.

    python benchmarks/divergence.py [--pair body:50m | FOLDER] [--unpacked] [--json]

The pair is decoded in bfloat16 twice, plainly (one row, one token a forward, nothing drafted) and
as the engine decodes; what parts is judged by :mod:`baco.bench.divergence`. With ``--unpacked`` the
plain way runs weights and forward of `transformers`, as the naive loop of `baco bench` does.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from baco import Baco
from baco.bench.bodies import make
from baco.bench.divergence import Report, compare
from baco.demo.world import questions


def exact(folder: str) -> Baco:
    """The pair with the very numbers of bfloat16, summed in float32."""
    baco = Baco.load(folder, dtype="bfloat16", packed=False)
    for half in (baco.pair.base, baco.pair.aligned):
        half.model.float()
    return baco


def show(report: Report, *, router: str, temperature: float) -> None:
    """One row of figures, and one for every parting."""
    print(
        f"{router}, temperature {temperature:g}: {report.samples} samples, {report.tokens} tokens, "
        f"{len(report.partings)} part ({report.per_thousand:.2f} per 1,000 tokens), "
        f"{report.ties} of them ties"
    )
    print(
        f"  rounding of logits: base {report.rounding['base']:.4f}, aligned "
        f"{report.rounding['aligned']:.4f}; log-probabilities off by {report.off['plain']:.4f} "
        f"plain, {report.off['fast']:.4f} drafted and batched"
    )
    for one in report.partings:
        gap = "sources differ" if one.gap is None else f"gap {one.gap:.4f}"
        print(
            f"  prompt {one.prompt} sample {one.sample} at {one.position}: {one.plain} or "
            f"{one.fast}, {gap}, seen {one.seen[0]:.1%} and {one.seen[1]:.1%}"
        )


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", default="body:50m", help="KIND:SIZE to make, or a folder")
    parser.add_argument("--router", action="append", help="may be given again")
    parser.add_argument("--temperature", action="append", type=float, help="may be given again")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unpacked", action="store_true", help="next to transformers' forward")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = asked.pair
        if not Path(folder).is_dir():
            kind, _, size = folder.partition(":")
            folder = str(make(kind, size, Path(made), torch.bfloat16))
        fast, slow = Baco.load(folder, dtype="bfloat16"), exact(folder)
        theirs = None
        if asked.unpacked:
            theirs = Baco.load(folder, dtype="bfloat16", packed=False).pair
    prompts = [question.text for question in questions("dev", asked.prompts, 0)]
    told: list[dict[str, Any]] = []
    for router in asked.router or ["P-Punc:0.4"]:
        for temperature in asked.temperature or [1.0, 0.0]:
            sampling = {"seed": asked.seed, "temperature": temperature, "n": asked.n}
            sampling["max_tokens"] = asked.max_tokens
            pairs, parsed = (fast.pair, slow.pair), fast.router(router)
            report = compare(*pairs, prompts, parsed, unpacked=theirs, **sampling)
            told.append({"router": router, "temperature": temperature, **asdict(report)})
            if not asked.json:
                show(report, router=router, temperature=temperature)
    if asked.json:
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
