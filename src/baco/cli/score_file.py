"""``baco score FILE``: metrics of anybody's file of prompts and answers, on one screen."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baco.cli.console import note, out, print_columns, print_json
from baco.errors import BacoError
from baco.evaluation.answer_files import AnswerFile, parse_answers, read_answers
from baco.evaluation.answer_scores import (
    AnswerScores,
    Published,
    against,
    published_model,
    score_answers,
)
from baco.evaluation.inference import FEW_PROMPTS

if TYPE_CHECKING:
    from baco.evaluation.indicators import Comparison

COMPARED = ("distinct_k", "utility_k")  # what NoveltyBench publishes


def score_file(
    path: Path,
    names: Sequence[str],
    models: Mapping[str, str],
    rival: str | None,
    as_json: bool,
) -> None:
    """Score a file, or standard input where the path is `-`, and print the summary."""
    file = _file(path)
    other = published = None
    if rival is not None:
        if Path(rival).is_file():
            other = read_answers(Path(rival))
        else:
            published = published_model(rival)
    if other is not None and not names:
        names = _shared_names(file, other)
    scores = score_answers(file, names, models)
    leads: list[Comparison | None] = []
    if other is not None:
        others = score_answers(other, [row.metric for row in scores], models)
        leads = [against(file, own, other, row) for own, row in zip(scores, others, strict=True)]
        if all(lead is None for lead in leads):
            raise BacoError(f"{file.name} and {other.name} share no prompt: nothing to compare")
    if as_json:
        print_json(_summary(file, scores, rival, leads, published))
    else:
        _show(file, scores, rival, leads, published)


def _file(path: Path) -> AnswerFile:
    if str(path) != "-":
        return read_answers(path)
    try:
        return parse_answers(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise BacoError("standard input is not valid UTF-8") from error


def _shared_names(file: AnswerFile, other: AnswerFile) -> list[str]:
    """The lexical metrics that the answers of both files allow."""
    from baco.evaluation.metrics import entries

    fewest = min(file.fewest, other.fewest)
    return [n for n, e in entries().items() if e.kind == "lexical" and e.needs <= fewest]


def _summary(
    file: AnswerFile,
    scores: Sequence[AnswerScores],
    rival: str | None,
    leads: "Sequence[Comparison | None]",
    published: Published | None,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "file": file.name,
        "prompts": len(file.prompts),
        "answers": sum(map(len, file.answers)),
        "answers_per_prompt": [file.fewest, file.most],
        "equal_answers": _equal(file),
        "metrics": {
            row.metric: None if row.estimate is None else asdict(row.estimate) for row in scores
        },
    }
    if rival is not None:
        summary["against"] = rival
    if leads:
        summary["differences"] = {
            row.metric: None if lead is None else asdict(lead)
            for row, lead in zip(scores, leads, strict=True)
        }
    if published is not None:
        summary["published"] = asdict(published)
    return summary


def _show(
    file: AnswerFile,
    scores: Sequence[AnswerScores],
    rival: str | None,
    leads: "Sequence[Comparison | None]",
    published: Published | None,
) -> None:
    count = str(file.fewest) if file.fewest == file.most else f"{file.fewest} to {file.most}"
    out().print(
        f"{len(file.prompts)} prompts, {count} answers each; {_equal(file):.0%} of the answers "
        "equal an earlier one to the same prompt"
    )
    figures = asdict(published) if published is not None else {}
    heads = ["metric", "mean", "95% interval"]
    heads += ["published"] if published is not None else []
    heads += ["difference", "95% interval", "p"] if leads else []
    rows = [heads]
    for place, row in enumerate(scores):
        estimate = row.estimate
        shown = [row.metric]
        shown += (
            ["–", "–"]
            if estimate is None
            else [f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}"]
        )
        if published is not None:
            shown.append(f"{figures[row.metric]:.3f}" if row.metric in figures else "–")
        if leads:
            shown += _lead(leads[place])
        rows.append(shown)
    print_columns(rows)
    if leads:
        out().print(f"difference: this file minus {rival}, on the prompts of both")
    if published is not None:
        listed = ", ".join(f"{name} {figures[name]:.3f}" for name in COMPARED)
        out().print(f"{rival} on NB-Curated (100 prompts, 10 answers each) has {listed}")
        if not set(COMPARED) & {row.metric for row in scores}:
            note("to compare: --metric distinct_k --metric utility_k, whose models are large")
    if file.fewest != file.most:
        note("prompts have unequal numbers of answers, on which diversity depends")
    if len(file.prompts) < FEW_PROMPTS:
        note(f"only {len(file.prompts)} prompts: intervals are rough; use {FEW_PROMPTS} or more")


def _lead(lead: "Comparison | None") -> list[str]:
    if lead is None:
        return ["–", "–", "–"]
    p_value = "< 0.001" if lead.p_value < 0.001 else f"{lead.p_value:.3f}"
    return [f"{lead.difference:+.3f}", f"{lead.low:+.3f} to {lead.high:+.3f}", p_value]


def _equal(file: AnswerFile) -> float:
    """Share of the answers that equal an earlier one to the same prompt."""
    answers = sum(map(len, file.answers))
    return 1.0 - sum(len(set(row)) for row in file.answers) / answers
