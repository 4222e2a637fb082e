"""The committed page is built from the committed sources and loads nothing from other hosts."""

import hashlib
import re
from importlib import resources
from pathlib import Path

WEB = Path(__file__).parent.parent / "web"
NO_SOURCES = ("node_modules", "README.md")


def page(path: str) -> str:
    return resources.files("baco").joinpath("serve", "page", path).read_text(encoding="utf-8")


def fingerprint_of_sources() -> str:
    digest = hashlib.sha256()
    files = (path for path in WEB.rglob("*") if path.is_file())
    names = (path.relative_to(WEB) for path in files)
    for name in sorted(n.as_posix() for n in names if n.parts[0] not in NO_SOURCES):
        digest.update(name.encode() + b"\0" + (WEB / name).read_bytes() + b"\0")
    return digest.hexdigest()


def test_the_committed_page_is_made_from_the_committed_sources() -> None:
    match = re.search(r'<meta name="sources" content="(\w+)"', page("index.html"))
    assert match is not None
    assert match[1] == fingerprint_of_sources(), "run 'make page' and commit the result"


def test_the_safety_page_has_the_points_of_the_documentation() -> None:
    docs = (WEB.parent / "docs" / "safety.md").read_text(encoding="utf-8").partition("\n## ")[0]
    points = re.findall(r"^- \*\*(.+?)\*\*", docs, re.MULTILINE)
    assert len(points) >= 4
    assert re.findall(r"<b>(.+?)</b>", page("safety.html")) == points


def test_the_page_loads_only_files_beside_it() -> None:
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page("index.html"))
    assert loaded
    for address in loaded:
        assert address.startswith("/page/")
        assert page(address.removeprefix("/page/"))
