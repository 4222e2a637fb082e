"""Measures every router and rival on a pair, on questions kept for this alone.

A *point* is a method at one setting: ten answers to each test question, judged. What it leaves is
numbers for every question (`measured.json`), from which `baco.evaluation.demo_pair.table` makes the
table.
"""

import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from baco.api import Baco
from baco.demo.memory import keep_memory
from baco.demo.world import Question, questions
from baco.demo.world.judge import judge
from baco.outputs import check_whole

QUESTIONS, ANSWERS = 40, 10
TEST_SEED = 20_261  # of the questions; never used for choosing the recipe
DECODING_SEEDS = (101, 202)
PLAIN = ("Base", "Aligned")  # labels of the halves alone under the shipped sampling


@dataclass(frozen=True, slots=True)
class Setting:
    """A method at one operating point: what `Baco.generate_batch` is asked for."""

    method: str
    router: str
    temperature: float = 1.0
    min_p: float = 0.1

    @property
    def label(self) -> str:
        """The setting as a reader would type it."""
        sampling = "" if self.temperature == 1 else f" T={self.temperature:g}"
        return self.router + sampling + ("" if self.min_p == 0.1 else f" min-p={self.min_p:g}")


@dataclass(slots=True)
class Point:
    """What a setting gave: for every decoding seed and question (lists [seeds][questions])."""

    method: str
    label: str
    quality: list[list[float]] = field(default_factory=list)  # mean over the answers, 0 to 1
    keys: list[list[float]] = field(default_factory=list)  # distinct keys / answers
    overlap: list[list[float]] = field(default_factory=list)  # 1 - mean Jaccard of word sets
    base_share: list[float] = field(default_factory=list)  # mean over all tokens, [seeds]


@dataclass(frozen=True, slots=True)
class Scored:
    """One judged answer."""

    quality: float
    key: str
    words: frozenset[str]


PROBABILITIES = (0.15, 0.3, 0.5, 0.7, 0.9)
ENTROPIES = (0.5, 1.0, 1.6, 2.3, 3.0)
GAPS = (0.2, 0.7, 1.2, 1.8, 2.5)
SINGLES = (
    *(Setting("base, temperature", "Base", t, 0.0) for t in (0.4, 0.7, 1.0, 1.3)),
    *(Setting("base, min-p", "Base", t) for t in (0.5, 1.0, 1.5, 2.0, 3.0)),
    *(Setting("base, min-p", "Base", 1.0, min_p) for min_p in (0.2, 0.4)),
    *(Setting("aligned, temperature", "Aligned", t, 0.0) for t in (0.7, 1.0, 1.5, 2.0)),
    *(Setting("aligned, min-p", "Aligned", t) for t in (1.0, 1.5, 2.0, 3.0)),
    *(Setting("aligned, min-p", "Aligned", t, 0.03) for t in (1.0, 2.0, 3.0)),
)


def settings() -> list[Setting]:
    """Every operating point of the table: five of each router, more of the single models."""
    grids: dict[str, Sequence[float]] = {
        "Nudging": PROBABILITIES,
        "Rand": PROBABILITIES,
        "P": PROBABILITIES,
        "H": ENTROPIES,
        "P-Punc": PROBABILITIES,
        "H-Punc": ENTROPIES,
        "P-FC": PROBABILITIES,
        "H-FC": ENTROPIES,
        "P-Punc-FC": PROBABILITIES,
        "Gap": GAPS,
    }
    return [
        *SINGLES,
        *(Setting(name, name) for name in ("Punc", "FC", "Punc-FC")),
        *(Setting(name, f"{name}:{value:g}") for name, grid in grids.items() for value in grid),
    ]


def distinct_keys(answers: Sequence[Scored]) -> float:
    """Distinct semantic keys over the number of answers; all unreadable ones are one key."""
    return len({answer.key for answer in answers}) / len(answers)


def word_overlap_diversity(answers: Sequence[Scored]) -> float:
    """One minus the mean Jaccard similarity of two answers' sets of lower-case words."""
    pairs = list(itertools.combinations([answer.words for answer in answers], 2))
    similar = sum(len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs)
    return 1.0 - similar / len(pairs)


def score(question: Question, text: str) -> Scored:
    """Judge one answer."""
    verdict = judge(question, text.strip())
    return Scored(verdict.quality, verdict.key, frozenset(text.lower().split()))


def add_seed(point: Point, answers: Sequence[Sequence[Scored]]) -> None:
    """Record the answers [questions][n] that one decoding seed gave."""
    point.quality.append([sum(a.quality for a in row) / len(row) for row in answers])
    point.keys.append([distinct_keys(row) for row in answers])
    point.overlap.append([word_overlap_diversity(row) for row in answers])


def mixtures(
    base: Sequence[Sequence[Scored]], aligned: Sequence[Sequence[Scored]], points: Sequence[Point]
) -> None:
    """Whole answers mixed: point m takes m of the base's answers and the rest of the aligned's."""
    for share, point in enumerate(points):
        rows = zip(base, aligned, strict=True)
        add_seed(point, [[*b[:share], *a[share:]] for b, a in rows])


class _Worker:
    """A process's own copy of the pair and the questions."""

    baco: Baco
    asked: list[Question]


def _start(pair: Path, asked: list[Question]) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    keep_memory()
    _Worker.baco = Baco.load(str(pair), max_rows=len(asked) * ANSWERS)
    _Worker.asked = asked


def _answer(setting: Setting) -> tuple[Point, list[list[list[Scored]]]]:
    """The point of a setting, and its answers [seeds][questions][n]."""
    point = Point(setting.method, setting.label)
    found = []
    for decoding_seed in DECODING_SEEDS:
        completions = _Worker.baco.generate_batch(
            [question.text for question in _Worker.asked],
            router=setting.router,
            n=ANSWERS,
            seed=decoding_seed,
            temperature=setting.temperature,
            min_p=setting.min_p,
        )
        check_whole([completion for row in completions for completion in row])
        answers = [
            [score(question, completion.text) for completion in row]
            for question, row in zip(_Worker.asked, completions, strict=True)
        ]
        add_seed(point, answers)
        flat = [completion for row in completions for completion in row]
        tokens = sum(len(completion.token_ids) for completion in flat)
        spoken = sum(completion.sources.count("base") for completion in flat)
        point.base_share.append(spoken / max(1, tokens))
        found.append(answers)
    return point, found


@contextmanager
def _answering(
    pair: Path, asked: list[Question], due: list[Setting], workers: int
) -> Iterator[Iterator[tuple[Point, list[list[list[Scored]]]]]]:
    """What `_answer` gives for every setting that is due, as it comes, in order."""
    if workers == 1:
        _start(pair, asked)
        yield map(_answer, due)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (pair, asked)) as pool:
        yield pool.map(_answer, due)


def measure(
    pair: Path,
    seed: int,
    advance: Callable[[float], None],
    count: int = QUESTIONS,
    plan: Sequence[Setting] | None = None,
    workers: int | None = None,
) -> None:
    """Answer `count` test questions at every setting; write `measured.json` into the pair's folder.

    Settings are shared out to `workers` processes, by default one a core; a single one is this
    very process. Points are kept as they come: a run that was cut off goes on with the next one.
    """
    asked, started = questions("test", count, TEST_SEED), time.monotonic()
    plan = settings() if plan is None else plan
    store = pair / "work" / "points.jsonl"
    store.parent.mkdir(exist_ok=True)
    points = _restore(store)
    plain: dict[str, list[list[list[Scored]]]] = {}
    due = [s for s in plan if s.label in PLAIN or (s.method, s.label) not in points]
    advance(1.0 - len(due) / len(plan))
    with _answering(pair, asked, due, workers or os.cpu_count() or 1) as found:
        for point, answers in found:
            points[point.method, point.label] = point
            _append(store, point)
            if point.label in PLAIN:
                plain[point.label] = answers
            advance(1 / len(plan))
    mixed = [Point("mixing", f"{share} of {ANSWERS} from base") for share in range(ANSWERS + 1)]
    if plain.keys() == set(PLAIN):
        for base, aligned in zip(plain["Base"], plain["Aligned"], strict=True):
            mixtures(base, aligned, mixed)
        points |= {(point.method, point.label): point for point in mixed}
    result = {
        "training_seed": seed,
        "decoding_seeds": DECODING_SEEDS,
        "questions": len(asked),
        "answers": ANSWERS,
        "families": [question.family for question in asked],
        "seconds": round(time.monotonic() - started, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "points": [asdict(point) for point in points.values()],
    }
    partial = pair / "measured.json.partial"
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(pair / "measured.json")


def _restore(store: Path) -> dict[tuple[str, str], Point]:
    points: dict[tuple[str, str], Point] = {}
    if store.exists():
        for line in store.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):
                point = Point(**json.loads(line))
                points[point.method, point.label] = point
    return points


def _append(store: Path, point: Point) -> None:
    with store.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(point)) + "\n")
