"""Every Python example in the README and the documentation runs."""

import re
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
