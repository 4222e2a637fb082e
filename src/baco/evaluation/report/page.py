"""The page: one HTML file with its style, its script, its data and Vega inside.

The content security policy in its head forbids it to load or send anything, and everything that a
model or a prompt said is escaped: a page can be opened and passed on without a second thought.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from baco.evaluation.methods.method import Family
from baco.evaluation.report import plots
from baco.evaluation.report.examples import Examples
from baco.evaluation.report.families import Look
from baco.evaluation.report.load_scores import Findings
from baco.evaluation.report.ranking import Standing, balanced, spaces
from baco.text.control_characters import well_formed, well_formed_values
from baco.version import __version__

# What is shown first, where it was measured.
DIVERSITY = ("distinct_k", "embedding_distance", "self_rouge_l")
QUALITY = ("reward", "perplexity")
COLUMNS = 4
# Parts of the page's one script, each on what those before it define.
SCRIPT = ("state", "answers", "plots", "plane", "choosers", "start")


def view(standing: Standing, found: Findings, examples: Examples) -> dict[str, Any]:
    """One pair and task as the page's script reads it."""
    planes = spaces(found, standing.alone.spaces)
    main = standing.main
    chosen = balanced(found, standing.alone.spaces)
    order: tuple[Family, ...] = ("BACo", "base", "aligned", "Nudging")
    bests = [standing.best(family) for family in order]
    compared = [chosen[name] for name in bests if name in chosen]
    compared = [key for key in compared if key in examples.answers] or found.keys[:COLUMNS]
    return {
        "name": f"{standing.pair}: {found.task}",
        "methods": standing.ranked(),
        "lit": main,
        "diversity": first(DIVERSITY, [plane.diversity for plane in planes]),
        "quality": first(QUALITY, [plane.quality for plane in planes]),
        "settings": [
            {"method": method, "label": label, "baseShare": found.costs[method, label].base_share}
            for method, label in found.keys
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
        "answers": [examples.answers.get(key) for key in found.keys],
        "columns": [found.keys.index(key) for key in compared[:COLUMNS]],
    }


def first(wanted: Sequence[str], known: Sequence[str]) -> str:
    """The first of what is wanted that is known, else whatever is known first."""
    return next((name for name in wanted if name in known), next(iter(known), ""))


def render(
    views: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Look],
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
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_shown
    )
    environment.globals["interval"] = _with_interval
    told = {
        "views": views,
        "looks": {
            name: {"light": look.light, "dark": look.dark, "shape": look.shape}
            for name, look in looks.items()
        },
    }
    specs = {"plane": plots.page_plane(), "coverages": coverages}
    return environment.from_string(_source("page.html.jinja")).render(
        version=__version__,
        css=Markup(_source("page.css")),
        script=Markup("\n".join(_source(f"script/{name}.js") for name in SCRIPT)),
        vega=Markup(plots.vega_script()),
        data=Markup(_embedded(told)),
        specs=Markup(_embedded(specs)),
        **content,
    )


def _shown(value: Any) -> Any:
    """A value as the page may hold it; the page's own parts are that already."""
    return well_formed(value) if type(value) is str else value


def _with_interval(cell: str) -> Any:
    """A figure with its interval on a line of its own; anything else as it is."""
    from markupsafe import Markup

    cell = well_formed(cell)
    match = re.fullmatch(r"(\S+) (\[\S+, \S+\])", cell)
    if match is None:
        return cell
    return Markup('{} <span class="interval">{}</span>').format(*match.groups())


def _embedded(value: Any) -> str:
    """JSON that may stand in a script element whatever text it holds."""
    shown = well_formed_values(value)
    text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _source(name: str) -> str:
    return resources.files("baco.evaluation.report").joinpath(name).read_text("utf-8")


def _short(numbers: Any) -> list[float]:
    return [round(float(number), 4) for number in numbers]
