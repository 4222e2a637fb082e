"""Every Python example in the README and the documentation runs, and files it names exist."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.registries import restored

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```python( .*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return [page for page in found if FENCE.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, as a reader would type them; ```` ```python no-run ```` is left out."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__main__"}
    with restored():
        for fence in FENCE.finditer(text):
            if "no-run" not in (fence[1] or ""):
                line = text.count("\n", 0, fence.start(2))
                exec(compile("\n" * line + fence[2], str(page), "exec"), names)


def test_files_named_by_the_walk_through_the_code_exist() -> None:
    text = (ROOT / "docs" / "reading-the-code.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|toml))?|[a-z_]+\.py)`", text)
    folders = (ROOT / "src" / "baco", ROOT)
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert len(named) > 40
    assert not missing


def test_the_design_lists_the_layers_of_the_import_contract_from_the_lowest_up() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    layers = [layer.replace("baco.", "").split(" | ") for layer in reversed(contract["layers"])]
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    listed = [re.findall(r"`([\w.]+)`", row) for row in rows]
    assert [sorted(names) for names in listed] == [sorted(names) for names in layers]
