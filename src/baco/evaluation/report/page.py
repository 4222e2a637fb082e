"""The page: one HTML file with its style, its script, its data, Vega and example answers inside.

The content security policy in its head forbids it to load or send anything, and all text of models
and prompts is escaped. So a page is safe to open and to pass on. It must also stay small enough to
send: the number of prompts with example answers follows from how much text the run holds.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from baco.evaluation.methods.method import Family
from baco.evaluation.records import Group, Prompt, Sample
from baco.evaluation.report import plots
from baco.evaluation.report.load_scores import Key, TaskScores
from baco.evaluation.report.ranking import Ranking, balanced, spaces
from baco.source import MIXED, Source
from baco.text.invalid_characters import well_formed, well_formed_values
from baco.version import __version__

COLUMNS = 4
# Parts of the page's one script; each uses what those before it define.
SCRIPT = ("state", "answers", "plots", "plane", "choosers", "start")
SAMPLES = 6  # shown of a prompt at a setting
PROMPTS = 24  # shown at most
CHARACTERS = 2_500_000  # of all shown answers together, at most
LONGEST = 700  # characters shown of an answer


@dataclass(frozen=True, slots=True)
class Examples:
    """The prompts that are shown, and their answers.

    Attributes:
        prompts: the ones shown.
        answers: by (method, setting): the first samples, as `coded`, of every prompt shown.
    """

    prompts: Sequence[Prompt]
    answers: Mapping[Key, Sequence[Sequence[list[Any]]]]


def choose(prompts: Sequence[Prompt], settings: int, characters: float) -> list[Prompt]:
    """Prompts to show, chosen from every category in turn, in the task's order.

    Args:
        prompts: of the task.
        settings: their number.
        characters: of a mean answer.
    """
    one_prompt = settings * SAMPLES * (min(characters, LONGEST) + 40)  # 40: quotes and sources
    count = max(1, min(PROMPTS, len(prompts), int(CHARACTERS / one_prompt)))
    by_category: dict[str | None, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(place)
    turns = sorted(
        (turn, place) for places in by_category.values() for turn, place in enumerate(places)
    )
    return [prompts[place] for place in sorted(place for _, place in turns[:count])]


def collect(groups: Iterable[Group], shown: Sequence[Prompt]) -> Examples:
    """The first samples of the shown prompts, from all groups of one pair and task."""
    place = {prompt.id: index for index, prompt in enumerate(shown)}
    answers: dict[Key, list[list[list[Any]]]] = {}
    for group in groups:
        if group.prompt.id in place:
            rows = answers.setdefault((group.method, group.setting), [[] for _ in shown])
            rows[place[group.prompt.id]] = [coded(sample) for sample in group.samples[:SAMPLES]]
    return Examples(shown, answers)


def coded(sample: Sample) -> list[Any]:
    """An answer for the page's script: the first source, then the text of one source at a time.

    `["b", "Go to ", "Oslo."]` is base, then aligned; `["", "Go to Oslo."]` has no sources, and
    `["m", "Go to Oslo."]` mixes both models.
    """
    if not sample.pieces:
        return ["", _cut(sample.text)]
    first = sample.pieces[0][1]
    if first is None or None in {source for _, source in sample.pieces}:
        return [MIXED[0], _cut(sample.text)]
    turns: list[Any] = [first[0]]
    left = LONGEST
    last: Source | None = None
    for text, source in sample.pieces:
        if left <= 0:
            break
        shown = _cut(text, left)
        left -= len(text)
        if source == last:
            turns[-1] += shown
        else:
            turns.append(shown)
        last = source
    return turns


def _cut(text: str, length: int = LONGEST) -> str:
    return text if len(text) <= length else text[:length] + "…"


def view(ranking: Ranking, scores: TaskScores, examples: Examples) -> dict[str, Any]:
    """One pair and task as the page's script reads it."""
    planes = spaces(scores, ranking.alone.spaces)
    chosen = balanced(scores, ranking.alone.spaces)
    order: tuple[Family, ...] = ("BACo", "base", "aligned", "Nudging")
    bests = [ranking.best(family) for family in order]
    compared = [chosen[name] for name in bests if name in chosen]
    compared = [key for key in compared if key in examples.answers] or scores.keys[:COLUMNS]
    return {
        "name": f"{ranking.pair}: {scores.task}",
        "methods": ranking.ranked(),
        "lit": ranking.main,
        "diversity": plots.first(plots.DIVERSITY, [plane.diversity for plane in planes]),
        "quality": plots.first(plots.QUALITY, [plane.quality for plane in planes]),
        "settings": [
            {
                "method": method,
                "label": label,
                "baseShare": cost.base_share,
                "mixed": cost.mixed,
            }
            for method, label in scores.keys
            for cost in (scores.costs[method, label],)
        ],
        "spaces": [
            {
                "diversity": plane.diversity,
                "quality": plane.quality,
                "points": [
                    [*_short(point), *_short(mean), int(front)]
                    for point, mean, front in zip(
                        plane.points, plane.means, plane.front, strict=True
                    )
                ],
            }
            for plane in planes
        ],
        "prompts": [
            {"text": prompt.text, "category": prompt.category} for prompt in examples.prompts
        ],
        "answers": [examples.answers.get(key) for key in scores.keys],
        "columns": [scores.keys.index(key) for key in compared[:COLUMNS]],
    }


def render(
    views: Sequence[Mapping[str, Any]],
    looks: Mapping[str, plots.Look],
    coverages: Sequence[Mapping[str, Any]],
    content: Mapping[str, Any],
) -> str:
    """The whole page.

    Args:
        views: pairs and tasks, see `view`.
        looks: of all methods.
        coverages: a Vega-Lite specification for each pair.
        content: the template's other variables.
    """
    from markupsafe import Markup

    data = {
        "views": views,
        "looks": {
            name: {"light": look.light, "dark": look.dark, "shape": look.shape}
            for name, look in looks.items()
        },
    }
    specs = {"plane": plots.page_plane(), "coverages": coverages}
    html: str = template(source("page.html.jinja")).render(
        version=__version__,
        css=Markup(source("page.css")),
        script=Markup("\n".join(source(f"script/{name}.js") for name in SCRIPT)),
        vega=Markup(plots.vega_script()),
        data=Markup(_embedded(data)),
        specs=Markup(_embedded(specs)),
        **content,
    )
    return html


def template(text: str) -> Any:
    """A Jinja template that escapes all it shows and can import ``table.html.jinja``."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
        loader=FunctionLoader(source),
    )
    environment.globals["interval"] = _with_interval
    return environment.from_string(text)


def _shown(value: Any) -> Any:
    """A value without characters that HTML forbids; the page's own parts hold none."""
    return well_formed(value) if type(value) is str else value


def _with_interval(cell: str) -> Any:
    """A figure with its interval on a line of its own; any other cell unchanged."""
    from markupsafe import Markup

    cell = well_formed(cell)
    match = re.fullmatch(r"(\S+) (\[\S+, \S+\])", cell)
    if match is None:
        return cell
    return Markup('{} <span class="interval">{}</span>').format(*match.groups())


def _embedded(value: Any) -> str:
    """JSON that is safe in a script element, whatever text it holds."""
    shown = well_formed_values(value)
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def source(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("baco.evaluation.report").joinpath(name).read_text("utf-8")


def _short(numbers: Any) -> list[float]:
    return [round(float(number), 4) for number in numbers]
