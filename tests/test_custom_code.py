"""Python code that comes with a model: refused in one line without a question, unless trusted."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baco import Baco, BacoError
from baco.cli import run
from baco.evaluation.metrics.classifier import Classifier
from baco.evaluation.metrics.embedding import embedder
from baco.evaluation.metrics.protocols import MetricUnavailable
from baco.evaluation.metrics.reference import reference_model
from baco.models.known_pairs import KnownPair
from baco.models.weightless import load_weightless_pair
from tests.pairs import PairFolder

PROMPT = ["generate", "Where to?", "-s", "1", "--max-tokens", "3", "-r", "P:0.5"]
MODULE = """\
from transformers import LlamaConfig, LlamaForCausalLM

open({sentinel!r}, "a").write("ran")


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
FAILING = """

    def __init__(self, config):
        raise {error}
"""
MODEL = {
    "model_type": "own-llama",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
}


@pytest.fixture(autouse=True)
def no_question(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(question: str = "") -> str:
        pytest.fail(f"asked: {question}")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that exists once the model's code has run."""
    return tmp_path / "ran"


@pytest.fixture
def own(
    random_pair: Callable[..., PairFolder], tmp_path: Path, ran: Path
) -> Iterator[Callable[..., str]]:
    """``own("config.json", {…})``: a model with code of its own, which the file names."""

    def make(file: str, change: dict[str, object], code: str = "") -> str:
        folder = tmp_path / "own"
        shutil.copytree(random_pair("llama").base, folder)
        (folder / "own.py").write_text(MODULE.format(sentinel=str(ran)) + code)
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | change))
        return str(folder)

    yield make
    # Classes of the hub stay registered under their names.
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", MODEL),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
        ),
    ],
    ids=["model", "tokenizer"],
)
def test_code_of_a_model_is_refused_in_one_line_that_names_the_option(
    file: str,
    change: dict[str, object],
    own: Callable[..., str],
    ran: Path,
    random_pair: Callable[..., PairFolder],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, plain = own(file, change), str(random_pair("llama").aligned)
    capsys.readouterr()
    for command in (
        [*PROMPT, "--base", folder, "--aligned", plain],
        [*PROMPT, "--base", plain, "--aligned", folder],
        [*PROMPT, "--base", plain, "--aligned", plain, "--draft", folder],
        ["pair", "export", str(ran.parent / "exported"), "--base", folder, "--aligned", plain],
    ):
        assert run(command) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert "--trust-remote-code" in output.err
        assert folder in output.err
    with pytest.raises(BacoError, match="trust_remote_code=True"):
        load_weightless_pair(KnownPair("x", plain, folder), {"base": "there", "aligned": "there"})
    assert not ran.exists()


def test_piped_input_does_not_consent(
    own: Callable[..., str], ran: Path, random_pair: Callable[..., PairFolder]
) -> None:
    folder, plain = own("config.json", MODEL), str(random_pair("llama").aligned)
    done = subprocess.run(
        [sys.executable, "-m", "baco", "generate", "--base", folder, "--aligned", plain],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--trust-remote-code" in done.stderr
    assert not ran.exists()


def test_no_metric_runs_code_of_its_model(own: Callable[..., str], ran: Path) -> None:
    folder = own("config.json", MODEL | {"architectures": ["OwnModel"]})
    loaders: list[Callable[[], object]] = [
        lambda: reference_model(folder),
        lambda: Classifier.load("reward", folder),
        lambda: embedder(folder),
    ]
    for load in loaders:
        with pytest.raises(MetricUnavailable, match="comes with Python code of its own"):
            load()
    assert not ran.exists()


def test_trusted_code_runs_and_manifests_record_it(
    own: Callable[..., str],
    ran: Path,
    random_pair: Callable[..., PairFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, plain = own("config.json", MODEL), str(random_pair("llama").aligned)
    pair = ["--base", folder, "--aligned", plain, "--trust-remote-code"]
    assert run([*PROMPT, *pair]) == 0, capsys.readouterr().err
    assert ran.exists()
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "Where to?"}\n')
    draws = ["-r", "P:0.5", "--max-tokens", "3", "-s", "1"]
    assert run(["batch", str(prompts), str(tmp_path / "shards"), *draws, *pair]) == 0
    manifest = json.loads((tmp_path / "shards" / "_manifest.json").read_text())
    assert manifest["settings"]["trust_remote_code"] is True
    pair[:4] = ["--pair", f"{folder}+{plain}"]
    out = ["--out", str(tmp_path / "run"), "--no-score", "--workers", "1", "-n", "1"]
    sweep = ["sweep", "--task", str(prompts), "-r", "P:0.5", "--max-tokens", "3"]
    assert run([*sweep, *pair, *out]) == 0, capsys.readouterr().err
    [entry] = json.loads((tmp_path / "run" / "run.json").read_text())["pairs"]
    assert entry["options"]["trust_remote_code"] is True


@pytest.mark.parametrize("error", ["OSError('no such device')", "SystemExit(3)", "KeyError('x')"])
def test_code_that_fails_is_one_line(
    error: str,
    own: Callable[..., str],
    random_pair: Callable[..., PairFolder],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = own("config.json", MODEL, FAILING.format(error=error))
    aligned = str(random_pair("llama").aligned)
    capsys.readouterr()
    assert run([*PROMPT, "--base", folder, "--aligned", aligned, "--trust-remote-code"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"cannot load the model {folder}" in message


def test_python_may_trust_too(
    own: Callable[..., str], random_pair: Callable[..., PairFolder]
) -> None:
    folder, plain = own("config.json", MODEL), str(random_pair("llama").aligned)
    with pytest.raises(BacoError, match="trust_remote_code=True"):
        Baco.load(base=folder, aligned=plain)
    trusting = Baco.load(base=folder, aligned=plain, trust_remote_code=True)
    assert type(trusting.pair.base.model).__name__ == "OwnModel"
