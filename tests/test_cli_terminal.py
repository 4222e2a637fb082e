"""The terminal display, interrupted and resumed runs, and odd input."""

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from typer.main import get_command

from baco import Baco
from baco.batch import answer_file
from baco.cli import app, run
from baco.cli.console import coloured
from baco.cli.svg import command_line
from baco.text.answer_text import Piece
from tests.held import held

PROMPT = "Recommend a summer destination"
BACO = [sys.executable, "-c", "from baco.cli import main; main()"]
COLOUR = re.compile(r"\x1b\[[0-9;]*38;[0-9;]*m")
STYLE = re.compile(r"\x1b\[[0-9;]*m")
CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]")  # everything but styles


def in_terminal(
    *arguments: str,
    rows: int,
    columns: int,
    interrupt_at: str | None = None,
    **variables: str,
) -> tuple[str, int]:
    """Output in a terminal of this size, and the exit code.

    Decoding stops after 30 steps where SIGINT is to be sent when a text appears.
    """
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | variables
    command = [*BACO, *arguments]
    if interrupt_at is not None:
        command = held([*arguments], "engine.stats.steps >= 30")
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    received = ""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        received += data.decode(errors="replace")
        if interrupt_at is not None and interrupt_at in received:
            process.send_signal(signal.SIGINT)
            interrupt_at = None
    os.close(leader)
    return received, process.wait(timeout=240)


def words(received: str) -> str:
    return " ".join(CURSOR.sub("", STYLE.sub("", received)).split())


def test_answers_taller_than_the_screen_are_all_shown_in_order_in_the_end(demo: Baco) -> None:
    received, code = in_terminal(
        "generate", PROMPT, "-n", "12", "-r", "P-Punc:0.4", "-s", "1", rows=8, columns=60
    )
    assert code == 0
    shown, place = words(received), 0
    for number, completion in enumerate(demo.generate(PROMPT, n=12, router="P-Punc:0.4", seed=1)):
        answer = f"{number + 1}. " + " ".join(completion.text.split())
        place = shown.index(answer, place)
    assert "distinct answers" in shown[place:]


def test_an_interrupt_keeps_the_text_written_so_far(demo: Baco) -> None:
    received, code = in_terminal(
        *("generate", PROMPT, "-n", "3", "-r", "Rand:0.5", "-s", "1", "-t", "2"),
        *("--max-tokens", "400", "--min-p", "0"),
        rows=40,
        columns=80,
        interrupt_at="3. \x1b[0m",
    )
    assert code == 130
    kept = words(received[received.rindex("\x1b[?25h") :])  # after the live picture went
    assert re.search(r"3\. \S+.*interrupted$", kept)
    whole = demo.generate(
        PROMPT, n=3, router="Rand:0.5", temperature=2.0, min_p=0.0, max_tokens=400, seed=1
    )
    for number, completion in enumerate(whole, 1):  # one that ended before stands above
        stands = f"{number}. {' '.join(completion.text.split())}" in words(received)
        assert stands or re.search(rf"\b{number}\. \S+", kept)
    assert "Traceback" not in received


def test_no_color_leaves_the_underlines_of_the_base_alone() -> None:
    received, code = in_terminal(
        *("generate", PROMPT, "-r", "P-Punc:0.4", "-s", "1", "--max-tokens", "12"),
        rows=30,
        columns=80,
        NO_COLOR="1",
    )
    assert code == 0
    assert not COLOUR.search(received)
    assert "\x1b[4m" in received


def test_forced_colours_in_a_pipe_move_no_cursor() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    done = subprocess.run(
        [*BACO, "generate", PROMPT, "-n", "2", "-r", "P-Punc:0.4", "-s", "1"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert COLOUR.search(done.stdout)
    assert not CURSOR.search(done.stdout)


def test_a_single_answer_in_a_pipe_is_its_text_alone(
    demo: Baco, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", PROMPT, "-r", "P-Punc:0.4", "-s", "6"]) == 0
    assert (
        capsys.readouterr().out == demo.generate(PROMPT, router="P-Punc:0.4", seed=6)[0].text + "\n"
    )


def test_answers_cannot_send_control_sequences_to_the_terminal() -> None:
    text = coloured([Piece("one\x1b[2J two\r\n", "base"), Piece("\x07three\x9b", "aligned")])
    assert text.plain == "one\ufffd[2J two\n\ufffdthree\ufffd"


def test_words_are_styled_and_the_spaces_between_them_are_not() -> None:
    text = coloured([Piece("two", "base"), Piece(" words", "base"), Piece(" here", "aligned")])
    styled = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert set(styled) == {"two", "words", "here"}
    assert "underline" in styled["two"]
    assert "underline" not in styled["here"]


def test_the_command_in_a_drawing_holds_all_that_the_answers_depend_on() -> None:
    settings = {"n": 2, "seed": 3, "system": None, "switch": "word", "stop": ("a b", "c")}
    command = command_line('Say "hi"', "demo", "P:0.3", settings | {"top_k": 5})
    assert command.startswith('baco generate "Say \\"hi\\"" -n 2 --router P:0.3 --seed 3')
    assert command.endswith('--stop "a b" --stop "c" --top-k 5')


def test_the_command_in_a_drawing_has_the_options_of_the_command_line() -> None:
    settings = {
        "n": 1,
        "seed": 3,
        "dry_multiplier": 0.8,
        "dry_breakers": ("x",),
        "samplers": ("top_n_sigma:1", "p_less"),
        "choice": ["a", "b c"],
        "schema": {"type": "object"},
    }
    command = command_line("Hi", "some/base + some/aligned", "P:0.3", settings)
    generate = get_command(app).commands["generate"]  # type: ignore[attr-defined]
    parsed = generate.make_context("generate", shlex.split(command)[2:]).params
    assert (parsed["base"], parsed["aligned"]) == ("some/base", "some/aligned")
    assert (parsed["dry_breaker"], parsed["sampler"]) == (["x"], ["top_n_sigma:1", "p_less"])
    assert (parsed["choice"], parsed["schema"]) == (["a", "b c"], Path("FILE"))


def prompt_file(folder: Path, *prompts: str) -> Path:
    path = folder / "in.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def command(prompts: Path, out: Path) -> list[str]:
    options = ["-n", "2", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "8"]
    return ["generate", "--jsonl", str(prompts), "-o", str(out), *options]


def test_a_prompt_may_hold_the_fields_of_an_answer(tmp_path: Path) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    messages = [{"role": "user", "content": "Hi", "finish_reason": "error", "error": "none"}]
    prompts.write_text(json.dumps({"messages": messages}) + "\n")
    assert run(command(prompts, out)) == 0
    assert json.loads(out.read_text())["prompt"] == messages
    assert sorted(tmp_path.iterdir()) == [prompts, out]


def test_a_prompt_may_hold_any_line_separator_of_unicode(tmp_path: Path) -> None:
    prompts = ["one\u2028two", "one\x85two"]
    out = tmp_path / "out.jsonl"
    assert run(command(prompt_file(tmp_path, *prompts), out)) == 0
    assert [json.loads(line)["prompt"] for line in out.read_bytes().splitlines()] == prompts


def test_a_stopped_run_is_resumed_at_the_border_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_file, "ANSWERS_A_WRITE", 4)  # two prompts a batch
    prompts = prompt_file(tmp_path, *(f"Suggest a hobby for day {day}" for day in range(5)))
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    monkeypatch.setattr(answer_file.AnswerFile, "finish", lambda _: None)
    assert run(command(prompts, whole)) == 0
    lines = (tmp_path / "whole.jsonl.partial").read_bytes().splitlines(keepends=True)
    monkeypatch.undo()
    monkeypatch.setattr(answer_file, "ANSWERS_A_WRITE", 4)
    (tmp_path / "stopped.jsonl.partial").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    batches: list[int] = []
    stream = Baco.stream_batch

    def watched(self: Baco, prompts: list[str], **settings: object) -> object:
        batches.append(len(prompts))
        return stream(self, prompts, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Baco, "stream_batch", watched)
    assert run(command(prompts, stopped)) == 0
    assert batches == [2, 1]
    assert stopped.read_bytes() == b"".join(lines[1:])


def test_a_run_is_not_resumed_with_another_text_in_the_file_of_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template, out = tmp_path / "base.jinja", tmp_path / "out.jsonl"
    template.write_text("{{ messages[0].content }}{{ answer_lead }}")
    begun = [*command(prompt_file(tmp_path, "one", "two"), out), "--base-template", str(template)]
    with monkeypatch.context() as context:
        context.setattr(answer_file.AnswerFile, "finish", lambda _: None)
        assert run(begun) == 0
    template.write_text("Q: {{ messages[0].content }}{{ answer_lead }}")
    assert run(begun) == 2
    stderr = " ".join(capsys.readouterr().err.split())
    assert "was begun with other settings (fingerprint)" in stderr


@pytest.mark.parametrize(
    ("begun", "message"),
    [("not ours\n", "was not begun by this command"), ("[]\n", "was not begun by this command")],
)
def test_a_partial_file_of_something_else_is_left_as_it_is(
    begun: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(begun)
    assert run(command(prompt_file(tmp_path, "x"), tmp_path / "out.jsonl")) == 2
    assert message in capsys.readouterr().err
    assert partial.read_text() == begun


def test_a_prompt_longer_than_the_context_is_refused_before_the_first_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = prompt_file(tmp_path, "short", "word " * 600)
    assert run(command(prompts, tmp_path / "out.jsonl")) == 2
    stderr = capsys.readouterr().err
    assert "in.jsonl, line 2: " in stderr
    assert "context window is 512" in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_output_that_cannot_be_written_is_refused_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Baco, "load", lambda *_, **__: pytest.fail("loaded"))
    prompts = prompt_file(tmp_path, "x")
    assert run(command(prompts, tmp_path / "no" / "out.jsonl")) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "out.jsonl").touch()
    assert run(command(prompts, tmp_path / "out.jsonl")) == 2
    assert "is there already" in capsys.readouterr().err


def test_running_out_of_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 GB.\n")

    monkeypatch.setattr(Baco, "load", load)
    assert run(["generate", PROMPT]) == 2
    stderr = capsys.readouterr().err
    assert "out of memory" in stderr
    assert stderr.count("\n") == 1


def test_a_prompt_that_is_not_utf_8_is_refused() -> None:
    done = subprocess.run(
        [*BACO, "generate"], input=b"caf\xe9", capture_output=True, check=False, timeout=240
    )
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_no_command_shows_the_help_and_no_complaint(capsys: pytest.CaptureFixture[str]) -> None:
    run([])
    captured = capsys.readouterr()
    assert "generate" in captured.out + captured.err
    assert "baco: " not in captured.err
