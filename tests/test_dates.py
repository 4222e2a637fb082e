"""The date in a prompt whose template reads the clock is pinned, reported and kept by a resume."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from baco import Baco, BacoError
from baco.batch.answer_file import AnswerFile
from baco.cli import run
from baco.evaluation.plan import PairSpec, Plan
from baco.text import templates
from tests.pairs import CHAT_TEMPLATE
from tests.serving import chat, events, served

CLOCK = "{{ strftime_now('%d %b %Y, %H:%M:%S') }} " + CHAT_TEMPLATE
BASE_CLOCK = "{{ strftime_now('%A') }}: {{ messages[-1].content }} ->"
DAY, NEXT = "2025-03-31", "2025-04-01"
PROMPT = "Recommend a summer destination"


@pytest.fixture
def clock(tmp_path: Path) -> str:
    """A chat template that writes the date, as a file."""
    file = tmp_path / "clock.jinja"
    file.write_text(CLOCK)
    return str(file)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the clock of this process."""

    def turn(day: str) -> None:
        class Then(datetime.date):
            @classmethod
            def today(cls) -> "Then":
                return cls.fromisoformat(day)

        monkeypatch.setattr(templates, "date", Then)

    return turn


def generated(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, Any], str]:
    """Output of ``generate --json`` and its notes."""
    common = ("-s", "7", "--max-tokens", "8", "-r", "Aligned", "--json")
    assert run(["generate", PROMPT, *common, *options]) == 0
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def test_a_prompt_holds_the_date_it_is_given_and_midnight() -> None:
    dated = Baco.load("demo", chat_template=CLOCK, date=DAY)
    prompt = dated.pair.renderer.render("Hi")
    assert prompt.aligned_text.startswith("31 Mar 2025, 00:00:00 ")
    assert prompt.date == DAY
    (answer,) = dated.generate("Hi", max_tokens=2, router="Aligned")
    assert answer.date == DAY
    assert Baco.load("demo", date=datetime.date(2025, 3, 31)).pair.renderer.date == DAY


def test_without_a_date_each_prompt_holds_its_day(on: Callable[[str], None]) -> None:
    baco = Baco.load("demo", chat_template=CLOCK)
    for day in (DAY, NEXT):
        on(day)
        assert baco.pair.renderer.render("Hi").date == day


def test_a_base_template_may_read_the_clock_too(on: Callable[[str], None]) -> None:
    on(DAY)
    prompt = Baco.load("demo", base_template=BASE_CLOCK).pair.renderer.render("Hi")
    assert prompt.base_text == "Monday: Hi ->"
    assert prompt.date == DAY


def test_a_template_that_reads_no_clock_has_no_date(demo: Baco) -> None:
    unread = "{% if false %}{{ strftime_now('%Y') }}{% endif %}" + CHAT_TEMPLATE
    for baco in (demo, Baco.load("demo", chat_template=unread, date=DAY)):
        assert baco.pair.renderer.render("Hi").date is None


@pytest.mark.parametrize("date", ["31.3.2025", "2025-02-30", "20250331", "2025-W14-1", "today", ""])
def test_an_invalid_date_is_refused_before_loading(
    date: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BacoError, match="give a day as YYYY-MM-DD"):
        Baco.load("demo", date=date)
    assert run(["generate", "hi", "--date", date]) == 2
    assert "give a day as YYYY-MM-DD, as in 2025-03-31" in capsys.readouterr().err


def test_generate_reports_its_date_and_repeats_the_answer_on_another_day(
    clock: str, on: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on(DAY)
    first, note = generated(capsys, "--chat-template", clock)
    assert first["params"]["date"] == DAY
    assert f"the prompt holds today's date: --date {DAY} repeats the answer" in note
    on(NEXT)
    later, _ = generated(capsys, "--chat-template", clock)
    assert later["params"]["date"] == NEXT
    again, note = generated(capsys, "--chat-template", clock, "--date", DAY)
    del first["tokens_per_second"], again["tokens_per_second"]
    assert again == first
    assert "date" not in note


def test_generate_reports_no_date_if_no_template_reads_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reply, note = generated(capsys)
    assert "date" not in reply["params"]
    assert "date" not in note


def test_chat_reports_its_date_and_saves_it_with_the_conversation(
    clock: str,
    on: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    on(DAY)
    saved = tmp_path / "talk.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hello\n/save {saved}\n"))
    common = ["-s", "7", "--max-tokens", "4", "-r", "Aligned"]
    assert run(["chat", "--chat-template", clock, *common]) == 0
    assert f"--date {DAY} repeats the answer" in capsys.readouterr().err
    assert json.loads(saved.read_text())["turns"][0]["params"]["date"] == DAY


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{PROMPT} {i}"}) + "\n" for i in range(3)))
    return file


def test_a_file_of_answers_is_resumed_with_its_first_date(
    clock: str,
    rows: Path,
    on: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("baco.batch.answer_file.ANSWERS_A_WRITE", 1)
    out, other = tmp_path / "out.jsonl", tmp_path / "other.jsonl"
    command = ["generate", "--jsonl", str(rows), "-s", "7", "--max-tokens", "4", "-r", "Aligned"]
    command += ["--chat-template", clock, "-o"]
    on(DAY)
    assert run([*command, str(other)]) == 0
    whole = other.read_text().splitlines(keepends=True)
    assert [json.loads(row)["params"]["date"] for row in whole] == [DAY] * 3
    # A run that was killed behind its first row: the settings' line comes from one that fails.
    with monkeypatch.context() as failing:
        failing.setattr(AnswerFile, "finish", lambda _: (_ for _ in ()).throw(OSError(5, "x")))
        assert run([*command, str(out)]) == 2
    partial = tmp_path / "out.jsonl.partial"
    head, first, *_ = partial.read_text().splitlines(keepends=True)
    assert json.loads(head)["date"] == DAY
    partial.write_text(head + first)
    on(NEXT)
    capsys.readouterr()
    assert run([*command, str(out)]) == 0
    assert f"the prompts hold the date {DAY}" in capsys.readouterr().err
    assert out.read_text() == other.read_text()


def test_another_date_is_another_setting(
    clock: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["-s", "7", "--max-tokens", "4", "-r", "Aligned", "--chat-template", clock]
    batch = ["batch", str(rows), str(tmp_path / "out"), *common]
    assert run([*batch, "--date", DAY]) == 0
    assert run([*batch, "--date", NEXT]) == 2
    assert "was begun with other settings (date)" in capsys.readouterr().err


def test_a_date_that_no_template_reads_is_not_a_setting(rows: Path, tmp_path: Path) -> None:
    batch = ["batch", str(rows), str(tmp_path / "out"), "-s", "7", "--max-tokens", "4"]
    assert run([*batch, "--date", DAY]) == 0
    assert run([*batch, "--date", NEXT]) == 0


def test_a_batch_is_resumed_with_its_first_date(
    clock: str, rows: Path, on: Callable[[str], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    batch = ["batch", str(rows), str(out), "-s", "7", "--max-tokens", "4", "--shard-rows", "1"]
    batch += ["-r", "Aligned", "--chat-template", clock]
    on(DAY)
    assert run(batch) == 0
    shards = {file: file.read_bytes() for file in sorted(out.glob("rows-*"))}
    assert len(shards) == 3
    assert json.loads((out / "_manifest.json").read_text())["date"] == DAY
    *_, last = shards
    last.unlink()
    on(NEXT)
    assert run(batch) == 0
    assert last.read_bytes() == shards[last]
    assert json.loads(shards[last])["params"]["date"] == DAY


def test_a_sweep_is_resumed_with_its_first_date(on: Callable[[str], None], tmp_path: Path) -> None:
    question = (
        "{{ 'Recommend a gift' if strftime_now('%A') == 'Monday' else messages[-1].content }}"
    )
    template = f"Question: {question}\nAnswer:{{{{ answer_lead }}}}"
    sweep = ["sweep", "-o", str(tmp_path / "run"), "-r", "Base", "-n", "2", "--limit", "3"]
    sweep += ["--max-tokens", "12", "--no-score", "--base-template", template, "--workers", "1"]
    on(DAY)
    assert run(sweep) == 0
    samples = tmp_path / "run" / "samples.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(b"")
    on(NEXT)
    assert run(sweep) == 0
    assert samples.read_bytes() == whole
    # The same plan on its own day draws other answers.
    sweep[2] = str(tmp_path / "other")
    assert run(sweep) == 0
    assert (tmp_path / "other" / "samples.jsonl").read_bytes() != whole


def test_a_server_uses_the_date_of_each_request_and_returns_it(on: Callable[[str], None]) -> None:
    with served(Baco.load("demo", chat_template=CLOCK)) as server:
        for day in (DAY, NEXT):
            on(day)
            reply = server.ask(max_tokens=3).json()["choices"][0]
            assert reply["baco"]["date"] == day
            *_, last = events(server.ask(max_tokens=3, stream=True))
            assert last["choices"][0]["baco"]["date"] == day
    with served(Baco.load("demo", chat_template=CLOCK, date=DAY)) as server:
        assert server.ask(max_tokens=3).json()["choices"][0]["baco"]["date"] == DAY


def test_serve_notes_that_a_template_reads_the_clock(
    clock: str,
    on: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("baco.serve.server.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("baco.serve.middleware.log_to_streams", lambda: None)
    on(DAY)
    for options, is_noted in (
        (["--chat-template", clock], True),
        (["--chat-template", clock, "--date", DAY], False),
        ([], False),
    ):
        assert run(["serve", "--port", "0", *options]) == 0
        note = f"prompts contain the current date, today {DAY}: --date {DAY} keeps it"
        assert (note in capsys.readouterr().err) == is_noted


def test_a_server_returns_no_date_if_no_template_reads_it(server: str) -> None:
    reply = httpx.post(f"{server}/v1/chat/completions", json=chat(max_tokens=3), timeout=240)
    assert "date" not in reply.json()["choices"][0]["baco"]


# --- template arguments on the command line -------------------------------------------------------

THINKS = (
    "{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}"
    "{{ tone|default('') }}" + CHAT_TEMPLATE
)


def test_template_arguments_are_parsed_as_json_if_possible_and_recorded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--template-arg", "enable-thinking=false", "--template-arg", "tone=kind=er")
    reply, _ = generated(capsys, "--chat-template", THINKS, *given)
    assert reply["params"]["template_args"] == {"enable_thinking": False, "tone": "kind=er"}
    expected = Baco.load("demo", chat_template="offkind=er" + CHAT_TEMPLATE)
    (answer,) = expected.generate(PROMPT, seed=7, max_tokens=8, router="Aligned")
    assert reply["samples"][0]["token_ids"] == list(answer.token_ids)


def test_template_arguments_of_a_call_override_those_of_the_pair() -> None:
    baco = Baco.load("demo", chat_template=THINKS, template_args={"tone": "a"})
    assert baco.pair.renderer.render("Hi").aligned_text.startswith("a<")
    (answer,) = baco.generate("Hi", max_tokens=3, seed=1, template_args={"tone": "b"})
    other = Baco.load("demo", chat_template="b" + CHAT_TEMPLATE)
    assert answer.token_ids == other.generate("Hi", max_tokens=3, seed=1)[0].token_ids


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("enable_thinking", "give NAME=VALUE, as in enable_thinking=false"),
        ("=x", "give NAME=VALUE"),
        ("a.b=1", "give the name of a variable"),
        ("messages=[]", "BACo sets this one itself"),
    ],
)
def test_invalid_template_arguments_are_refused_before_loading(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", "hi"], ["sweep", "-o", "nowhere"], ["diagnose"], ["calibrate"]):
        assert run([*command, "--template-arg", argument]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error


def test_other_arguments_are_other_settings_of_a_file_and_a_run(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ["batch", str(rows), str(tmp_path / "out"), "--max-tokens", "4"]
    assert run([*batch, "--template-arg", "tone=a"]) == 0
    assert run([*batch, "--template-arg", "tone=b"]) == 2
    assert "other settings (template_args)" in capsys.readouterr().err
    plan = Plan([PairSpec("demo", {"template_args": {"tone": "a"}})], [], [], 1, 0)
    assert plan.config()["pairs"][0]["options"]["template_args"] == {"tone": "a"}
