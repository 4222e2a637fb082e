"""What a dataset holds, in figures: validity, duplicates, diversity, openings, overused words.

All rows are read once, as a stream. Counts, validity and duplicates are of all rows. The other
figures are of a sample: the `SAMPLE` answers and the `PROMPTS` prompts with the smallest hashes. So
a dataset always has the same sample, and two datasets with the same prompts are compared on the
same ones.
"""

import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from baco.dataset.files import Answer, Dataset
from baco.dataset.near_duplicates import Rule, find_duplicates, read_index, write_index
from baco.errors import BacoError, one_line
from baco.evaluation.answer_files import AnswerFile
from baco.evaluation.answer_scores import AnswerScores, against, score_answers
from baco.evaluation.indicators import Comparison, Estimate
from baco.evaluation.metrics import MetricUnavailable
from baco.evaluation.records import Prompt
from baco.text.phrases import load_phrases
from baco.text.segmentation import bare_words, distinct

SAMPLE, PROMPTS, ANSWERS_A_PROMPT = 10_000, 100, 8
# Answers whose words are pooled, and those that are embedded.
POOLED, EMBEDDED = 2000, 300
LONGEST_OPENING, SHOWN, LONGEST_GROUP = 12, 10, 5
LEXICAL = ("distinct_1", "distinct_2", "distinct_3")
SEMANTIC = ("embedding_distance", "vendi")
NOT_JSON = object()
Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Values:
    """The values of a field of answers that are JSON objects.

    Attributes:
        name: its key; those of nested objects are joined by dots.
        present: share of the sampled objects that have it.
        distinct: number of distinct values.
        entropy: of the values, in nats.
        top: the most frequent values with their shares of all values.
        mean: of numbers; None for other values, and where it is beyond floating point.
    """

    name: str
    present: float
    distinct: int
    entropy: float
    top: Sequence[tuple[str, float]]
    mean: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """A dataset in figures.

    Attributes:
        name: of the dataset.
        rows, prompts: their numbers; rows are answers.
        fewest, most: answers to a prompt.
        unfinished: share of the rows whose finish_reason is not ``stop``; None without the column.
        base_share: mean over rows; None without the column.
        words: mean number of words of an answer.
        json: share of the rows that are a JSON object or list.
        valid: share of the rows that fit the schema; None without one.
        faults: the most frequent reasons why rows do not fit, with their numbers.
        exact, near: shares of the rows that repeat an earlier one, exactly or nearly.
        groups: the largest groups of duplicates: number of answers, the first of them.
        pooled: distinct-n of pooled answers, by n.
        slop: phrases that aligned models overuse, per 1,000 words.
        phrases: the most frequent of them, per 1,000 words.
        openings: the most frequent first k words, by k, with their share of the sampled answers.
        shared_words: mean number of first words that two answers to a prompt share.
        fields: of the answers that are JSON objects.
        lengths: of the sampled answers, in words.
        spread: embedding_distance and vendi over pooled answers; empty without an embedding model.
        scores: means over sampled prompts of diversity metrics, with intervals.
    """

    name: str
    rows: int
    prompts: int
    fewest: int
    most: int
    unfinished: float | None
    base_share: float | None
    words: float
    json: float
    valid: float | None
    faults: Sequence[tuple[str, int]]
    exact: float
    near: float
    groups: Sequence[tuple[int, str]]
    pooled: Mapping[int, float]
    slop: float
    phrases: Mapping[str, float]
    openings: Sequence[tuple[int, str, float]]
    shared_words: float | None
    fields: Sequence[Values]
    lengths: Sequence[int]
    spread: Mapping[str, float]
    scores: Mapping[str, Estimate | None]


@dataclass(frozen=True, slots=True)
class Report:
    """A dataset, and a baseline if there is one.

    Attributes:
        figures: of the dataset.
        baseline: of the other one.
        differences: of the scores, dataset minus baseline, on the prompts of both.
        unavailable: why figures are missing.
    """

    figures: Figures
    baseline: Figures | None
    differences: Mapping[str, Comparison | None]
    unavailable: str | None


@dataclass
class _Observer:
    """What one pass over the rows finds."""

    check: Callable[[Any], str | None] | None
    rows: int = 0
    json: int = 0
    valid: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    finished: Counter[bool] = field(default_factory=Counter)
    base_shares: list[float] = field(default_factory=lambda: [0.0, 0.0])  # their sum and number
    sample: dict[int, str] = field(default_factory=dict)  # texts by hash
    prompts: dict[int, tuple[str, list[str]]] = field(default_factory=dict)  # by hash

    def watch(self, answers: Iterator[Answer]) -> Iterator[Answer]:
        """The same answers, each of which is looked at."""
        for answer in answers:
            self._look(answer)
            yield answer

    def _look(self, answer: Answer) -> None:
        self._validate(answer.text)
        if isinstance(reason := answer.row.get("finish_reason"), str):
            self.finished[reason == "stop"] += 1
        share = _share(answer.row.get("base_share"))
        if share is not None:
            self.base_shares[0] += share
            self.base_shares[1] += 1
        self.sample[_hash(str(self.rows))] = answer.text
        _prune(self.sample, SAMPLE)
        place = _hash(answer.prompt)
        if len(texts := self.prompts.setdefault(place, (answer.prompt, []))[1]) < ANSWERS_A_PROMPT:
            texts.append(answer.text)
        _prune(self.prompts, PROMPTS)
        self.rows += 1

    def _validate(self, text: str) -> None:
        value = parsed(text)
        self.json += isinstance(value, dict | list)
        if self.check is not None:
            fault = "not JSON" if value is NOT_JSON else self.check(value)
            if fault is None:
                self.valid += 1
            elif fault in self.faults or len(self.faults) < SAMPLE:
                self.faults[fault] += 1

    def texts(self) -> list[str]:
        """The sampled answers."""
        return [self.sample[place] for place in sorted(self.sample)[:SAMPLE]]

    def answers(self, count: int) -> list[tuple[str, list[str]]]:
        """The sampled prompts with several answers, `count` of each."""
        chosen = [self.prompts[place] for place in sorted(self.prompts)[:PROMPTS]]
        return [(prompt, texts[:count]) for prompt, texts in chosen if len(texts) > 1]

    @property
    def fewest(self) -> int:
        """The fewest answers of the sampled prompts with several."""
        return min((len(texts) for _, texts in self.answers(ANSWERS_A_PROMPT)), default=0)


def _share(value: Any) -> float | None:
    """A base share, which CSV holds as a text; None for anything that is not from 0 to 1."""
    try:
        share = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return share if 0 <= share <= 1 else None


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _prune(kept: dict[int, Any], count: int) -> None:
    """Remove the largest keys of a sample that has become too large."""
    if len(kept) > 2 * count:
        for place in sorted(kept)[count:]:
            del kept[place]


def parsed(text: str) -> Any:
    """The value of a JSON text; `NOT_JSON` for any other text."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NOT_JSON


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def schema_check(path: Path) -> Callable[[Any], str | None]:
    """A function that says why a value does not fit a JSON schema; None where it does.

    Raises:
        BacoError: the file cannot be read or is not a schema, or the library is not installed.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise BacoError("a schema needs a library: pip install 'baco[dataset]'") from error
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
        kind = validator_for(schema)
        kind.check_schema(schema)
    except OSError as error:
        raise BacoError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, SchemaError, AttributeError, TypeError) as error:
        reason = error.message if isinstance(error, SchemaError) else one_line(error)
        raise BacoError(f"{path} is not a JSON schema: {reason}") from error
    validator = kind(schema, registry=Registry())  # it retrieves no schema from the network

    def check(value: Any) -> str | None:
        try:
            error = next(iter(validator.iter_errors(value)), None)
        except (Unresolvable, RecursionError, re.error) as failure:
            raise BacoError(f"{path} cannot be checked: {one_line(failure)}") from failure
        return None if error is None else f"{error.json_path}: {error.validator}"

    return check


def make_report(
    dataset: Dataset,
    baseline: Dataset | None,
    rule: Rule,
    check: Callable[[Any], str | None] | None,
    models: Mapping[str, str],
    advance: Advance,
) -> Report:
    """Measure a dataset, and a baseline in the same way.

    Args:
        dataset: any dataset.
        baseline: one to compare it with, such as the aligned model alone.
        rule: what is a duplicate.
        check: of `schema_check`.
        models: of the metrics, by role.
        advance: receives numbers of rows that were read.

    Raises:
        BacoError: a dataset that cannot be read or has no rows.
    """
    every = [dataset] if baseline is None else [dataset, baseline]
    seen = [_observe(each, rule, check, advance) for each in every]
    # Diversity depends on the number of answers: both have as many.
    pooled = min(len(observer.texts()) for observer, _ in seen)
    count = min(observer.fewest for observer, _ in seen)
    files = [
        _answer_file(str(each.path), observer, count)
        for each, (observer, _) in zip(every, seen, strict=True)
    ]
    unavailable = None
    scores: list[list[AnswerScores]] = [[] for _ in every]
    spreads: list[dict[str, float]] = [{} for _ in every]
    for names in (LEXICAL, SEMANTIC):
        try:
            rows = [
                score_answers(file, names, models) if file is not None else [] for file in files
            ]
            if names == SEMANTIC and pooled > 1:
                spreads = [_spread(o.texts()[: min(pooled, EMBEDDED)], models) for o, _ in seen]
        except MetricUnavailable as error:
            unavailable = str(error)
            continue
        scores = [before + more for before, more in zip(scores, rows, strict=True)]
    measured = [
        _figures(str(each.path), observer, duplicates, pooled, spread, row)
        for each, (observer, duplicates), spread, row in zip(
            every, seen, spreads, scores, strict=True
        )
    ]
    differences: dict[str, Comparison | None] = {}
    if len(files) == 2 and files[0] is not None and files[1] is not None:
        for own, other in zip(*scores, strict=True):
            differences[own.metric] = against(files[0], own, files[1], other)
    return Report(measured[0], measured[1] if len(measured) > 1 else None, differences, unavailable)


def _observe(
    dataset: Dataset, rule: Rule, check: Callable[[Any], str | None] | None, advance: Advance
) -> tuple[_Observer, dict[str, Any]]:
    """One pass over a dataset, and its duplicates."""
    observer = _Observer(check)
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        write_index(index, observer.watch(iter(dataset)), advance)
        if not observer.rows:
            raise BacoError(f"{dataset.path} holds no rows")
        items = read_index(index)
        duplicates = find_duplicates(items, rule)
        removed = duplicates.removed
        exact = float((removed & duplicates.exact).mean())
        kept, sizes = np.unique(duplicates.kept, return_counts=True)
        largest = [place for place in np.argsort(-sizes, kind="stable") if sizes[place] > 1]
        groups = {int(kept[place]): int(sizes[place]) for place in largest[:LONGEST_GROUP]}
        _, answers = np.unique(items["prompt"], return_counts=True)
        figures = {
            "prompts": len(answers),
            "fewest": int(answers.min()),
            "most": int(answers.max()),
            "words": float(items["words"].mean()),
            "exact": exact,
            "near": float(removed.mean()) - exact,
        }
        del items
    texts: dict[int, str] = {}
    if groups:
        last = max(groups)
        for place, answer in enumerate(dataset):
            if place in groups:
                texts[place] = answer.text
            if place == last:
                break
    return observer, figures | {"groups": [(size, texts[at]) for at, size in groups.items()]}


def _answer_file(name: str, observer: _Observer, count: int) -> AnswerFile | None:
    """The sampled prompts with their answers; None where no prompt has several."""
    rows = observer.answers(count) if count > 1 else []
    if not rows:
        return None
    prompts = [
        Prompt(str(number), ({"role": "user", "content": prompt},))
        for number, (prompt, _) in enumerate(rows)
    ]
    return AnswerFile(name, prompts, [texts for _, texts in rows])


def _spread(texts: Sequence[str], models: Mapping[str, str]) -> dict[str, float]:
    """Semantic metrics of pooled answers, as if all were answers to one prompt."""
    file = AnswerFile("", [Prompt("", ({"role": "user", "content": "?"},))], [texts])
    return {score.metric: float(score.values[0]) for score in score_answers(file, SEMANTIC, models)}


def _figures(
    name: str,
    observer: _Observer,
    duplicates: Mapping[str, Any],
    pooled: int,
    spread: Mapping[str, float],
    scores: Sequence[AnswerScores],
) -> Figures:
    texts, rows = observer.texts(), observer.rows
    words = [bare_words(text) for text in texts]
    total = max(1, sum(map(len, words)))
    slop = load_phrases(None)
    phrases = Counter(" ".join(phrase.split()) for text in texts for phrase in slop.matches(text))
    total_share, shares = observer.base_shares
    finished = observer.finished
    return Figures(
        name=name,
        rows=rows,
        unfinished=finished[False] / finished.total() if finished else None,
        base_share=total_share / shares if shares else None,
        json=observer.json / rows,
        valid=None if observer.check is None else observer.valid / rows,
        faults=observer.faults.most_common(SHOWN),
        pooled={n: distinct(texts[: min(pooled, POOLED)], n) for n in (1, 2, 3)},
        slop=1000 * phrases.total() / total,
        phrases={text: 1000 * count / total for text, count in phrases.most_common(SHOWN)},
        openings=_openings(words),
        shared_words=_shared_words([row for _, row in observer.answers(ANSWERS_A_PROMPT)]),
        fields=_fields([value for text in texts if isinstance(value := parsed(text), dict)]),
        lengths=[len(row) for row in words],
        spread=spread,
        scores={score.metric: score.estimate for score in scores},
        **duplicates,
    )


def _openings(words: Sequence[Sequence[str]]) -> list[tuple[int, str, float]]:
    """The most frequent first k words of the answers, for every k that two answers share."""
    openings = []
    for size in range(1, LONGEST_OPENING + 1):
        counts = Counter(tuple(row[:size]) for row in words if len(row) >= size)
        if not counts or (most := counts.most_common(1)[0])[1] < 2:
            break
        openings.append((size, " ".join(most[0]), most[1] / len(words)))
    return openings


def _shared_words(answers: Sequence[Sequence[str]]) -> float | None:
    """Mean over prompts, and over pairs of answers to one, of the first words that both share."""
    means = []
    for texts in answers:
        rows = [bare_words(text) for text in texts]
        shared = [
            sum(1 for _ in takewhile(bool, map(str.__eq__, a, b))) for a, b in combinations(rows, 2)
        ]
        means.append(sum(shared) / len(shared))
    return sum(means) / len(means) if means else None


def _fields(objects: Sequence[Mapping[str, Any]]) -> list[Values]:
    """The values of every field, those of most objects first."""
    values: dict[str, list[Any]] = {}
    for value in objects:
        for name, leaf in _leaves(value):
            values.setdefault(name, []).append(leaf)
    fields = []
    for name, leaves in sorted(values.items(), key=lambda item: (-len(item[1]), item[0])):
        counts = Counter(leaf if isinstance(leaf, str) else json.dumps(leaf) for leaf in leaves)
        total = len(leaves)
        numbers = [x for x in leaves if isinstance(x, int | float) and not isinstance(x, bool)]
        fields.append(
            Values(
                name,
                total / len(objects),
                len(counts),
                -sum(n / total * math.log(n / total) for n in counts.values()) + 0.0,
                [(value, count / total) for value, count in counts.most_common(SHOWN)],
                _mean(numbers) if len(numbers) == total else None,
            )
        )
    return fields


def _mean(numbers: Sequence[float]) -> float | None:
    """The mean; None where it is beyond floating point."""
    try:
        mean = sum(numbers) / len(numbers)
    except OverflowError:
        return None
    return mean if math.isfinite(mean) else None


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of an object and of those in it; a list is one value."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
