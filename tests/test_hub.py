"""Models of the hub without a network: an immediate error, or read from the cache."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baco import Baco, BacoError
from baco.cli import run
from baco.evaluation.metrics.classifier import Classifier
from baco.evaluation.metrics.protocols import MetricUnavailable
from baco.evaluation.tasks.rows import from_hub
from baco.models import hub
from baco.models.loading import load_config
from tests.pairs import PairFolder, save_pair
from tests.serving import reserved_port

ORDER = ["generate", "Where to?", "--base", "nobody/base", "--aligned", "nobody/aligned"]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Address of a hub that does not answer; the cache is empty."""
    from huggingface_hub import constants

    with reserved_port() as port:
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "_answered_at", {})
        yield address


def keep(cache: Path, name: str, folder: Path) -> None:
    """Put a folder into the hub's cache as the model ``name``."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "0123abc").symlink_to(folder, target_is_directory=True)


def test_without_a_network_a_command_fails_at_once_in_one_line(tmp_path: Path) -> None:
    """The hub's own client would try for a minute."""
    with reserved_port() as port:
        address = f"http://127.0.0.1:{port}"
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        code = (
            "import sys, time, baco.models.hub, baco.cli; "
            "time.sleep = lambda s: sys.exit('it waits');"
            f"sys.exit(baco.cli.run({ORDER!r}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"baco: cannot download nobody/base: {address} does not answer; connect to the hub or give "
        "a folder\n"
    )


def test_offline_a_model_that_is_not_in_the_cache_is_refused_at_once(
    unreachable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(ORDER) == 2
    message = capsys.readouterr().err
    assert "cannot download nobody/base: HF_HUB_OFFLINE is set" in message
    assert message.count("\n") == 1
    for backend in (
        ["--backend", "remote", "--base-url", "http://x", "--aligned-url", "http://x"],
    ):
        assert run([*ORDER, *backend]) == 2
        assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_the_hub_is_probed_once_for_all_models(
    unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import get_session

    urls: list[str] = []
    client = type(get_session())
    head = client.head

    def counted(self: Any, url: str, **options: Any) -> object:
        urls.append(url)
        return head(self, url, **options)

    monkeypatch.setattr(client, "head", counted)
    for name in ("nobody/base", "nobody/aligned"):
        with pytest.raises(hub.NotHereError) as raised:
            hub.local_files_only(name)
        # Workers pickle their errors.
        assert pickle.loads(pickle.dumps(raised.value)).reason == f"{unreachable} does not answer"
    assert urls == [unreachable]
    monkeypatch.setattr(hub, "SECONDS_TO_REMEMBER", 0.0)
    with pytest.raises(hub.NotHereError):
        hub.local_files_only("nobody/base")
    assert urls == [unreachable, unreachable]


@pytest.mark.parametrize("offline", [True, False])
def test_cached_models_are_read_without_a_network(
    offline: bool,
    unreachable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    random_pair: Callable[..., PairFolder],
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it tries again"))
    folder = random_pair("llama")
    keep(tmp_path / "cache", "nobody/base", folder.base)
    keep(tmp_path / "cache", "nobody/aligned", folder.aligned)
    there = Baco.load(base="nobody/base", aligned="nobody/aligned", dtype="float32")
    here = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")
    answers = [b.generate("Where to?", router="P:0.5", seed=1, max_tokens=4) for b in (there, here)]
    assert answers[0][0].token_ids == answers[1][0].token_ids
    assert constants.HF_HUB_OFFLINE is offline


def test_a_damaged_file_in_the_cache_is_named(unreachable: str, tmp_path: Path) -> None:
    folder = save_pair(tmp_path)
    keep(tmp_path / "cache", "nobody/base", folder.base)
    (folder.base / "generation_config.json").write_text("{")
    with pytest.raises(BacoError, match=r"snapshots/0123abc/generation_config\.json is not JSON"):
        Baco.load(base="nobody/base", aligned=str(folder.aligned))


def test_metrics_and_tasks_tell_it_at_once_too(
    unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it tries again"))
    with pytest.raises(MetricUnavailable, match=f"{unreachable} does not answer"):
        Classifier.load("reward", "nobody/reward")
    with pytest.raises(BacoError, match=f"{unreachable} does not answer"):
        list(from_hub("gsm8k", {"hub": "openai/gsm8k", "config": "main"}))


def test_a_folder_is_read_without_asking_the_hub(
    unreachable: str, random_pair: Callable[..., PairFolder]
) -> None:
    assert hub.local_files_only(str(random_pair("llama").base)) is False
    assert hub._answered_at == {}


def test_the_configuration_of_an_exported_pair_needs_no_hub(
    unreachable: str, random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama")
    keep(tmp_path / "cache", "nobody/base", folder.base)
    out = tmp_path / "pair"
    pair = ["--base", "nobody/base", "--aligned", str(folder.aligned)]
    assert run(["pair", "export", str(out), *pair]) == 0
    assert json.loads((out / "config.json").read_text())["architectures"]


def test_a_path_where_nothing_is_is_an_error_in_one_line() -> None:
    missing = "/no-such-folder/model"
    assert hub.model_folder(missing) is None
    with pytest.raises(BacoError, match=f"cannot .* {missing}: "):
        load_config(missing)
