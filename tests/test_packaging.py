"""Metadata of the package."""

import tomllib
from pathlib import Path

import baco

ROOT = Path(__file__).parents[1]


def test_the_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert baco.__version__ not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{baco.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
