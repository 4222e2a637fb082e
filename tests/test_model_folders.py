"""A damaged model folder gives an answer or one line that names the file, never a traceback."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from baco import Baco, BacoError
from baco.cli import run
from tests.fuzzing import budget
from tests.pairs import PairFolder

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
ASK = ["-s", "1", "--max-tokens", "3", "-r", "P-Punc:0.5"]
CASES = 60


@pytest.fixture(scope="module")
def whole(random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair in one folder with every file that may be in it."""
    folder = tmp_path_factory.mktemp("pair") / "whole"
    source = random_pair("llama")
    shutil.copytree(source.base, folder / "base")
    shutil.copytree(source.aligned, folder / "aligned")
    (folder / "baco.json").write_text(json.dumps({"name": "mine", "sampling": {"min_p": 0.1}}))
    return folder


@pytest.fixture
def pair(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "pair"
    shutil.copytree(whole, folder)
    return folder


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def write(data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(data)

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshape(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path, {"format": "pt"})


def lose(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})


def lose_a_shard(path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path.parent)
    path.unlink()
    model.save_pretrained(path.parent, max_shard_size="40KB")
    next(path.parent.glob("model-00002-of-*.safetensors")).unlink()


DAMAGED: list[tuple[str, Callable[[Path], Any], str]] = [
    ("model.safetensors", write(POINTER), "is a pointer of Git LFS, not the file itself: run 'git"),
    ("model.safetensors", write(b""), "is empty: fetch it again"),
    ("model.safetensors", cut, "is damaged or cut off"),
    ("model.safetensors", Path.unlink, "no file named model.safetensors"),
    (
        "model.safetensors",
        reshape,
        "norm.weight is 7 in the file and 32 by the configuration",
    ),
    (
        "model.safetensors",
        lose,
        "lack 1 of the tensors that its config.json asks for, such as",
    ),
    ("model.safetensors", lose_a_shard, "/{source} has no model-00002-of-"),
    ("model.safetensors.index.json", write(b'{"weight_map": 7}'), "has no weight_map from tensors"),
    ("tokenizer.json", write(POINTER), "is a pointer of Git LFS"),
    ("tokenizer.json", write(b"{]"), "is not JSON"),
    ("tokenizer.json", write(b"{}"), "cannot load the tokenizer of"),
    ("tokenizer.json", cut, "is not JSON"),
    ("tokenizer.json", Path.unlink, "has no tokenizer: fetch its tokenizer.json"),
    ("tokenizer_config.json", write(b"\xff\xfe"), "is not JSON"),
    ("config.json", Path.unlink, "has no config.json: give the folder of a model"),
    ("config.json", write(b"[]"), "holds no JSON object"),
    ("config.json", write(b"[" * 10**5), "is not JSON"),
    ("config.json", edit(model_type=None), "model_type"),
    ("config.json", edit(model_type="griffon"), "does not know the architecture 'griffon'"),
    ("config.json", edit(num_hidden_layers=3), "files lack 9 of the tensors"),
    (
        "config.json",
        edit(vocab_size=399),
        "weight is 400×32 in the file and 399×32 by the configuration",
    ),
    ("config.json", edit(num_attention_heads="four"), "cannot load the configuration of"),
    ("config.json", edit(eos_token_id="end"), "cannot load the configuration of"),
    ("generation_config.json", write(b"{"), "is not JSON"),
    ("generation_config.json", edit(eos_token_id=[1, "end"]), "cannot load the end tokens of"),
    ("../baco.json", write(b"[1]"), "holds no JSON object"),
    ("../baco.json", edit(sampling={"min_p": 7}), "baco.json, sampling: min_p is 7: give a number"),
    ("../baco.json", edit(name=7), "baco.json: name is 7: give a text or leave it out"),
    ("../calibration.json", write(b"{}"), "calibration.json is not a calibration"),
]


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    DAMAGED,
    # Names of functions, without their addresses: every worker must collect the same names.
    ids=lambda value: getattr(value, "__qualname__", str(value))[:40],
)
@pytest.mark.parametrize("source", ["base", "aligned"])
def test_a_damaged_file_is_one_line_with_advice(
    source: str,
    file: str,
    spoil: Callable[[Path], None],
    message: str,
    pair: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil(pair / source / file)
    capfd.readouterr()
    ask = ["-s", "1", "-r", "P-Punc"] if "calibration" in file else ASK
    assert run(["generate", "Where to?", "--pair", str(pair), *ask]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert message.format(source=source) in output.err
    assert str(pair / source if file[0] != "." else pair) in output.err
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err


def test_a_damaged_calibration_does_not_matter_where_a_threshold_is_given(pair: Path) -> None:
    write(b"{}")(pair / "calibration.json")
    baco = Baco.load(str(pair))
    assert baco.router("P-Punc:0.3").spelling == "P-Punc:0.3"
    with pytest.raises(BacoError, match="is not a calibration"):
        baco.router("P-Punc")


def test_a_long_message_of_a_library_is_left_out_and_debug_shows_it(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(eos_token_id="end" * 200)(pair / "base" / "config.json")
    order = ["generate", "Where to?", "--pair", str(pair), *ASK]
    assert run(order) == 2
    short = capsys.readouterr().err
    assert short.count("\n") == 1
    assert len(short) < 500
    for debugging in (["--debug", *order], [*order, "--debug"]):
        assert run(debugging) == 2
        message = capsys.readouterr().err
        assert message.startswith("Traceback (most recent call last)")
        assert "endendend" in message
        assert message.endswith(short)
    assert run(order) == 2
    assert capsys.readouterr().err == short


# --- fuzzing --------------------------------------------------------------------------------------

VALUES: list[Any] = [None, True, -1, 0, 3, 1000, 0.5, -1e9, "", "x", "é\x1b", [], [1], {}, {"a": 1}]


def mutate(folder: Path, chance: random.Random) -> str:
    """Damage one file of a pair; a description of the damage."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = chance.choice(files)
    data = path.read_bytes()
    kinds = ["cut", "flip", "delete", "empty"] + ["swap"] * 6 * (path.suffix == ".json")
    kind = chance.choice(kinds)
    if kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "flip":
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 8, 100])):
            # The beginning, where headers are, as often as all the rest.
            end = len(changed) if chance.random() < 0.5 else min(400, len(changed))
            changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
    else:
        content = json.loads(data)
        kind += f" {swap(content, chance)}"
        path.write_text(json.dumps(content))
    return f"{kind} in {path.relative_to(folder)}"


def swap(content: Any, chance: random.Random) -> str:
    """Replace a value at some depth by another; a description of the change."""
    place = chance.choice(list(content) if isinstance(content, dict) else range(len(content)))
    inner = content[place]
    if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
        return f"{place}.{swap(inner, chance)}"
    if isinstance(content, dict) and chance.random() < 0.2:
        del content[place]
        return f"{place} deleted"
    content[place] = chance.choice(VALUES)
    return f"{place}: {inner!r} -> {content[place]!r}"[:200]


@pytest.mark.parametrize("tenth", range(10))
def test_any_damage_gives_an_answer_or_one_line(
    tenth: int, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(tenth, budget(CASES), 10):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        done = mutate(folder, random.Random(number))
        capfd.readouterr()
        code = run(["generate", "Where to?", "--pair", str(folder), *ASK])
        output = capfd.readouterr()
        case = f"case {number}, {done}: exit code {code}\n{output.out}{output.err}"
        assert "Traceback" not in output.out + output.err, case
        assert "\x1b" not in output.err, case
        if code == 0:
            assert output.out.strip() or "base share" in output.err, case
        else:
            assert code == 2, case
            assert output.out == "", case
            assert output.err.startswith("baco: "), case
            assert output.err.count("\n") == 1, case
        shutil.rmtree(folder)
