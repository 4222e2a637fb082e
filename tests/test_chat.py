"""`baco chat`: in a pipe, where each line is a turn, and in a terminal."""

import io
import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baco import Baco
from baco.cli import run
from baco.cli.answers import Show
from baco.cli.chat.conversation import Conversation
from baco.cli.chat.lines import history_path
from baco.cli.chat.session import Session
from baco.cli.console import STYLES
from tests.terminals import ALT_ENTER, BACO, CTRL_C, CTRL_D, ENTER, TAB, UP, Terminal

QUESTION, NEXT = "Recommend a summer destination", "Give me a dinner idea"
ROUTER = "P-Punc:0.4"
Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """``chat(line, …)``: exit code and output of a piped chat with these lines."""

    def piped(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = run(["chat", "-r", ROUTER, "-s", "3", *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return piped


def messages(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def answers(demo: Baco, *texts: str, seed: int, router: str = ROUTER, **more: Any) -> list[str]:
    drawn = demo.generate(messages(*texts), router=router, seed=seed, **more)
    return [completion.text for completion in drawn]


def words(text: str) -> str:
    return " ".join(text.split())


def test_in_a_pipe_a_line_is_a_turn_that_knows_the_turns_before(demo: Baco, chat: Chat) -> None:
    code, out, err = chat(QUESTION, "", NEXT)
    (first,) = answers(demo, QUESTION, seed=3)
    (second,) = answers(demo, QUESTION, first, NEXT, seed=4)
    assert code == 0
    assert out == f"{first}\n\n{second}\n"
    assert second != answers(demo, NEXT, seed=4)[0]
    assert err.count("base share") == 2


def test_the_conversation_continues_with_the_picked_answer(demo: Baco, chat: Chat) -> None:
    code, out, _ = chat("/n 3", QUESTION, "/pick 2", "/n 1", NEXT)
    drawn = answers(demo, QUESTION, seed=3, n=3)
    assert code == 0
    assert out.endswith("\n\n" + answers(demo, QUESTION, drawn[1], NEXT, seed=4)[0] + "\n")
    assert answers(demo, QUESTION, drawn[0], NEXT, seed=4) != answers(
        demo, QUESTION, drawn[1], NEXT, seed=4
    )


def test_a_retried_question_uses_the_next_seed_and_the_present_settings(
    demo: Baco, chat: Chat
) -> None:
    _, out, _ = chat(QUESTION, "/temperature 1.5", "/router Rand:0.5", "/retry")
    assert out.endswith(
        answers(demo, QUESTION, seed=4, router="Rand:0.5", temperature=1.5)[0] + "\n"
    )


@pytest.mark.parametrize("command", ["/undo", "/new"])
def test_an_undone_turn_leaves_the_conversation(command: str, demo: Baco, chat: Chat) -> None:
    _, out, _ = chat(QUESTION, command, NEXT)
    assert out.endswith(f"\n\n{answers(demo, NEXT, seed=4)[0]}\n")


def test_commands_set_the_same_as_options(demo: Baco, chat: Chat) -> None:
    lines = ("/system Be brief.", "/seed 9", "/max-tokens 6", "/min-p 0", "/router P-FC:0.4")
    _, out, _ = chat(*lines, QUESTION)
    expected = answers(
        demo, QUESTION, seed=9, router="P-FC:0.4", system="Be brief.", max_tokens=6, min_p=0.0
    )
    assert out == expected[0] + "\n"
    options = ("--system", "Be brief.", "-s", "9", "--max-tokens", "6", "--min-p", "0")
    assert chat(QUESTION, options=(*options, "-r", "P-FC:0.4"))[1] == out


def test_the_dial_sets_the_routers_threshold(chat: Chat) -> None:
    _, _, err = chat("/diversity 0", "/diversity 1")
    low, high = (float(line.partition(":")[2]) for line in err.splitlines())
    assert 0 <= low < high <= 1


def test_a_comparison_is_on_the_turns_own_seed_and_changes_nothing(demo: Baco, chat: Chat) -> None:
    _, out, _ = chat(QUESTION, NEXT, "/compare", "/compare " + QUESTION, "/retry")
    (first,) = answers(demo, QUESTION, seed=3)
    (second,) = answers(demo, QUESTION, first, NEXT, seed=4)
    compared, again = out.split(f"{second}\n", 1)[1].split("== Base\n")[1:]
    for router in ("Base", "Aligned", ROUTER):
        assert answers(demo, QUESTION, first, NEXT, seed=4, router=router)[0] in compared
        other = answers(demo, QUESTION, first, NEXT, second, QUESTION, seed=5, router=router)
        assert other[0] in again
    assert out.endswith(answers(demo, QUESTION, first, NEXT, seed=6)[0] + "\n")


def test_a_saved_chat_holds_every_source_and_can_be_had_again(
    demo: Baco, chat: Chat, tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    assert chat("/n 2", QUESTION, "/pick 2", NEXT, f"/save {path}")[0] == 0
    saved = json.loads(path.read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    first, second = saved["turns"]
    assert (first["chosen"], second["chosen"]) == (1, 0)
    assert saved["messages"][1]["content"] == first["samples"][1]["text"]
    params: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in second["params"].items()
    }
    drawn = demo.generate(
        saved["messages"][:3], router=second["router"], seed=second["seed"], **params
    )
    for sample, completion in zip(second["samples"], drawn, strict=True):
        assert sample["text"] == completion.text == "".join(p["text"] for p in sample["pieces"])
        assert {p["source"] for p in sample["pieces"]} == {p.source for p in completion.pieces}


def test_a_chat_is_saved_to_be_read_too(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.md"
    _, out, _ = chat(QUESTION, f"/save {path}")
    assert path.read_text() == (
        f"# A conversation with demo\n\n> {QUESTION}\n\n{out}\n*{ROUTER}, seed 3*\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/ruoter P:0.3", "unknown command /ruoter: did you mean /router?"),
        ("/router Nope", "unknown router 'Nope'"),
        ("/n four", "n is 'four': give a whole number"),
        ("/n 0", "n is 0: give a whole number"),
        ("/temperature -1", "temperature is -1"),
        ("/diversity much", "give a number from 0 to 1"),
        ("/pick 2", "the conversation is empty"),
        ("/pick it", "give the number of an answer"),
        ("/retry", "the conversation is empty"),
        ("/undo", "the conversation is empty"),
        ("/compare", "the conversation is empty"),
        ("/save", "needs a file"),
        ("/save ~no-such-user/chat.md", "no such user has a home folder"),
        ("/quit now", "takes nothing after it"),
        ("word " * 600, "context window is 512: shorten it"),
        ("caf\udce9", "not valid UTF-8"),
    ],
)
def test_a_wrong_line_in_a_pipe_ends_it_with_one_line(line: str, message: str, chat: Chat) -> None:
    code, out, err = chat(line, QUESTION)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_conversation_longer_than_the_context_is_one_line_with_advice(chat: Chat) -> None:
    code, out, err = chat(QUESTION, "word " * 500)
    assert code == 2
    assert out.count("\n\n") == 0
    assert "the conversation takes" in err
    assert "/undo takes the last turn back, /new starts over" in err.splitlines()[-1]


def test_a_conversation_is_not_saved_in_place_of_a_folder(chat: Chat) -> None:
    code, _, err = chat(QUESTION, "/save .")
    assert code == 2
    assert err.splitlines()[-1] == "baco: cannot write .: Is a directory"


def test_quitting_a_pipe_leaves_the_rest_unread(chat: Chat) -> None:
    assert chat("/quit", QUESTION) == (0, "", "")


def test_options_are_checked_before_two_models_are_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Baco, "load", lambda *_, **__: pytest.fail("loaded"))
    assert run(["chat", "-n", "0"]) == 2
    assert "n is 0" in capsys.readouterr().err


def test_a_retry_that_is_stopped_before_a_word_keeps_the_old_answer(
    demo: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"n": 1, "seed": 3, "system": None, "switch": "word"}
    session = Session(Conversation(demo, demo.router(ROUTER), settings), interactive=False)
    session.answer(QUESTION)
    kept = session.conversation.last()

    def interrupted(self: Show) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Show, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.retry()
    assert session.conversation.turns == [kept]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A chat in a terminal that has shown its greeting."""
    with Terminal("chat", "-r", ROUTER, "-s", "3") as opened:
        opened.see("next seed 3")
        yield opened


def test_a_terminal_shows_each_word_in_its_sources_colour(demo: Baco, terminal: Terminal) -> None:
    terminal.press(QUESTION + ENTER)
    terminal.see("next seed 4")
    (completion,) = demo.generate(QUESTION, router=ROUTER, seed=3)
    for source, style in STYLES.items():
        shown = terminal.styled(style.partition("#")[2].lower())
        text = "".join(piece.text if piece.source == source else " " for piece in completion.pieces)
        assert words(text) in " ".join(shown)
    terminal.press(CTRL_D)
    assert terminal.leave() == 0


def test_commands_complete_answers_are_picked_and_compared_and_errors_go_on(
    demo: Baco, terminal: Terminal
) -> None:
    terminal.press("/rou")
    terminal.see("/router set the router")
    terminal.press(TAB + " P-Punc-F")
    terminal.see("P-Punc-FC:0.4 Punc and FC keep")
    terminal.press(TAB + ENTER)
    terminal.see("router P-Punc-FC:0.4")
    terminal.press("/n 3" + ENTER + QUESTION + ENTER)
    terminal.see("answer 1 goes on; /pick takes another")
    terminal.press("/pick 4" + ENTER)
    terminal.see("there is no answer 4: the last turn has 3")
    terminal.press("/pick 3" + ENTER)
    terminal.see("answer 3 goes on")
    terminal.press("/n 1" + ENTER + NEXT + ENTER)
    router = "P-Punc-FC:0.4"
    third = answers(demo, QUESTION, seed=3, n=3, router=router)[2]
    (expected,) = answers(demo, QUESTION, third, NEXT, seed=4, router=router)
    assert words(expected) in terminal.see("next seed 5")
    terminal.press("/compare" + ENTER)
    shown = terminal.see("words from base and aligned · seed 4")
    assert "Base Aligned P-Punc-FC:0.4" in shown
    terminal.press("/quit" + ENTER)
    assert terminal.leave() == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(demo: Baco) -> None:
    slow = ("-r", "Rand:0.5", "-n", "40", "-t", "2", "--min-p", "0", "--max-tokens", "300")
    with Terminal("chat", "-s", "1", *slow) as terminal:
        terminal.see("next seed 1")
        terminal.press(QUESTION + ENTER)
        terminal.see(" 5. ")
        terminal.press("lost" + CTRL_C)
        shown = terminal.see("stopped; what was said stays")
        assert "^C" not in shown
        assert "Traceback" not in shown
        terminal.press(CTRL_C + "/n 1" + ENTER + "/router P-Punc:0.4" + ENTER + "/new" + ENTER)
        terminal.see("a new conversation")
        terminal.press("/seed 3" + ENTER + "/temperature 1" + ENTER + QUESTION + ENTER)
        shown = terminal.see("next seed 4")
        (expected,) = answers(demo, QUESTION, seed=3, min_p=0.0)
        assert words(expected) in shown
        terminal.press("/n 40" + ENTER + "/temperature 2" + ENTER + "/compare" + ENTER)
        terminal.see("of 40 answers")
        terminal.press(CTRL_C)
        terminal.press("/help" + ENTER)
        terminal.see("Ctrl-D leaves. ›")
        terminal.press(CTRL_D)
        assert terminal.leave() == 0


def test_text_written_before_a_stop_is_part_of_the_conversation(
    demo: Baco, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"n": 1, "seed": 3, "system": None, "switch": "word"}
    conversation = Conversation(demo, demo.router(ROUTER), settings)
    session = Session(conversation, interactive=False)
    session.interactive = True
    chunks = demo.stream(QUESTION, router=ROUTER, seed=3)

    def cut_short(*_: object, **__: object) -> Iterator[Any]:
        for _step in range(2):
            yield next(chunks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Baco, "stream", cut_short)
    session.answer(QUESTION)
    said_so_far = conversation.last().answer
    assert said_so_far.finish_reason == "interrupted"
    (whole,) = answers(demo, QUESTION, seed=3)
    assert 0 < len(said_so_far.text) < len(whole)
    assert whole.startswith(said_so_far.text)
    assert conversation.messages(NEXT)[1]["content"] == said_so_far.text
    assert "stopped; what was said stays" in capsys.readouterr().err


def test_messages_of_many_lines_and_of_earlier_chats(demo: Baco) -> None:
    folded = QUESTION.replace(" summer", "\nsummer")
    with Terminal("chat", "-r", ROUTER, "-s", "3", rows=8, columns=60) as terminal:
        terminal.see("next seed 3")
        terminal.press(folded.replace("\n", ALT_ENTER) + ENTER)
        terminal.see("next seed 4")
        terminal.press("/undo" + ENTER)
        terminal.see(f"removed: {QUESTION}")
        terminal.press(f"\x1b[200~{folded}\x1b[201~" + ENTER)
        shown = terminal.see("next seed 5")
        assert words(answers(demo, folded, seed=4)[0])[-30:] in shown
        terminal.press(CTRL_D)
        assert terminal.leave() == 0
    assert stat.S_IMODE(history_path().stat().st_mode) == 0o600
    with Terminal("chat", "-r", ROUTER, "-s", "4") as terminal:
        terminal.see("next seed 4")
        terminal.press(UP + ENTER)
        assert words(answers(demo, folded, seed=4)[0]) in terminal.see("next seed 5")
        terminal.press("/save " + CTRL_C + CTRL_D)
        assert terminal.leave() == 0


def test_a_system_message_that_the_template_refuses_can_be_taken_back(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ m.content }}\n{% endfor %}"
    )
    with Terminal("chat", "-s", "3", "--chat-template", str(template)) as terminal:
        terminal.see("next seed 3")
        terminal.press("/system Be brief" + ENTER)
        terminal.see("system: Be brief")
        terminal.press(QUESTION + ENTER)
        terminal.see("refuses this conversation: no system role")
        terminal.press("/system -" + ENTER + QUESTION + ENTER)
        shown = terminal.see("next seed 4")
        assert "Traceback" not in shown
        terminal.press(CTRL_D)
        assert terminal.leave() == 0


def test_a_real_pipe_needs_no_terminal_and_no_colours() -> None:
    environment = os.environ | {"TERM": "dumb"}
    done = subprocess.run(
        [*BACO, "chat", "-r", ROUTER, "-s", "3", "--max-tokens", "5"],
        input=f"{QUESTION}\n{NEXT}",
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert len(done.stdout.split("\n\n")) == 2
