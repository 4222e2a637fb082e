"""Control characters of prompts, answers and names reach no terminal, drawing or page."""

import io
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baco.cli import run
from baco.cli.console import (
    StandardOutput,
    _guarded,
    coloured,
    complain,
    note,
    out,
    print_json,
    show,
)
from baco.cli.svg import command_line, draw_svg
from baco.serve.middleware import log_to_streams
from baco.text.answer_text import Piece
from baco.text.invalid_characters import json_line, well_formed
from tests.test_cli_terminal import in_terminal

STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
EVIL = "one\x1b]0;owned\x07two\x9b2Jthree\x1b[8m\u202e\ud800"
XML = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
TEXTS = st.text(st.characters(exclude_categories=[]), max_size=40) | st.just(EVIL)


class Written(io.StringIO):
    def isatty(self) -> bool:
        return False


@given(TEXTS)
def test_a_message_is_one_line_without_control_characters(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stderr = Written()
        patch.setattr(sys, "stderr", stderr)
        complain(text)
        assert stderr.getvalue().count("\n") == 1
        assert not STEERS.search(stderr.getvalue())
        note(text)
        assert not STEERS.search(stderr.getvalue())


def test_messages_show_control_characters_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    complain("cannot read \x1b[2Jfile\x9b")
    assert capsys.readouterr().err == "baco: cannot read \\x1b[2Jfile\\x9b\n"


@given(TEXTS)
def test_answers_on_a_terminal_hold_no_control_characters(text: str) -> None:
    assert not STEERS.search(coloured([Piece(text, "base")]).plain)


def test_no_command_prints_them_on_a_terminal() -> None:
    file = io.StringIO()
    console = _guarded(Console(file=file, force_terminal=True, color_system=None, width=200))
    table = Table("name\x1b]0;owned\x07", "[bold]value[/bold]")
    table.add_row(EVIL, Text(EVIL))
    console.print(table)
    console.print(EVIL, Text(EVIL))
    assert "three" in file.getvalue()
    assert not STEERS.search(file.getvalue().encode(errors="replace").decode())


def test_a_pipe_gets_an_answer_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show(out(), [Piece("one\x1b[2J\r\n", "base"), Piece("\x07two\x9b", "aligned")])
    assert capsys.readouterr().out == "one\x1b[2J\r\n\x07two\x9b"


@given(TEXTS)
def test_json_on_standard_output_is_the_same_value_without_them(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written = Written()
        patch.setattr(sys, "stdout", written)
        print_json({"text": text})
        assert json.loads(written.getvalue()) == {"text": text}
        assert not STEERS.search(written.getvalue())
        written.getvalue().encode()


def test_errors_on_a_terminal_hold_none() -> None:
    received, code = in_terminal(
        "generate", "Hi", "--pair", "no\x1b]0;owned\x07where", rows=20, columns=100
    )
    assert code == 2
    assert "\x1b]0;" not in received
    assert "\\x1b]0;owned\\x07where" in received


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Callable[[io.TextIOBase], io.StringIO]:
    """Send a server's access log to this output; returns standard error."""

    def send(output: io.TextIOBase) -> io.StringIO:
        faults = io.StringIO()
        for name in ("baco.access", "baco.serve", "uvicorn", "asyncio"):
            monkeypatch.setattr(logging.getLogger(name), "handlers", [])
            monkeypatch.setattr(logging.getLogger(name), "propagate", False)
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", faults)
        log_to_streams()
        return faults

    return send


def test_a_servers_logs_hold_none(logs: Callable[[io.TextIOBase], io.StringIO]) -> None:
    lines = io.StringIO()
    faults = logs(lines)
    logging.getLogger("baco.access").info("%s", json_line({"path": EVIL}))
    assert json.loads(lines.getvalue()) == {"path": EVIL}
    logging.getLogger("baco.serve").error("cannot read %s", EVIL)
    assert "\\x1b]0;owned" in faults.getvalue()
    assert not STEERS.search(lines.getvalue() + faults.getvalue())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_server_continues_when_its_access_log_cannot_be_written(
    logs: Callable[[io.TextIOBase], io.StringIO],
) -> None:
    with StandardOutput(Path("/dev/full").open("wb", buffering=0), encoding="utf-8") as disk:
        faults = logs(disk)
        for _ in range(3):
            logging.getLogger("baco.access").info("a request")
    assert faults.getvalue().count("\n") == 1
    assert "the access log cannot be written: cannot write to standard output" in faults.getvalue()


# --- pictures and pages ---------------------------------------------------------------------------


@given(text=TEXTS)
def test_a_drawing_is_well_formed_for_any_prompt(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawing.svg"
    settings: dict[str, Any] = {"n": 1, "seed": 0, "switch": "word", "system": text}
    draw_svg(path, command_line(text, "demo", "P:0.3", settings), coloured([Piece(text, "base")]))
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


@given(TEXTS)
def test_only_characters_that_xml_forbids_are_replaced(text: str) -> None:
    clean = well_formed(text)
    read = ElementTree.fromstring(f"<a><![CDATA[{clean.replace(']]>', '')}]]></a>").text or ""
    assert read == re.sub("\r\n?", "\n", clean.replace("]]>", ""))  # XML's own line ends
    changed = {before for before, after in zip(text, clean, strict=True) if before != after}
    for character in changed - {"\x7f", *map(chr, range(0x80, 0xA0))}:  # which HTML alone forbids
        if not 0xFDD0 <= ord(character) <= 0xFDEF and ord(character) & 0xFFFE != 0xFFFE:
            assert not XML.match(character)


def test_plots_with_such_names_are_well_formed() -> None:
    altair = pytest.importorskip("altair")
    from baco.evaluation.report import plots

    rows = [{"x": 1, "y": 2, "method": EVIL.replace("\ud800", "")}]
    chart = altair.Chart(altair.Data(values=rows)).mark_point().encode(x="x:Q", y="method:N")
    spec = plots.finished(chart, f"Coverage on {EVIL}")
    root = ElementTree.fromstring(plots.svg(spec))
    assert any("owned" in "".join(element.itertext()) for element in root.iter())
    assert plots.png(spec).startswith(b"\x89PNG")


def test_the_demo_pair_answers_such_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "Hi \x1b[2J there", "-s", "1", "--max-tokens", "3", "--json"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output)["prompt"] == "Hi \x1b[2J there"
    assert not STEERS.search(output)
