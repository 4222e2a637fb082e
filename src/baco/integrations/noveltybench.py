"""NoveltyBench's files, as its own programs write them (github.com/novelty-bench/novelty-bench).

    generations.jsonl   id, prompt, model, generations
    partitions.jsonl    the same, with partition and distinct
    scores.jsonl        the same, with generation_scores, partition_scores and utility
    summary.json        mean_distinct and mean_utility over all prompts

It knows the format alone: not how answers are classed or rated.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.files import write_atomic

GENERATIONS = 10  # answers to a prompt on the leaderboard
PATIENCE = 0.8


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One prompt with its answers, their classes and ratings.

    Attributes:
        id, prompt: as in the data set.
        model: the name of what answered.
        generations: the answers, in the order they were drawn.
        partition: the class of each, numbered in order of appearance.
        ratings: of each, 1 to 10.
    """

    id: str
    prompt: str
    model: str
    generations: Sequence[str]
    partition: Sequence[int]
    ratings: Sequence[float]

    @property
    def generation_scores(self) -> list[float]:
        """The ratings, 0 where an equivalent answer came before."""
        return [
            _number(rating) if number not in self.partition[:place] else 0
            for place, (number, rating) in enumerate(zip(self.partition, self.ratings, strict=True))
        ]

    @property
    def partition_scores(self) -> list[float]:
        """The rating of each class: that of its first answer."""
        return [
            score
            for place, score in enumerate(self.generation_scores)
            if self.partition[place] not in self.partition[:place]
        ]

    @property
    def utility(self) -> float:
        """The mean of the generation scores, weighted by a reader's patience."""
        weights = [PATIENCE**place for place in range(len(self.generations))]
        gained = map(float.__mul__, weights, map(float, self.generation_scores))
        return math.fsum(gained) / math.fsum(weights)


def write_submission(folder: Path, rows: Sequence[Evaluated]) -> dict[str, float]:
    """Write the four files of a submission.

    Returns:
        What summary.json holds.

    Raises:
        BacoError: the folder cannot be written.
    """
    generations, partitions, scores = [], [], []
    for row in rows:
        fields: dict[str, Any] = {
            "id": row.id,
            "prompt": row.prompt,
            "model": row.model,
            "generations": list(row.generations),
        }
        generations.append(_line(fields))
        # NoveltyBench's `distinct` is the last class's number, one less than the classes.
        fields |= {"partition": list(row.partition), "distinct": max(row.partition)}
        partitions.append(_line(fields))
        fields |= {
            "generation_scores": row.generation_scores,
            "partition_scores": row.partition_scores,
            "utility": row.utility,
        }
        scores.append(_line(fields))
    summary = {
        "mean_distinct": math.fsum(len(row.partition_scores) for row in rows) / len(rows),
        "mean_utility": math.fsum(row.utility for row in rows) / len(rows),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "generations.jsonl", "".join(generations))
        write_atomic(folder / "partitions.jsonl", "".join(partitions))
        write_atomic(folder / "scores.jsonl", "".join(scores))
        write_atomic(folder / "summary.json", json.dumps(summary, indent=2))
    except OSError as error:
        raise BacoError(f"cannot write to {folder}: {error.strerror}") from error
    return summary


def _line(fields: object) -> str:
    return json.dumps(fields) + "\n"


def _number(rating: float) -> float:
    return int(rating) if float(rating).is_integer() else rating
