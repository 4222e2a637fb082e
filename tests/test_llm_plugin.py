"""The plug-in for `llm` (plugins/llm-baco), run by `llm` itself."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm.plugins import load_plugins, pm

from baco import Baco
from baco.models.known_pairs import demo_folder
from tests.test_plugins import install

PLUGIN = Path(__file__).parents[1] / "plugins" / "llm-baco"
PROMPT = "Recommend a summer destination"
ROUTER = "P-Punc:0.4"


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[Any]:
    """The plug-in, registered as its entry point would."""
    load_plugins()
    sys.path.insert(0, str(PLUGIN))
    import llm_baco

    pm.register(llm_baco)
    llm_baco.register_commands(cli)
    yield llm_baco
    pm.unregister(llm_baco)
    sys.path.remove(str(PLUGIN))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``command(*arguments, code=0)``: what ``llm ARGUMENTS`` prints."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))

    def call(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done.stdout if code == 0 else done.output

    return call


def ask(command: Callable[..., str], *arguments: str, code: int = 0, **options: Any) -> str:
    given = [part for name, value in options.items() for part in ("-o", name, str(value))]
    return command("prompt", "-m", "baco/demo", *given, *arguments, code=code)


def test_llm_finds_the_package_by_its_entry_point(tmp_path: Path) -> None:
    entry_point = '[project.entry-points.llm]\nbaco = "llm_baco"'
    assert entry_point in (PLUGIN / "pyproject.toml").read_text(encoding="utf-8")
    site = install(tmp_path, "llm_baco", "[llm]\nbaco = llm_baco\n")
    path = os.pathsep.join([str(site), str(PLUGIN), os.environ.get("PYTHONPATH", "")])
    script = "import sys; from llm.cli import cli; cli(['models', '-q', 'baco/demo', '--options'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path, "LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "baco/demo" in done.stdout
    options = ("router", "n", "seed", "temperature", "top_p", "min_p", "max_tokens")
    assert all(f"{option}:" in done.stdout for option in options)


def test_an_answer_streams_and_is_that_of_baco(command: Callable[..., str], demo: Baco) -> None:
    [expected] = demo.generate(PROMPT, router=ROUTER, seed=1, temperature=1.2)
    options: dict[str, Any] = {"router": ROUTER, "seed": 1, "temperature": 1.2}
    assert ask(command, PROMPT, **options).rstrip("\n") == expected.text.rstrip("\n")
    assert ask(command, PROMPT, "--no-stream", **options).rstrip("\n") == expected.text
    pieces = list(llm.get_model("baco/demo").prompt(PROMPT, stream=True, **options))
    assert len(pieces) > 2
    assert "".join(pieces) == expected.text


def test_several_answers_are_numbered(command: Callable[..., str], demo: Baco) -> None:
    expected = demo.generate(PROMPT, router=ROUTER, seed=1, n=3)
    printed = ask(command, PROMPT, router=ROUTER, seed=1, n=3)
    numbered = [f"{at}. {answer.text.strip()}" for at, answer in enumerate(expected, 1)]
    assert printed.rstrip("\n") == "\n\n".join(numbered)


def test_the_log_has_router_seed_sources_and_tokens(
    command: Callable[..., str], demo: Baco
) -> None:
    answer = ask(command, PROMPT).rstrip("\n")
    [entry] = json.loads(command("logs", "--json"))
    record = entry["response_json"]
    [logged] = record["answers"]
    assert "".join(text for text, _ in logged["sources"]) == answer
    [again] = demo.generate(PROMPT, router=record["router"], seed=record["seed"])
    assert again.text == answer
    assert logged["base_share"] == again.base_share
    assert entry["output_tokens"] == len(again.token_ids)
    assert entry["input_tokens"] == len(demo.pair.renderer.render(PROMPT).aligned_ids)


def test_a_conversation_and_a_system_prompt_are_read(
    command: Callable[..., str], demo: Baco
) -> None:
    options: dict[str, Any] = {"router": ROUTER, "seed": 1}
    first = ask(command, PROMPT, "-s", "Be brief.", **options).rstrip("\n")
    second = ask(command, "And in winter?", "-c", **options).rstrip("\n")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And in winter?"},
    ]
    assert first == demo.generate(messages[:2], **options)[0].text
    assert second == demo.generate(messages, **options)[0].text


def test_bad_input_is_one_line(command: Callable[..., str]) -> None:
    for options, message in (
        ({"router": "Pun:0.4"}, "unknown router"),
        ({"temperature": -1}, "temperature"),
        ({"n": "many"}, "n"),
        ({"colour": "red"}, "colour"),
    ):
        printed = ask(command, PROMPT, code=1, **options)
        assert printed.startswith("Error: ")
        assert message in printed
    assert "schema" in ask(command, PROMPT, "--schema", "name, age int", code=1)


def test_an_own_pair_is_added_used_and_removed(command: Callable[..., str], demo: Baco) -> None:
    base, aligned = (str(demo_folder() / source) for source in ("base", "aligned"))
    command("baco", "add", "mine", "--base", base, "--aligned", aligned, "--dtype", "float32")
    options = ("-o", "router", ROUTER, "-o", "seed", "1", "-o", "min_p", "0.1")
    answer = command("prompt", "-m", "baco/mine", *options, "-o", "max_tokens", "96", PROMPT)
    assert answer.rstrip("\n") == demo.generate(PROMPT, router=ROUTER, seed=1)[0].text
    assert "baco/mine" in command("models", "-q", "baco")
    command("baco", "remove", "mine")
    assert "baco/mine" not in command("models", "-q", "baco")
    for arguments, message in (
        (("add", "mine"), "give --pair, or --base and --aligned"),
        (("add", "mine", "--base", base), "give both base and aligned"),
        (("add", "demo", "--base", base, "--aligned", aligned), "is a model already"),
        (("add", "mine", "--pair", "/nowhere"), "unknown pair"),
        (("remove", "mine"), "you have not added a pair 'mine'; added: none"),
    ):
        assert message in command("baco", *arguments, code=1)


@pytest.mark.parametrize("content", ["{", "[]", '{"mine": "demo"}', '{"mine": {"base": []}}'])
def test_a_damaged_file_of_own_pairs_is_one_line(
    command: Callable[..., str], tmp_path: Path, content: str
) -> None:
    (tmp_path / "baco-pairs.json").write_text(content)
    assert "baco-pairs.json holds no pairs" in command("baco", "remove", "mine", code=1)


def test_own_pairs_that_cannot_be_written_are_one_line(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = '{"mine": {"name": "demo"}}'
    (tmp_path / "baco-pairs.json").write_text(before)
    monkeypatch.setattr(os, "fsync", full)
    printed = command("baco", "remove", "mine", code=1)
    assert printed.endswith("baco-pairs.json: No space left on device\n")
    assert (tmp_path / "baco-pairs.json").read_text() == before
