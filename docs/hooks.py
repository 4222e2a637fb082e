"""Build-time parts of the documentation site: command-line reference, examples, outside links."""

import posixpath
import re
from pathlib import Path
from typing import Any

from typer.cli import get_docs_for_click
from typer.main import get_command

EXAMPLES = Path(__file__).parents[1] / "examples"
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in the command-line reference and the examples.

    What is not part of the site is named without a link.
    """
    if page.file.src_path == "cli.md":
        return markdown + _command_line()
    folder = posixpath.dirname(page.file.src_path)

    def name_it(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[2].partition("#")[0]))
        if target.startswith("docs/") and posixpath.splitext(target)[1]:
            return link[0]
        return f"{link[1]} (`{target}` in the repository)"

    text = LINK.sub(name_it, markdown)
    return text + _examples() if page.file.src_path == "examples.md" else text


def _examples() -> str:
    """Every program of examples/."""
    return "\n".join(
        f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        for path in sorted(EXAMPLES.glob("*.py"))
    )


def _command_line() -> str:
    """The reference of every command, from the program's own help."""
    import typer

    from baco.cli import app

    group: Any = get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="baco", title=" ")
    for name, command in group.commands.items():  # their list would be cut after 45 characters
        sentence = " ".join((command.help or "").partition("\n\n")[0].split())
        entry = re.compile(rf"^\* `{name}`: .*$", re.MULTILINE)
        text = entry.sub(lambda _, line=f"* `{name}`: {sentence}": line, text, count=1)
    return re.sub(r"^# .*\n", "", text).replace("&#x27;", "'").replace("&quot;", '"')
