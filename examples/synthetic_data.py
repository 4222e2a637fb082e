"""Make many different rows from a few prompts, each with its provenance.

`baco batch` draws the answers into the folder OUT.answers. Stop it at any moment: the same command
continues where it was. Then the rows are written to OUT, one JSON object a line: unfinished and
repeated answers are left out, and every row has the pair, router and seed that reproduce it.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLE = "example: python examples/synthetic_data.py data.jsonl --pair qwen2.5-7b -n 64"
PROVENANCE = ("pair", "weights", "router", "seed", "params")


def main() -> None:
    """Draw answers, and write the rows that are different."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("out", type=Path, help="file of rows to write (JSON lines)")
    parser.add_argument(
        "--prompts",
        type=Path,
        default=Path(__file__).with_name("prompts.jsonl"),
        help='JSON lines with "prompt" or "messages", Parquet, or text with a prompt on each line',
    )
    parser.add_argument("--pair", default="demo", help="name or folder of a pair (demo)")
    parser.add_argument("--router", default="P-Punc:0.4", help="router and threshold (P-Punc:0.4)")
    parser.add_argument("-n", type=int, default=32, help="answers to draw for each prompt (32)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same rows (1)")
    args = parser.parse_args()
    if args.out.is_dir():
        sys.exit(f"synthetic_data: {args.out} is a folder: give a file to write")

    answers = args.out.with_name(args.out.name + ".answers")
    draw = [sys.executable, "-m", "baco", "batch", str(args.prompts), str(answers)]
    draw += ["--pair", args.pair, "--router", args.router, "-n", str(args.n)]
    draw += ["--seed", str(args.seed)]
    if code := subprocess.run(draw, check=False).returncode:
        sys.exit(code)  # baco has said why

    counts: Counter[str] = Counter()
    texts = set()
    partial = args.out.with_name(args.out.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row, finished in read_rows(answers):
            text = (str(row["prompt"]), words(row["text"]))
            kind = "unfinished" if not finished else "repeated" if text in texts else "different"
            counts[kind] += 1
            if kind == "different":
                texts.add(text)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(args.out)  # OUT is whole or not there
    print(
        f"{args.out}: {counts['different']} rows of {counts.total()} answers; left out: "
        f"{counts['repeated']} repeated, {counts['unfinished']} unfinished"
    )


def read_rows(answers: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every answer of a batch with its provenance, and whether it is finished."""
    for shard in sorted(answers.glob("*.jsonl")):
        with shard.open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                for number, sample in enumerate(record["samples"]):
                    provenance = {name: record[name] for name in PROVENANCE}
                    provenance |= {"sample": number, "base_share": sample["base_share"]}
                    row = {
                        "id": f"{record['id']}-{number}",
                        "prompt": record["prompt"],
                        "text": sample["text"],
                        "provenance": provenance,
                    }
                    yield row, sample["finish_reason"] == "stop"


def words(text: str) -> str:
    """The text in lower case without punctuation and extra white space, to find repetitions."""
    return " ".join(re.findall(r"\w+", text.casefold()))


if __name__ == "__main__":
    main()
