"""``baco routers`` and ``baco pairs``: what there is to choose from."""

from dataclasses import asdict

from rich import box
from rich.table import Table

from baco.cli.console import out, print_json
from baco.cli.options import AsJson


def routers(as_json: AsJson = False) -> None:
    """List the routers: how each is written and what it does."""
    from baco.routing.registry import catalogue, names
    from baco.routing.rules import ContentRule, LogitRule

    if as_json:
        print_json([asdict(entry) for entry in catalogue()])
        return
    table = Table("router", "example", "which model speaks", box=box.SIMPLE)
    for entry in catalogue():
        table.add_row(entry.name, entry.example, entry.sentence)
    out().print(table, soft_wrap=False)
    out().print(
        f"Content rules ({', '.join(names(ContentRule))}) combine with one logit rule "
        f"({', '.join(names(LogitRule))}), as in H-Punc-FC:1.5. predict=aligned or "
        "predict=either after a comma says whose most likely token the content rules look at."
    )


def pairs(as_json: AsJson = False) -> None:
    """List the pairs that have a short name."""
    from baco.known import known_pairs

    if as_json:
        print_json([{"name": p.name, "base": p.base, "aligned": p.aligned} for p in known_pairs()])
        return
    table = Table("pair", "base", "aligned", box=box.SIMPLE)
    for pair in known_pairs():
        shown = ("embedded", "embedded") if pair.name == "demo" else (pair.base, pair.aligned)
        table.add_row(pair.name, *shown)
    out().print(table, soft_wrap=False)
