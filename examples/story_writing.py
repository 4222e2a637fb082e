"""Write a story with several thresholds, and show which model wrote which word.

The words of the base model are underlined in a terminal, and in [brackets] elsewhere. A higher
threshold gives it more words.
"""

import argparse
import sys

from baco import Baco, BacoError

EXAMPLE = 'example: python examples/story_writing.py "Write a story" --thresholds 0.2 0.6'
BASE, END = ("\x1b[4;36m", "\x1b[0m") if sys.stdout.isatty() else ("[", "]")


def main() -> None:
    """Write one story for each threshold."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("prompt", nargs="?", default="Write a short story")
    parser.add_argument("--pair", default="demo", help="name or folder of a pair (demo)")
    parser.add_argument("--router", default="P-Punc", help="router without threshold (P-Punc)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.4, 0.7])
    parser.add_argument("--max-tokens", type=int, default=400, help="longest story (400)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same stories (1)")
    args = parser.parse_args()
    try:
        pair = Baco.load(args.pair)
        for threshold in args.thresholds:
            router = f"{args.router}:{threshold:g}"
            print(f"--- {router}")
            write_story(pair, args.prompt, router, args.max_tokens, args.seed)
    except BacoError as error:
        sys.exit(f"story_writing: {error}")


def write_story(pair: Baco, prompt: str, router: str, max_tokens: int, seed: int) -> None:
    """Print a story while it is written, and then how much of it the base model wrote."""
    by_base = False
    for chunk in pair.stream(prompt, router=router, max_tokens=max_tokens, seed=seed):
        for piece in chunk.pieces:
            text = piece.text
            if (piece.source == "base") != by_base:
                word = text.lstrip()
                space = text.removesuffix(word)
                by_base = not by_base
                text = f"{space}{BASE}{word}" if by_base else f"{END}{text}"
            print(text, end="", flush=True)
        if chunk.completion is not None:
            print(END if by_base else "")
            share = chunk.completion.base_share  # None where a combiner mixes both models
            print("mixed\n" if share is None else f"base share {share:.0%}\n")


if __name__ == "__main__":
    main()
