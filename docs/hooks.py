"""Build-time parts of the documentation site: the command-line reference and outside links."""

import posixpath
import re
from typing import Any

from typer.cli import get_docs_for_click
from typer.main import get_command

LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in the command-line reference. Name what is not part of the site, without a link."""
    if page.file.src_path == "cli.md":
        return markdown + _command_line()
    folder = posixpath.dirname(page.file.src_path)

    def name_it(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, link[2].partition("#")[0]))
        if target.startswith("docs/") and posixpath.splitext(target)[1]:
            return link[0]
        return f"{link[1]} (`{target}` in the repository)"

    return LINK.sub(name_it, markdown)


def _command_line() -> str:
    """The reference of every command, from the program's own help."""
    import typer

    from baco.cli import app

    text = get_docs_for_click(
        obj=get_command(app), ctx=typer.Context(get_command(app)), name="baco", title=" "
    )
    return re.sub(r"^# .*\n", "", text).replace("&#x27;", "'").replace("&quot;", '"')
