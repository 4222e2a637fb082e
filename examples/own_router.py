"""A router of your own: one function decides which model writes the next word.

The rule is registered, calibrated, and compared with P-Punc: both take the threshold that gives
the wanted diversity, and answer the same prompt.
"""

import argparse
import sys
from typing import Any

import torch

from baco import Baco, BacoError, calibrate, register_router

EXAMPLE = "example: python examples/own_router.py --diversity 0.7"
PROMPTS = [  # to calibrate on; a few dozen of your own give a steadier threshold
    "Recommend a summer destination",
    "Give me a cosy dinner idea",
    "Write a short story",
    "Suggest a plan for the weekend",
]


def overlap(signals: Any, threshold: float) -> torch.Tensor:
    """base where the two models' next-token distributions overlap less than γ"""
    base, aligned = signals.base.softmax(-1), signals.aligned.softmax(-1)  # [B, V]
    return torch.minimum(base, aligned).sum(-1) < threshold  # [B]


register_router("Overlap", overlap, low=0, high=1, grid=(0.0, 0.1, 0.2, 0.4, 0.7, 1.0))


def main() -> None:
    """Answer a prompt with the rule and with P-Punc, at equal diversity."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("prompt", nargs="?", default=PROMPTS[0])
    parser.add_argument("--pair", default="demo", help="name or folder of a pair (demo)")
    parser.add_argument(
        "--diversity",
        type=float,
        default=0.5,
        help="0: that of the aligned model alone, 1: the most that a router gives (0.5)",
    )
    parser.add_argument("-n", type=int, default=4, help="answers to a prompt (4)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same answers (1)")
    args = parser.parse_args()
    if not 0 <= args.diversity <= 1:
        sys.exit(f"own_router: diversity is {args.diversity:g}: give a number from 0 to 1")
    try:
        pair = Baco.load(args.pair)
        for name in ("Overlap-Punc", "P-Punc"):
            curve = calibrate(pair, name, PROMPTS, samples=args.n, seed=args.seed)
            router = f"{name}:{curve.at_diversity(args.diversity):g}"
            answers = pair.generate(args.prompt, router=router, n=args.n, seed=args.seed)
            base_share = sum(answer.base_share or 0 for answer in answers) / len(answers)
            different = len({answer.text for answer in answers})
            print(f"{router}: base share {base_share:.0%}, {different} of {len(answers)} differ")
            for answer in answers:
                print(f"  {answer.text}")
    except BacoError as error:
        sys.exit(f"own_router: {error}")


if __name__ == "__main__":
    main()
