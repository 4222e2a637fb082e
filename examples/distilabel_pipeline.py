"""Use a pair as a step of a distilabel pipeline: n answers a row, with what each model wrote.

It needs: pip install baco distilabel requests; with --schema also 'baco[structured]'
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from baco import Baco, BacoError, SamplingParams

try:
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts, Step, StepInput
    from pydantic import PrivateAttr
except ImportError:  # --help works without it
    Pipeline = None

EXAMPLE = "example: python examples/distilabel_pipeline.py data.jsonl -n 8 --router P-Punc:0.4"
PROMPTS = (
    "Recommend a summer destination",
    "What should I cook tonight?",
    "Suggest a present for a friend who likes music",
)

if Pipeline is not None:

    class PairGeneration(Step):  # type: ignore[misc]
        """Answers of a pair to the column ``instruction``: one row for each answer.

        Attributes:
            pair, router, n, seed: as in ``baco generate``.
            json_schema: JSON text that every answer follows; empty for free text.
        """

        pair: str = "demo"
        router: str = "P-Punc:0.4"
        n: int = 4
        seed: int = 1
        json_schema: str = ""
        _baco: Any = PrivateAttr(None)

        def load(self) -> None:
            """Load the pair in the process of this step."""
            super().load()
            self._baco = Baco.load(self.pair)

        @property
        def inputs(self) -> list[str]:
            """The column that is read."""
            return ["instruction"]

        @property
        def outputs(self) -> list[str]:
            """The columns that are added."""
            return ["generation", "sample", "finish_reason", "base_share", "spans"]

        def process(self, inputs: StepInput) -> Any:
            """Answer a batch of rows."""
            rows = []
            for row in inputs:
                answers = self._baco.generate(
                    row["instruction"],
                    router=self.router,
                    n=self.n,
                    seed=self.seed,
                    schema=self.json_schema or None,
                )
                rows += [row | _columns(sample, answer) for sample, answer in enumerate(answers)]
            yield rows


def _columns(sample: int, answer: Any) -> dict[str, Any]:
    return {
        "generation": answer.text,
        "sample": sample,
        "finish_reason": answer.finish_reason,
        "base_share": answer.base_share,
        "spans": [{"text": piece.text, "source": piece.source} for piece in answer.pieces],
    }


def main() -> None:
    """Run the pipeline and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("out", type=Path, help="file to write, JSON lines")
    parser.add_argument("--pair", default="demo", help="a known pair or a folder (demo)")
    parser.add_argument("--router", default="P-Punc:0.4", help="with a threshold (P-Punc:0.4)")
    parser.add_argument("-n", type=int, default=4, help="answers to each prompt (4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of all answers (1)")
    parser.add_argument("--schema", type=Path, help="file with a JSON schema for every answer")
    args = parser.parse_args()
    if Pipeline is None:
        sys.exit("distilabel_pipeline: distilabel is missing: pip install distilabel requests")
    schema = ""
    try:
        if args.schema:
            schema = args.schema.read_text(encoding="utf-8")
            SamplingParams(schema=schema)
    except OSError as error:
        sys.exit(f"distilabel_pipeline: {args.schema}: {error.strerror}")
    except BacoError as error:
        sys.exit(f"distilabel_pipeline: {args.schema}: {error}")
    with Pipeline(name="pair") as pipeline:
        prompts = LoadDataFromDicts(data=[{"instruction": prompt} for prompt in PROMPTS])
        answers = PairGeneration(
            pair=args.pair, router=args.router, n=args.n, seed=args.seed, json_schema=schema
        )
        prompts >> answers
    rows = pipeline.run(use_cache=False)["default"]["train"].to_list()
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = {(row["instruction"], row["generation"]) for row in rows}
    print(f"{args.out}: {len(rows)} rows, {len(texts)} different")


if __name__ == "__main__":
    main()
