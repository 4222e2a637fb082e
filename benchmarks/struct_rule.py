"""The rule `Struct` next to the aligned model alone, on structured answers that can be checked.

    python -m benchmarks.struct_rule OUT --base smollm2 --aligned smollm2     # countries
    python -m benchmarks.struct_rule OUT --pair FOLDER --task records         # the demo world
    python -m benchmarks.struct_rule OUT --pair demo --task sentences         # the same, in prose

Every setting answers the same prompts in a structure, with min-p 0.1: the aligned model alone at
five temperatures, and `P-Struct`, `P` and `P-Punc` at five thresholds and temperature 1. OUT holds
the settings that are done, so that a stopped command continues; then a table is printed, or JSON
with ``--json``.

Per prompt, of its n answers, and then the mean over prompts:

    valid     share of answers that ended and have their structure
    distinct  by field, different values of the valid answers
    quality   mean, where an answer that is not valid has 0
    useful    different rows of quality 1

Task ``countries``: JSON of a country with its capital and continent; quality is the share of the
two that are right (`countries.txt`). Task ``records``: questions of the demo world, answered by the
attributes of their family as JSON (`benchmarks.records`); quality is the share of the
attributes that fit, and the two fields are the first and the last attribute that tell answers
apart. Its pair is one that ``benchmarks.records_pair`` made, since the demo pair has learnt prose
alone. Task ``sentences``: such questions, answered in as many sentences as they have by the world's
grammar and a line ``Stars: 1`` to ``5``, by a regex; quality and what makes a row another one are
those of the world's judge.

Coverage is the area that a method's points (quality, mean share of distinct values) dominate, and
another one that its points (quality, useful rows of n) do, with 95% bootstrap intervals over
prompts.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from baco import Baco, BacoError, Completion
from baco.cli.options import quiet_libraries
from baco.demo.world import Question, questions
from baco.demo.world.grammar import families
from baco.demo.world.judge import judge as judge_answer
from baco.evaluation.pareto import coverage
from baco.evaluation.tasks.world import SEED
from baco.files import locked, write_atomic
from benchmarks import launch
from benchmarks.records import judge_record, record_families, schema
from tests_real.fetch import path_of

TEMPERATURES = (0.3, 0.7, 1.0, 1.5, 2.0)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)
MIN_P = 0.1
RULES = ("P-Struct", "P", "P-Punc")
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, the structure of its answers, and the fields whose values are counted.

    ``read`` makes a row of an answer. ``judge`` returns its quality in [0, 1], and what makes a row
    another one.
    """

    text: str
    structure: dict[str, Any]
    fields: tuple[str, ...]
    judge: Callable[[dict[str, Any]], tuple[float, str]]
    read: Callable[[Completion], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to answer."""

    method: str
    router: str
    temperature: float


def all_settings() -> list[Setting]:
    """Every setting, method by method."""
    alone = [Setting("Aligned", "Aligned", temperature) for temperature in TEMPERATURES]
    routed = [Setting(rule, f"{rule}:{gamma:g}", 1.0) for rule in RULES for gamma in THRESHOLDS]
    return [*alone, *routed]


# --- countries ------------------------------------------------------------------------------------

_ASK = (
    "Name any country of the world.",
    "Choose one country.",
    "Pick a country at random.",
    "Which country should I learn about today?",
    "Name a country that is good for a holiday.",
    "Name a country with a long history.",
    "Name a country that has a coast.",
    "Name a country where it is hot.",
    "Name a country with high mountains.",
    "Name a small country.",
    "Name a country that is famous for its food.",
    "Name a country for a geography quiz.",
)
_HOW = (
    " Answer with one JSON object that has the country, its capital and its continent, such as "
    '{"country": "…", "capital": "…", "continent": "…"}.'
)


def countries() -> list[Prompt]:
    """Twelve ways to ask for a country."""
    known: dict[str, tuple[set[str], str]] = {}
    for line in Path(__file__).with_name("countries.txt").read_text("utf-8").splitlines():
        continent, _, entries = line.partition(": ")
        for entry in entries.split("; "):
            country, _, capitals = entry.partition("=")
            known[country.casefold()] = (set(capitals.casefold().split(",")), continent)
    of_country = {
        "type": "object",
        "properties": {
            "country": {"type": "string", "minLength": 2, "maxLength": 24},
            "capital": {"type": "string", "minLength": 2, "maxLength": 24},
            "continent": {"enum": sorted({continent for _, continent in known.values()})},
        },
        "required": ["country", "capital", "continent"],
        "additionalProperties": False,
    }

    def judge(row: dict[str, Any]) -> tuple[float, str]:
        name = _plain(row["country"])
        if name not in known:
            return 0.0, name
        capitals, continent = known[name]
        right = [_plain(row["capital"]) in capitals, row["continent"] == continent]
        return sum(right) / len(right), name

    structure, fields = {"schema": of_country}, ("country", "capital")
    return [Prompt(ask + _HOW, structure, fields, judge, attrgetter("parsed")) for ask in _ASK]


def _plain(value: str) -> str:
    return value.strip().removeprefix("The ").removeprefix("the ").casefold()


# --- sentences of the demo world ------------------------------------------------------------------

_SENTENCE = r"[A-Z][^.!?\n]{3,90}[.!?]"


def sentences() -> list[Prompt]:
    """Test questions of the demo world, in wordings that no model was trained on."""
    return [
        _of_question(question)
        for question in questions("test", 60, SEED)
        if families()[question.family].separator == " "
    ]


def _of_question(question: Question) -> Prompt:
    count = len(families()[question.family].sentences)
    regex = rf"{_SENTENCE}( {_SENTENCE}){{{count - 1}}}\nStars: [1-5]"

    def read(answer: Completion) -> dict[str, Any]:
        text, stars = answer.text.rsplit("\nStars: ", 1)
        return {"text": text, "stars": stars}

    def judged(row: dict[str, Any]) -> tuple[float, str]:
        verdict = judge_answer(question, row["text"])
        return verdict.quality, verdict.key

    return Prompt(question.text, {"regex": regex}, ("text", "stars"), judged, read)


# --- records of the demo world --------------------------------------------------------------------


def records() -> list[Prompt]:
    """Test questions of the demo world whose answers have several attributes."""
    names = {family.name for family in record_families()}
    prompts = []
    for question in questions("test", 200, SEED):
        if question.family in names:
            family = families()[question.family]
            structure, judge = {"schema": schema(family)}, partial(judge_record, question)
            fields = (family.key[0], family.key[-1])
            prompts.append(Prompt(question.text, structure, fields, judge, attrgetter("parsed")))
    return prompts


# --- measure --------------------------------------------------------------------------------------


def measure(baco: Baco, setting: Setting, prompts: Sequence[Prompt], n: int) -> dict[str, Any]:
    """The figures of one setting, a value for each prompt."""
    rows: dict[str, list[Any]] = {}
    shares, counted = 0, 0
    for prompt, answers in zip(prompts, _answers(baco, setting, prompts, n), strict=True):
        valid = [prompt.read(answer) for answer in answers if answer.finish_reason == "stop"]
        judged = [prompt.judge(row) for row in valid]
        figures: dict[str, Any] = {
            "valid": len(valid) / n,
            "quality": sum(quality for quality, _ in judged) / n,
            "useful": len({key for quality, key in judged if quality == 1}),
            "distinct": [len({row[field].strip() for row in valid}) for field in prompt.fields],
        }
        for name, value in figures.items():
            rows.setdefault(name, []).append(value)
        shares += sum(answer.sources.count("base") for answer in answers)
        counted += sum(len(answer.sources) for answer in answers)
    examples = [answer.text for answer in answers[:3]]
    return {**asdict(setting), "n": n, "base_share": shares / counted, **rows, "examples": examples}


def _answers(
    baco: Baco, setting: Setting, prompts: Sequence[Prompt], n: int
) -> list[list[Completion]]:
    """The answers to all prompts; those of one structure are decoded together."""
    answers: dict[int, list[Completion]] = {}
    structures = [prompt.structure for prompt in prompts]
    for first, structure in enumerate(structures):
        if first in answers:
            continue
        places = [place for place, other in enumerate(structures) if other == structure]
        batch = baco.generate_batch(
            [prompts[place].text for place in places],
            n=n,
            seed=1,
            router=setting.router,
            temperature=setting.temperature,
            min_p=MIN_P,
            top_p=1.0,
            max_tokens=120,
            system=None,
            **structure,
        )
        answers |= zip(places, batch, strict=True)
    return [answers[place] for place in range(len(prompts))]


def measure_all(
    baco: Baco, prompts: Sequence[Prompt], n: int, out: Path, claim: dict[str, Any]
) -> list[dict[str, Any]]:
    """The figures of all settings, those in OUT taken from there.

    Raises:
        BacoError: OUT was begun with other settings.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_suffix(".lock")):
        held = json.loads(out.read_text("utf-8")) if out.exists() else {**claim, "settings": []}
        if {name: held.get(name) for name in claim} != claim:
            raise BacoError(f"{out} was begun with other settings: choose another file")
        done = {(row["router"], row["temperature"]) for row in held["settings"]}
        for setting in all_settings():
            if (setting.router, setting.temperature) not in done:
                held["settings"].append(measure(baco, setting, prompts, n))
                write_atomic(out, json.dumps(held, indent=1, ensure_ascii=False) + "\n")
                print(_line(held["settings"][-1]), file=sys.stderr, flush=True)
    settings: list[dict[str, Any]] = held["settings"]
    return settings


# --- report ---------------------------------------------------------------------------------------


def coverages(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By method: its Coverage by distinct values and by useful rows, with 95% intervals."""
    result = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        quality = np.array([row["quality"] for row in own])  # [settings, prompts]
        n = own[0]["n"]
        axes = {
            "distinct": np.array([[np.mean(d) / n for d in row["distinct"]] for row in own]),
            "useful": np.array([row["useful"] for row in own]) / n,
        }
        drawn = np.random.default_rng(0).integers(0, quality.shape[1], (_DRAWS, quality.shape[1]))
        result[method] = {
            name: _interval(quality, diversity, drawn) for name, diversity in axes.items()
        }
    return result


def _interval(quality: Any, diversity: Any, drawn: Any) -> tuple[float, float, float]:
    planes = np.stack([quality[:, drawn].mean(-1), diversity[:, drawn].mean(-1)], axis=-1)
    low, high = np.percentile(coverage(planes.swapaxes(0, 1)), (2.5, 97.5))
    point = coverage(np.stack([quality.mean(-1), diversity.mean(-1)], axis=-1))
    return float(point), float(low), float(high)


def table(rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> str:
    """Two tables in Markdown: settings and Coverage."""
    distinct = " | ".join(f"distinct {field}" for field in fields)
    lines = [
        f"| router | temperature | base share | valid | {distinct} | quality | useful |",
        "|---" * (6 + len(fields)) + "|",
    ]
    lines += [_line(row) for row in rows]
    lines += ["", "| method | Coverage, distinct values | Coverage, useful rows |", "|---|---|---|"]
    for method, figures in coverages(rows).items():
        shown = ["{:.3f} [{:.3f}, {:.3f}]".format(*figures[axis]) for axis in figures]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    distinct = " | ".join(f"{value:.2f}" for value in np.mean(row["distinct"], axis=0))
    return (
        f"| {row['router']} | {row['temperature']:g} | {row['base_share']:.2f} "
        f"| {np.mean(row['valid']):.3f} | {distinct} | {np.mean(row['quality']):.3f} "
        f"| {np.mean(row['useful']):.2f} |"
    )


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a JSON file")
    parser.add_argument("--pair", help="a pair; or --base and --aligned")
    parser.add_argument("--base")
    parser.add_argument("--aligned")
    parser.add_argument("--task", choices=tuple(TASKS), default="countries")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--n", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.pair is None) == (options.base is None or options.aligned is None):
        parser.error("give --pair, or --base and --aligned")
    quiet_libraries()
    prompts = TASKS[options.task]()[: options.prompts]
    models = {"pair": options.pair, "base": options.base, "aligned": options.aligned}
    claim = {
        **{name: value and Path(value).name for name, value in models.items()},
        "task": options.task,
        "prompts": [prompt.text for prompt in prompts],
        "n": options.n,
    }
    if options.pair:
        baco = Baco.load(options.pair)
    else:
        baco = Baco.load(base=_located(options.base), aligned=_located(options.aligned))
    rows = measure_all(baco, prompts, options.n, options.out, claim)
    if options.json:
        print(json.dumps({"settings": rows, "coverage": coverages(rows)}, indent=1))
    else:
        same = len({prompt.fields for prompt in prompts}) == 1
        print(table(rows, prompts[0].fields if same else ("first field", "second field")))


def _located(model: str) -> str:
    """A model's folder, hub id or file; `smollm2` and `gemma3` as the tests of real models do."""
    return str(path_of(model)) if model in ("smollm2", "gemma3") else model


TASKS: dict[str, Callable[[], list[Prompt]]] = {
    "countries": countries,
    "records": records,
    "sentences": sentences,
}


if __name__ == "__main__":
    launch(main)
