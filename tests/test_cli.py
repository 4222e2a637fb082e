"""The command line in real processes, with real pipes and a real terminal."""

import fcntl
import inspect
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from baco import Baco
from baco.batch import answer_file as answer_file_job
from baco.cli import run
from baco.cli.options import grouped
from baco.sampling.seeds import NOISE_VERSION
from tests.held import held, lines_in
from tests.pairs import PairFolder

PROMPT = "Recommend a summer destination"
BACO = [sys.executable, "-c", "from baco.cli import main; main()"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def call(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BACO, *arguments], capture_output=True, text=True, input=stdin, timeout=280, check=False
    )


def in_terminal(*arguments: str) -> str:
    """The output in a terminal of 100 columns, escape sequences included."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(
        [*BACO, *arguments], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    received = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        received += data
    assert process.wait() == 0, received.decode()
    os.close(leader)
    return received.decode()


def test_json_is_one_object_with_all_provenance(demo: Baco) -> None:
    done = call("generate", PROMPT, "-n", "3", "-r", "P-Punc:0.4", "-s", "7", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["prompt"], record["router"], record["seed"]) == (PROMPT, "P-Punc:0.4", 7)
    expected = demo.generate(PROMPT, n=3, router="P-Punc:0.4", seed=7)
    for sample, completion in zip(record["samples"], expected, strict=True):
        assert sample["text"] == completion.text
        assert sample["token_ids"] == list(completion.token_ids)
        assert sample["sources"] == list(completion.sources)
        assert sample["switches"] == completion.switches
        assert sample["finish_reason"] == completion.finish_reason
        assert sample["base_share"] == pytest.approx(completion.base_share, abs=1e-4)


def test_a_pipe_gets_the_answers_and_nothing_else_and_stdin_gives_the_prompt(demo: Baco) -> None:
    done = call("generate", "-n", "2", "-r", "Rand:0.5", "-s", "3", stdin=PROMPT + "\n")
    assert done.returncode == 0, done.stderr
    first, second = demo.generate(PROMPT, n=2, router="Rand:0.5", seed=3)
    assert done.stdout == f"1. {first.text}\n\n2. {second.text}\n"
    assert "base share" in done.stderr
    assert "distinct answers 2 of 2" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_terminal_gets_each_word_in_the_style_of_its_source(demo: Baco) -> None:
    received = in_terminal("generate", PROMPT, "-n", "2", "-r", "P-Punc:0.4", "-s", "1")
    assert "38;2;213;94;0" in received  # the base's vermilion
    assert "38;2;0;114;178" in received  # the aligned model's blue
    last = received[received.rindex("\x1b[1m1. ") :]  # the final picture, after the live ones
    styled = re.findall(r"\x1b\[([0-9;]+)m([^\x1b]+)\x1b\[0m", last)
    base = " ".join("".join(t for style, t in styled if "213;94;0" in style).split())
    completion = demo.generate(PROMPT, n=2, router="P-Punc:0.4", seed=1)[0]
    for piece in completion.pieces:
        if piece.source == "base":
            assert piece.text.strip() in base
    assert all("4" in style.split(";") for style, _ in styled if "213;94;0" in style)
    plain = " ".join(ESCAPE.sub("", received).split())
    assert "distinct answers 2 of 2" in plain


def test_comparing_shows_both_models_and_baco_on_one_seed(demo: Baco) -> None:
    done = call("generate", PROMPT, "--compare", "-n", "2", "-s", "4", "-r", "P-FC:0.4", "--json")
    record = json.loads(done.stdout)
    for name, router in (("base", "Base"), ("aligned", "Aligned"), ("baco", "P-FC:0.4")):
        texts = [c.text for c in demo.generate(PROMPT, n=2, router=router, seed=4)]
        assert [sample["text"] for sample in record[name]["samples"]] == texts
    piped = call("generate", PROMPT, "--compare", "-n", "2", "-s", "4", "-r", "P-FC:0.4")
    assert piped.stderr == "seed 4\n"
    shown = piped.stdout
    assert [line for line in shown.splitlines() if line.startswith("==")] == [
        "== Base",
        "== Aligned",
        "== P-FC:0.4",
    ]


def test_the_dial_turns_the_diversity_from_the_aligned_models_own_upwards() -> None:
    shares = []
    for dial in ("0", "0.5", "1"):
        done = call("generate", PROMPT, "-n", "6", "-d", dial, "-s", "2", "--json")
        assert done.returncode == 0, done.stderr
        samples = json.loads(done.stdout)["samples"]
        shares.append(sum(sample["base_share"] for sample in samples))
    assert shares[0] == 0 < shares[1] < shares[2]


def test_without_a_router_p_punc_speaks_at_the_pairs_calibrated_middle(demo: Baco) -> None:
    from baco.calibration.store import Calibration

    calibration = Calibration.load(demo.pair)
    assert calibration is not None
    record = json.loads(call("generate", PROMPT, "--json").stdout)
    assert record["router"] == f"P-Punc:{calibration.threshold('P-Punc', 0.5):g}"


def test_the_drawing_is_an_svg_of_the_coloured_answers(tmp_path: Path) -> None:
    target = tmp_path / "answers.svg"
    done = call("generate", PROMPT, "-n", "2", "-s", "1", "--svg", str(target))
    assert done.returncode == 0, done.stderr
    drawing = target.read_text()
    assert drawing.startswith("<svg")
    assert "#d55e00" in drawing.lower()
    assert "#0072b2" in drawing.lower()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": f"Give me dinner idea {i}", "id": i} for i in range(5)]
    rows.append({"messages": [{"role": "user", "content": PROMPT}], "id": "chat"})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer_file(prompts: Path, out: Path, *more: str) -> list[str]:
    options = ["-n", "2", "-r", "P-Punc:0.4", "-s", "5", "--max-tokens", "16", *more]
    return ["generate", "--jsonl", str(prompts), "-o", str(out), *options]


def test_a_file_of_prompts_becomes_a_file_of_answers(
    prompts: Path, tmp_path: Path, demo: Baco
) -> None:
    out = tmp_path / "out.jsonl"
    assert run(answer_file(prompts, out)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4, "chat"]
    expected = demo.generate(PROMPT, n=2, router="P-Punc:0.4", seed=5, max_tokens=16)
    assert [sample["text"] for sample in rows[-1]["samples"]] == [c.text for c in expected]
    assert not list(tmp_path.glob("*.partial"))


def test_a_killed_run_is_resumed_and_ends_with_the_same_bytes(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_file_job, "ANSWERS_A_WRITE", 2)  # one prompt a write
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert run(answer_file(prompts, whole)) == 0
    partial = tmp_path / "stopped.jsonl.partial"
    child = subprocess.Popen(
        held(answer_file(prompts, stopped), lines_in(partial, 3)), stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 240
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < until
        assert child.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not stopped.exists()
    with partial.open("ab") as file:
        file.write(b'{"id": 3, "prompt": "torn')
    assert run(answer_file(prompts, stopped)) == 0
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_run_of_other_settings_is_not_mixed_in(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    head = {"settings": {"router": "P:0.1", "noise": NOISE_VERSION}, "seed": 5}
    (tmp_path / "out.jsonl.partial").write_text(json.dumps(head) + "\n")
    assert run(answer_file(prompts, out)) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    out.write_text("")
    assert run(answer_file(prompts, out)) == 2
    assert "is there already" in capsys.readouterr().err


BAD: list[tuple[list[str], str]] = [
    (["generate", PROMPT, "-r", "Best:0.4"], "unknown router 'Best:0.4'"),
    (["generate", PROMPT, "-r", "P:2"], "threshold 2, expected a number from 0 to 1"),
    (["generate", PROMPT, "-n", "0"], "n is 0: give a whole number from 1"),
    (["generate", PROMPT, "-n", "two"], "valid integer"),
    (["generate", PROMPT, "--temperature", "-1"], "temperature is -1"),
    (["generate", PROMPT, "--switch", "line"], "use word or token"),
    (["generate", PROMPT, "-d", "2"], "diversity is 2"),
    (["generate", PROMPT, "-d", "0.5", "-r", "P-Punc:0.4"], "leave out --diversity"),
    (["generate", ""], "the prompt is empty"),
    (["generate", "word " * 600], "context window is 512"),
    (["generate", PROMPT, "--pair", "nowhere"], "unknown pair 'nowhere'"),
    (["generate", PROMPT, "--base", "./no", "--aligned", "./no"], "no such model folder: ./no"),
    (["generate", PROMPT, "--base", "./no"], "give both base and aligned"),
    (["generate", PROMPT, "--jsonl", "in.jsonl"], "go together"),
    (["generate", "--jsonl", "no.jsonl", "-o", "x"], "cannot read no.jsonl"),
    (["generate", PROMPT, "--svg", "no/where.svg"], "no such folder"),
    (["generate", PROMPT, "--svg", "."], "it is a folder"),
    (["generate", "--jsonl", "in.jsonl", "-o", "."], "it is a folder"),
    (["generate", PROMPT, "--base", "~no-such-user/x.gguf", "--aligned", "x.gguf"], "no such user"),
    (["generate", PROMPT, "--device", "toaster"], "device 'toaster'"),
    (["generate", PROMPT, "--dtype", "float3"], "dtype 'float3'"),
    (["generate", PROMPT, "--base-template", "no.jinja"], "neither Jinja text nor a readable"),
    (["generate", PROMPT, "--nonsense"], "see 'baco generate --help'"),
    (["calibrate", "--router", "P:0.4"], "without it"),
    (["calibrate", "--router", "Punc"], "takes a threshold"),
    (["calibrate", "--base-share", "1.5"], "base-share is 1.5"),
    (["calibrate", "--prompts", "no.txt"], "cannot read no.txt"),
    (["sing"], "see 'baco --help'"),
    (["pair", "sing"], "see 'baco pair --help'"),
    (["pair", "export"], "Missing argument 'DIRECTORY'; see 'baco pair export --help'"),
    (["demo", "train"], "see 'baco demo train --help'"),
    (["demo", "train", "--out", "/dev/null/x", "--no-table"], "cannot read or write /dev/null/x"),
    (["pair", "export", "/dev/null/x"], "cannot read or write /dev/null/x: Not a directory"),
    (["pair", "export", "/dev/null/x", "--gguf", "f16"], "cannot read or write /dev/null"),
    (["batch", "in.jsonl"], "missing argument OUT"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_gets_one_clear_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2: give a JSON object"), ('{"prompt": " "}', "line 2: the prompt is empty")],
)
def test_a_bad_line_of_a_prompt_file_is_named_by_its_number(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"prompt": "x"}}\n{line}\n')
    assert run(answer_file(path, tmp_path / "out")) == 2
    assert message in capsys.readouterr().err


def test_options_that_need_one_tokenizer_refuse_two_in_one_line(
    random_pair: Callable[..., PairFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    from baco.models.known_pairs import demo_folder as path

    other = random_pair("llama", noise=0.3)
    pair = ["--base", str(other.base), "--aligned", str(path() / "aligned")]
    for option, reason in (
        (["--draft", str(other.base)], "a draft model needs one tokenizer for both models"),
        (["-r", "Gap:1"], "Gap:1 compares the distributions of both models"),
    ):
        assert run(["generate", PROMPT, *pair, *option]) == 2
        assert reason in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_reader_that_closes_the_pipe_early_is_not_an_error() -> None:
    command = " ".join(f"'{part}'" for part in [*BACO, "generate", PROMPT, "-n", "8"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 10"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_control_c_stops_without_a_traceback() -> None:
    child = subprocess.Popen(
        [*BACO, "generate", PROMPT, "-n", "2000", "--temperature", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=240)
    assert child.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.strip().endswith("interrupted")


def test_help_is_quick_and_every_command_has_an_example() -> None:
    probe = "import sys; from baco.cli import run; run(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("generate", "routers", "pairs", "diagnose", "calibrate", "demo train"):
        shown = call(*command.split(), "--help").stdout
        assert f"Example: baco {command}" in " ".join(shown.split())


LISTS = {
    "routers": "P-Punc",
    "pairs": "qwen2.5-7b",
    "tasks": "gsm8k",
    "methods": "verbalized",
    "metrics": "self_bleu",
}


@pytest.mark.parametrize("name", LISTS)
def test_routers_and_pairs_are_listed_as_text_and_as_json(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert LISTS[name] in [row["name"] for row in rows]
    assert run([name]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in rows:
        [line] = [line for line in lines if line.split("  ")[0] == row["name"]]
        copied = [row[k] for k in ("base", "aligned", "example", "help", "sentence") if k in row]
        for text in copied if row["name"] != "demo" else []:
            assert text in line
        assert line == line.rstrip()


@pytest.mark.parametrize("columns", [30, 80, 200])
@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_never_cut_on_a_terminal(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run([name, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([name]) == 0
    shown = ESCAPE.sub("", capsys.readouterr().out)
    assert "…" not in shown
    words = " ".join(shown.split())
    for row in rows:
        for key in ("name", "example", "base", "aligned") if row["name"] != "demo" else ("name",):
            assert row.get(key, "") in shown  # what one wants to copy is in one piece
        for key in ("help", "sentence"):
            assert all(word in words for word in row.get(key, "").rstrip(".").split())


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("p-punc:0.4", "P-Punc:0.4"), ("ALIGNED", "Aligned"), ("punc-FC-h:1.5", "H-Punc-FC:1.5")],
)
def test_a_routers_name_may_be_typed_in_any_case_and_is_shown_as_it_is_listed(
    typed: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = ["generate", PROMPT, "-s", "1", "--max-tokens", "3"]
    assert run([*draw, "-r", typed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["router"] == shown
    assert run([*draw, "-r", typed]) == 0
    assert capsys.readouterr().err.endswith(f" · {shown}\n")


def test_the_dial_and_comparisons_know_a_router_in_any_case(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    draw = ["generate", PROMPT, "-s", "1", "--max-tokens", "3"]
    assert run([*draw, "-r", "punc-p", "-d", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["router"].startswith("P-Punc:")
    assert run([*draw, "-r", "base", "--compare"]) == 2
    assert "--compare shows Base anyway" in capsys.readouterr().err
    prompts, curve = tmp_path / "in.txt", tmp_path / "curve.json"
    prompts.write_text(PROMPT + "\n")
    quick = ["--prompts", str(prompts), "-n", "2", "--max-tokens", "2", "-o", str(curve), "--json"]
    assert run(["calibrate", "-r", "fc-RAND", *quick]) == 0
    assert json.loads(capsys.readouterr().out)["router"].startswith("Rand-FC:")
    assert "Rand-FC" in json.loads(curve.read_text())["curves"]


def test_a_group_of_options_becomes_options_of_a_command_in_its_place() -> None:
    @dataclass(frozen=True, slots=True)
    class Size:
        width: Annotated[int, typer.Option("--width", "-w")] = 2
        height: Annotated[int, typer.Option("--height")] = 3
        depth: Annotated[int, typer.Option("--depth")] = 4

    received: list[tuple[str, Size, bool]] = []

    @grouped(without=["depth"])
    def draw(
        *,
        name: Annotated[str, typer.Argument()],
        size: Size,
        fill: Annotated[bool, typer.Option("--fill")] = False,
    ) -> None:
        received.append((name, size, fill))

    app = typer.Typer()
    app.command()(draw)
    for arguments in (["box"], ["box", "--fill", "-w", "7"]):
        app(arguments, standalone_mode=False)
    assert received == [("box", Size(2, 3, 4), False), ("box", Size(7, 3, 4), True)]
    assert list(inspect.signature(draw).parameters) == ["name", "width", "height", "fill"]
    with pytest.raises(typer.TyperException, match="depth"):
        app(["box", "--depth", "1"], standalone_mode=False)


def test_an_interrupt_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    # In the place of a library that the command line imports.
    (tmp_path / "rich.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "finally:\n"
        "    raise ImportError('it was interrupted')\n"
    )
    path = os.pathsep.join((str(tmp_path), *sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "baco", "routers"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "baco: interrupted\n")
