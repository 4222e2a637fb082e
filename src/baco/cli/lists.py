"""What there is to choose from: routers, samplers, pairs, tasks, methods and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import fill, wrap
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from baco.cli.console import out, print_json
from baco.cli.options import AsJson

if TYPE_CHECKING:
    from baco.routing.combiners import Combiner
    from baco.sampling.sampler_chain import Sampler

# A last column of sentences that is narrower than this is hard to read.
NARROWEST = 24


def routers(as_json: AsJson = False) -> None:
    """List the routers: how each is written and what it does."""
    from baco.routing.parser import catalogue, rule_names
    from baco.routing.rules import ContentRule, LogitRule, Override

    if as_json:
        print_json([asdict(entry) for entry in catalogue()])
        return
    rows = [(entry.name, entry.example, entry.sentence) for entry in catalogue()]
    _show(("router", "example", "which model writes the word"), rows)
    _say(
        f"Content rules ({rule_names(ContentRule)}) combine with one logit rule "
        f"({rule_names(LogitRule)}), as in H-Punc-FC:1.5. predict=aligned or "
        "predict=either after a comma says whose most likely token the content rules look at. "
        f"{rule_names(Override)} combines with any of them; Slop:phrases.txt reads your own list. "
        "A threshold adapts with share=0.2 (base share) or distinct=0.5 (tokens that earlier "
        "samples do not have), over=samples for all samples together, and siblings=1, as in "
        "P-Punc:distinct=0.5."
    )


def combiners(as_json: AsJson = False) -> None:
    """List the combiners: what mixes both models' distributions, in the place of a router."""
    from baco.routing.combiners import combiners

    headings = ("combiner", "example", "what a token is drawn from")
    _list_spelled(
        headings,
        combiners(),
        as_json,
        "A combiner is given in a router's place, as in 'baco generate … --router Ensemble:0.3'. "
        "Its words come from both models at once, so they have no source: answers say mixed.",
    )


def samplers(as_json: AsJson = False) -> None:
    """List the samplers of --sampler: how each is written and what it does."""
    from baco.sampling.sampler_chain import samplers

    headings = ("sampler", "example", "what it does")
    _list_spelled(
        headings,
        samplers(),
        as_json,
        "Samplers run in the order given, after penalties and before the temperature. Temperature, "
        "top-k, top-p, min-p and penalties are options of their own.",
    )


def _list_spelled(
    headings: Sequence[str],
    parts: "Mapping[str, Combiner | Sampler]",
    as_json: bool,
    remark: str,
) -> None:
    """List what is spelled with numbers: name, example and help."""
    rows = [(part.name, part.example, part.help) for part in parts.values()]
    if as_json:
        print_json([dict(zip(("name", "example", "help"), row, strict=True)) for row in rows])
        return
    _show(headings, rows)
    _say(remark)


def pairs(as_json: AsJson = False) -> None:
    """List the pairs that have a short name."""
    from baco.models.known_pairs import DEMO, known_pairs

    if as_json:
        print_json([{"name": p.name, "base": p.base, "aligned": p.aligned} for p in known_pairs()])
        return
    rows = [
        (pair.name, "embedded", "embedded")
        if pair.name == DEMO
        else (pair.name, pair.base, pair.aligned)
        for pair in known_pairs()
    ]
    _show(("pair", "base", "aligned"), rows, prose=False)
    untested = ", ".join(pair.name for pair in known_pairs() if pair.untested)
    _say(
        "Names with -sft and -dpo are earlier stages of one model's alignment. Published, but not "
        f"tried with BACo yet: {untested}."
    )


def tasks(as_json: AsJson = False) -> None:
    """List the tasks of 'baco sweep': prompts that have a name."""
    from baco.evaluation.tasks import task_files

    tasks = task_files().values()
    if as_json:
        names = ("name", "help", "limit", "max_tokens", "verifier")
        print_json(
            [
                {name: getattr(task, name) for name in names} | {"source": dict(task.source)}
                for task in tasks
            ]
        )
        return
    _show(("task", "what it asks"), [(task.name, task.help) for task in tasks])
    _say("A file of prompts (.jsonl, .csv, .parquet, or .txt with one on each line) is a task too.")


def methods(as_json: AsJson = False) -> None:
    """List the methods of 'baco sweep': what turns a prompt into answers."""
    from baco.evaluation.methods import groups, methods
    from baco.evaluation.methods.served import served_examples

    known, served = methods().values(), {name.partition(":")[0]: name for name in served_examples()}
    if as_json:
        models = {name: f"baco/{spelling}" for name, spelling in served.items()}
        print_json(
            [
                {"name": m.name, "family": m.family, "help": m.help, "model": models.get(m.name)}
                for m in known
            ]
        )
        return
    _show(("method", "family", "what it does"), [(m.name, m.family, m.help) for m in known])
    listed = [f"{name} means {', '.join(members)}" for name, members in groups().items()]
    _say(f"{'; '.join(listed)}. --router names a single router.")
    _say(f"As models of 'baco serve', after baco/: {', '.join(served.values())}.")


def metrics(as_json: AsJson = False) -> None:
    """List the metrics of 'baco sweep' and 'baco score'."""
    from baco.evaluation.metrics import entries

    metrics = entries().values()
    if as_json:
        names = ("name", "kind", "needs", "models", "help")
        print_json([{name: getattr(metric, name) for name in names} for metric in metrics])
        return
    rows = [(m.name, m.kind, ", ".join(m.models) or "none", m.help) for m in metrics]
    _show(("metric", "kind", "models", "what it measures"), rows)
    _say("--model ROLE=ID_OR_FOLDER names another model for a role. Higher is always better.")


def _show(headings: Sequence[str], rows: Sequence[Sequence[str]], *, prose: bool = True) -> None:
    """Rows of which nothing is cut, and no cell but a last one of prose is broken into lines.

    In a pipe a row is a line. On a terminal that is too narrow the cells of a row stand below each
    other.
    """
    console = out()
    widths = [max(map(cell_len, column)) for column in zip(headings, *rows, strict=True)]
    room = console.width - sum(width + 2 for width in widths[:-1])
    if console.is_terminal and room < (min(widths[-1], NARROWEST) if prose else widths[-1]):
        for first, *others in rows:
            console.print(Text(first, style="bold"), soft_wrap=True)
            for cell in others:
                console.print(Text(f"  {cell}"), soft_wrap=True)
        return
    for place, row in enumerate((headings, *rows)):
        beginning = "".join(
            cell + " " * (width + 2 - cell_len(cell))
            for cell, width in zip(row[:-1], widths[:-1], strict=True)
        )
        # Words of the lists are never so long that they would have to be broken.
        last = wrap(row[-1], room) if console.is_terminal and prose else [row[-1]]
        indent = "\n" + " " * cell_len(beginning)
        style = "bold" if place == 0 else ""
        console.print(Text(beginning + indent.join(last), style=style), soft_wrap=True)


def _say(text: str) -> None:
    console = out()
    console.print(Text("\n" + (fill(text, console.width) if console.is_terminal else text)))
