"""Files that llama.cpp cannot run are refused in one line."""

from pathlib import Path

import gguf
import pytest

from baco import Baco, BacoError
from baco.cli import run
from tests.test_gguf import tiny_model, write_gguf
from tests_llamacpp.files import write_demo


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_demo(tmp_path_factory.mktemp("demo"))["aligned"]


def refused(capsys: pytest.CaptureFixture[str], base: str, aligned: str, *more: str) -> str:
    command = ["generate", "Hello", "--base", base, "--aligned", aligned, *more]
    assert run(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    (error,) = (line for line in lines if "by llama.cpp on cpu" not in line)
    return error


def changed(good: str, target: Path, old: bytes, new: bytes) -> str:
    assert len(old) == len(new)
    content = Path(good).read_bytes()
    assert old in content
    target.write_bytes(content.replace(old, new, 1))
    return str(target)


def test_an_architecture_that_nothing_knows(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.gguf"
    content = Path(good).read_bytes().replace(b"llama", b"lamma")
    path.write_bytes(content)
    assert "lamma" in refused(capsys, str(path), good)


def test_a_number_format_that_nothing_knows(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(Path(good).read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    field = reader.tensors[0].field
    field.parts[-2][0] = 99  # the type of the first tensor
    reader.data.flush()
    del reader, field
    assert "99" in refused(capsys, str(path), good)


def test_a_file_that_is_cut_off(
    good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(Path(good).read_bytes()[:-100_000])
    assert "cut off" in refused(capsys, str(path), good)


def test_files_of_different_vocabularies_where_one_tokenizer_is_asked_for(
    good: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "other.gguf", tiny_model(0))
    with pytest.raises(BacoError, match="vocabularies differ at token"):
        Baco.load(base=str(tmp_path / "other.gguf"), aligned=good, separate_tokenizers=False)


def test_an_answer_that_memory_cannot_hold(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, good, good, "--memory", "1MiB", "-s", "1", "-r", "P:0.3")
    assert "of cache and memory is 1.0 MiB" in error


def test_a_device_that_llama_cpp_does_not_have(
    good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give cpu or gpu" in refused(capsys, good, good, "--device", "cuda:1")
