"""Standard streams that are closed, full or not read, and messages of libraries in them."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baco.cli import run
from baco.cli.console import StandardOutput
from tests.pairs import PairFolder

PROMPT = ["generate", "Hi", "-s", "1", "--max-tokens", "3"]
COMMANDS = {
    "routers": ["routers"],
    "json": ["pairs", "--json"],
    "help": ["--help"],
    "version": ["--version"],
    "generate": PROMPT,
    "several": [*PROMPT, "-n", "2"],
    "compare": [*PROMPT, "--compare"],
    "object": [*PROMPT, "--json"],
    "chat": ["chat", "--max-tokens", "3"],
}
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def call(arguments: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
    settings: dict[str, Any] = {"input": b"Hi\n", "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-m", "baco", *arguments]
    done: subprocess.CompletedProcess[bytes] = subprocess.run(command, check=False, **settings)
    return done


def closing(*numbers: int) -> Callable[[], None]:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@needs_full
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_behind_standard_output_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    with StandardOutput(FULL.open("wb", buffering=0), encoding="utf-8") as disk:
        monkeypatch.setattr("sys.stdout", disk)
        assert run(COMMANDS[name]) == 2
    stderr = capsys.readouterr().err
    assert stderr == "baco: cannot write to standard output: No space left on device\n"


@needs_full
def test_a_program_on_a_full_disk_ends_without_a_traceback() -> None:
    with FULL.open("wb") as disk:
        done = call(PROMPT, stdout=disk)
    assert done.returncode == 2
    assert done.stderr == b"baco: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("name", ["routers", "version"])
def test_closed_standard_output_is_one_line(name: str) -> None:
    done = call(COMMANDS[name], preexec_fn=closing(1))
    assert done.returncode == 2
    assert done.stderr.decode().startswith("baco: standard output is closed")
    assert done.stderr.count(b"\n") == 1


def test_closed_standard_error_and_input_are_not_an_error() -> None:
    done = call(PROMPT, stdout=subprocess.PIPE, stdin=None, input=None, preexec_fn=closing(0, 2))
    assert done.returncode == 0
    assert done.stdout.strip()


def test_an_output_file_never_gets_the_descriptor_of_closed_standard_error(
    tmp_path: Path,
) -> None:
    """Messages of libraries on standard error would go into it."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hi"}\n')
    code = (
        "import os, sys; from baco.batch.answer_file import AnswerFile; from baco.cli import main\n"
        "finish = AnswerFile.finish\n"
        "def noisy(self): os.write(2, b'library'); return finish(self)\n"
        "AnswerFile.finish = noisy\n"
        f"sys.argv = ['baco', 'generate', '--jsonl', {str(source)!r}, '-o', {str(out)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, preexec_fn=closing(2))
    assert done.returncode == 0
    assert "library" not in out.read_text()
    assert out.read_text().count("\n") == 1


@pytest.mark.parametrize("name", ["help", "routers"])
def test_a_broken_pipe_is_quiet(name: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = call(COMMANDS[name], stdout=nobody)
    assert done.stderr == b""


def test_output_in_an_encoding_that_lacks_a_character_is_one_line() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = call(["routers"], stdout=subprocess.PIPE, env=environment)
    stderr = done.stderr.decode()
    assert done.returncode == 2
    assert stderr.startswith("baco: standard output is in ascii, which has no ")
    assert "PYTHONIOENCODING=utf-8" in stderr
    assert stderr.count("\n") == 1


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyError("no\nsuch\x1bthing")

    monkeypatch.setattr("baco.Baco.load", load)
    assert run(PROMPT) == 1
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert stderr.startswith("baco: unexpected KeyError: ")
    assert "--debug" in stderr
    monkeypatch.setenv("BACO_DEBUG", "1")
    assert run(PROMPT) == 1
    assert "Traceback" in capsys.readouterr().err


# --- libraries ------------------------------------------------------------------------------------


def test_messages_of_libraries_do_not_appear_in_our_output(
    random_pair: Callable[..., PairFolder],
) -> None:
    folder = random_pair("llama")
    pair = ["--base", str(folder.base), "--aligned", str(folder.aligned), "-r", "P:0.5"]
    done = call([*PROMPT, *pair], stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr.decode().startswith("base share ")
    assert done.stderr.count(b"\n") == 1


TORCHAO = """
import sys
from baco import Baco
from baco.cli import run
from baco.cli.console import StandardOutput
{load}
print([name for name in sys.modules if name.partition(".")[0] == "torchao"])
"""


def torchao_modules(load: str) -> str:
    code = TORCHAO.format(load=load)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_torchao_is_imported_for_quantised_models_alone(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    assert torchao_modules(f"run({PROMPT!r})") == "[]"
    folder = random_pair("llama")
    where = f"base={str(folder.base)!r}, aligned={str(folder.aligned)!r}"
    # The function that transformers was given a stand-in for still saves quantised weights.
    saved = (
        f"baco = Baco.load({where}, dtype='float32'); "
        f"baco = Baco.load({where}, dtype='float32', quantize='int8', packed=False); "
        f"baco.pair.base.model.save_pretrained({str(tmp_path)!r}); "
        f"baco = Baco.load(base={str(tmp_path)!r}, aligned={str(folder.aligned)!r}); "
        "assert 'bits a weight' in baco.pair.base.weights_format, baco.pair.base.weights_format"
    )
    (tmp_path / "tokenizer.json").write_bytes((folder.base / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(
        (folder.base / "tokenizer_config.json").read_bytes()
    )
    assert "torchao.quantization" in torchao_modules(saved)


def test_an_adapter_needs_no_torchao(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = random_pair("llama")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = AutoModelForCausalLM.from_pretrained(folder.base)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder.aligned).save_pretrained(tmp_path)
    where = f"base={str(folder.base)!r}, aligned={str(tmp_path)!r}"
    load = f"print(len(Baco.load({where}).generate('Hi', router='P:0.5', max_tokens=2)))"
    assert torchao_modules(load) == "[]"
