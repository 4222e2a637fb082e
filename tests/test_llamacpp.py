"""The llamacpp backend where llama-cpp-python is missing, or a pair does not suit it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco
from baco.backends import backend_of
from baco.batch.answer_file import AnswerFile
from baco.batch.rows import read_rows
from baco.batch.shards import begun_backend
from baco.cli import run
from baco.engine.draft import ModelOutput
from baco.engine.speculative.acceptance import AcceptanceStats
from baco.engine.speculative.self_draft import SelfDraft
from baco.errors import BacoError
from baco.evaluation.plan import PairSpec
from baco.models.known_pairs import KnownPair
from baco.models.llama_cpp import library
from baco.models.llama_cpp_pair import suits
from tests.test_gguf import tiny_model, write_gguf

PROMPT = "Where should I go this summer?"
PAIR = KnownPair("two files", "base.gguf", "aligned.gguf")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PACKAGE", "a_package_that_is_not_there")
    library.library.cache_clear()


@pytest.fixture
def file(tmp_path: Path) -> str:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", tiny_model(0))
    return str(tmp_path / "model.gguf")


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run(["generate", PROMPT, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    return error


def test_without_the_library_a_gguf_pair_is_dequantised(missing: None, file: str) -> None:
    baco = Baco.load(base=file, aligned=file)
    assert baco.capabilities.name == "local"
    assert baco.generate(PROMPT, router="P:0.3", max_tokens=4, seed=1)[0].error is None


def test_without_the_library_the_backend_is_refused_in_one_line(
    missing: None, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "--base", file, "--aligned", file, "--backend", "llamacpp")
    assert "needs llama-cpp-python" in error
    assert "pip install 'baco[llamacpp]'" in error and "C++ compiler" in error


def test_a_pair_that_is_no_gguf_file_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refused(capsys, "--pair", "demo", "--backend", "llamacpp")
    assert "is no GGUF file" in error and "--backend local" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "takes no dtype"),
        ({"quantize": "int8"}, "takes no quantize"),
        ({"draft": "model"}, "draft and compile are options of the local backend"),
        ({"compile": True}, "draft and compile are options of the local backend"),
    ],
)
def test_options_of_pytorch_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BacoError, match=message):
        Baco.load(base="base.gguf", aligned="aligned.gguf", backend="llamacpp", **options)


def test_llama_cpp_is_chosen_for_gguf_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PACKAGE", "json")  # is there
    assert suits(PAIR, ["chat_template", "device"])
    assert not suits(PAIR, ["dtype"])
    assert not suits(KnownPair("mixed", "base.gguf", "folder"), [])


def test_the_backend_is_read_off_the_formats_of_weights() -> None:
    form = "Q4_1, 5.7 bits a weight, by llama.cpp on cpu"
    assert backend_of({"base": form, "aligned": form}) == "llamacpp"
    assert backend_of({"base": "bfloat16 on cpu", "aligned": "bfloat16 on cpu"}) == "local"


def test_an_output_that_was_begun_keeps_its_backend(tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    answers = AnswerFile(out, read_rows([prompts]), {"n": 1})
    assert answers.begun_backend() is None
    for form, backend in (("Q4_1, by llama.cpp on cpu", "llamacpp"), ("bfloat16 on cpu", "local")):
        manifest = {"settings": {"weights": {"base": form}}, "seed": 1}
        answers.partial.write_text(json.dumps(manifest) + "\n")
        assert answers.begun_backend() == backend
    folder = tmp_path / "shards"
    folder.mkdir()
    assert begun_backend(folder) is None
    for backend in ("llamacpp", "local", "remote"):
        content = {"format": 1, "settings": {"backend": backend}}
        (folder / "_manifest.json").write_text(json.dumps(content))
        assert begun_backend(folder) == (None if backend == "remote" else backend)


def test_a_sweep_records_the_backend_of_gguf_files_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = PairSpec("base.gguf+aligned.gguf", {"memory": "1GiB"})
    monkeypatch.setattr(library, "PACKAGE", "json")  # is there
    assert pair.with_backend(None).options == {"memory": "1GiB", "backend": "llamacpp"}
    assert pair.with_backend("local").options["backend"] == "local"
    monkeypatch.setattr(library, "PACKAGE", "a_package_that_is_not_there")
    assert pair.with_backend(None).options["backend"] == "local"
    assert PairSpec("demo").with_backend(None) == PairSpec("demo")


def test_a_draft_keeps_its_logits_where_their_memory_is_used_again() -> None:
    draft = SelfDraft("base", [AcceptanceStats(), AcceptanceStats()], sync_each_step=True)
    memory, drawn = torch.empty(2, 5), []
    for _ in range(7):
        memory.copy_(torch.randn(2, 5))
        drawn.append(memory.clone())
        draft.append(ModelOutput(memory[:, None]), 0, memory.argmax(dim=-1))
    assert torch.equal(draft.logits.logits, torch.stack(drawn, dim=1).flatten(0, 1))
    assert torch.allclose(draft.logits.log_partition, draft.logits.logits.logsumexp(dim=-1))
