"""Weights are bfloat16 where the machine has it natively, unless the pair or the user sets it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from baco import Baco, BacoError
from baco.cli import app
from baco.models import dtypes as precision
from tests.pairs import PairFolder

CPU = torch.device("cpu")


@pytest.fixture
def folder(random_pair: Callable[..., PairFolder]) -> PairFolder:
    return random_pair("llama")


def dtypes(baco: Baco) -> tuple[torch.dtype, torch.dtype]:
    return baco.pair.base.model.dtype, baco.pair.aligned.model.dtype


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_bfloat16_where_it_is_native_and_float32_elsewhere(
    folder: PairFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
    stored: torch.dtype,
) -> None:
    from transformers import AutoModelForCausalLM

    for source in ("base", "aligned"):
        shutil.copytree(getattr(folder, source), tmp_path / source)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=stored)
        model.save_pretrained(tmp_path / source)
    monkeypatch.setattr(precision, "native_bfloat16", lambda device: native)
    wanted = torch.bfloat16 if native else torch.float32
    assert dtypes(Baco.load(str(tmp_path))) == (wanted, wanted)
    assert dtypes(Baco.load(str(tmp_path), dtype="auto")) == (wanted, wanted)


def test_native_bfloat16_follows_torchs_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx512, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda supported=avx512: supported
        )
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda supported=amx: supported)
        assert precision.native_bfloat16(CPU) == (avx512 or amx)


def test_a_pair_may_set_its_dtype_and_the_user_overrides_it(
    folder: PairFolder, tmp_path: Path
) -> None:
    for source in ("base", "aligned"):
        shutil.copytree(getattr(folder, source), tmp_path / source)
    (tmp_path / "baco.json").write_text(json.dumps({"dtype": "float16"}))
    assert dtypes(Baco.load(str(tmp_path))) == (torch.float16, torch.float16)
    assert dtypes(Baco.load(str(tmp_path), dtype="float32")) == (torch.float32, torch.float32)


def test_the_demo_pair_is_float32_everywhere(demo: Baco) -> None:
    assert dtypes(demo) == (torch.float32, torch.float32)


def test_each_model_may_have_its_own_dtype(folder: PairFolder) -> None:
    folders: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    for dtype in ("base=float32,aligned=bfloat16", {"base": "float32", "aligned": torch.bfloat16}):
        baco = Baco.load(**folders, dtype=dtype)
        assert dtypes(baco) == (torch.float32, torch.bfloat16)
        assert len(baco.generate("Plan a walk.", router="Rand:0.5", max_tokens=8)[0].token_ids) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "use auto, float32, bfloat16 or float16"),
        ({"dtype": "small=float32"}, "names 'small'"),
        ({"dtype": {"both": "float32"}}, "names 'both'"),
    ],
)
def test_unknown_dtypes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BacoError, match=message):
        Baco.load("demo", **options)


def test_the_chosen_dtypes_are_reported(folder: PairFolder) -> None:
    baco = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="bfloat16")
    assert baco.pair.weights_formats == {"base": "bfloat16 on cpu", "aligned": "bfloat16 on cpu"}
    arguments = ["generate", "Plan a walk.", "--dtype", "aligned=bfloat16", "--max-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["weights"] == {
        "base": baco.pair.weights_formats["base"]
        if precision.native_bfloat16(CPU)
        else "float32 on cpu",
        "aligned": "bfloat16 on cpu",
    }
