"""Every Python example in the README and the documentation runs, and files it names exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from baco.cli import app
from tests.registries import restored

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```python( .*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


DOCUMENTATION = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def pages() -> list[Path]:
    return [page for page in DOCUMENTATION if FENCE.search(page.read_text(encoding="utf-8"))]


def commands(text: str) -> Iterator[str]:
    """The command lines of `baco` in code blocks: fenced as ``sh``, or indented by four spaces."""
    text = re.sub(r"\\\n\s*", " ", text)
    for fence in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from re.findall(r"^(?:.*[|$'] *)?(baco [^'\n]*)", fence, re.MULTILINE)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"^    (baco [a-z].*)$", rest, re.MULTILINE)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page; ```` ```python no-run ```` is left out."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    with restored():
        for fence in FENCE.finditer(text):
            if "no-run" not in (fence[1] or ""):
                line = text.count("\n", 0, fence.start(2))
                exec(compile("\n" * line + fence[2], str(page), "exec"), names)


@pytest.mark.parametrize("page", DOCUMENTATION, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist_with_their_options(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        command, arguments = get_command(app), shlex.split(line, comments=True)[1:]
        while subcommands := getattr(command, "commands", None):
            command = subcommands[arguments.pop(0)]
        command.make_context(line, arguments)  # raises for an option that is not there


def test_files_named_by_the_walk_through_the_code_exist() -> None:
    text = (ROOT / "docs" / "reading-the-code.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|toml))?|[a-z_]+\.py)`", text)
    folders = (ROOT / "src" / "baco", ROOT)
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert len(named) > 40
    assert not missing


def test_the_design_lists_the_layers_of_the_import_contract_from_the_lowest_up() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (highest_first,) = (one["layers"] for one in contracts if one["type"] == "layers")
    layers = [layer.replace("baco.", "").split(" | ") for layer in reversed(highest_first)]
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    listed = [re.findall(r"`([\w.]+)`", row) for row in rows]
    assert [sorted(names) for names in listed] == [sorted(names) for names in layers]
