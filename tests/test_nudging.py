"""Nudging as its authors' code runs it, by hand and next to a naive driver."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from baco import Baco
from baco.evaluation.methods import Draw, answer, methods
from baco.evaluation.methods.method import Grid
from baco.evaluation.methods.nudging import CALL, Call, Continuation, Written, nudge
from baco.evaluation.records import Prompt
from baco.evaluation.tasks import load_task


def play(
    script: list[tuple[Call, Continuation]], fits: Callable[[str], bool] = lambda text: True
) -> Written:
    """Run the loop; its calls must be those of the script."""
    loop, reply = nudge(0.3, fits), None
    for call, continuation in script:
        assert (next(loop) if reply is None else loop.send(reply)) == call
        reply = continuation
    with pytest.raises(StopIteration) as end:
        loop.send(reply)  # type: ignore[arg-type]
    written: Written = end.value.value
    return written


def say(*tokens: str, tops: tuple[float, ...] = (), ended: bool = False) -> Continuation:
    return Continuation(tokens, tops or (1.0,) * len(tokens), ended)


END = say(" end", ended=True)


def test_the_base_takes_over_where_it_is_sure_and_is_cut_in_mid_word() -> None:
    written = play(
        [
            (("aligned", ""), say(" The", " sum", " is", " four")),
            (("base", " The"), say(" big", " dog", tops=(0.2, 0.9))),
            (("base", " The sum"), say(" b", "ec", "omes", tops=(0.3, 0.5, 0.1))),
            (("aligned", " The sum bec"), END),
        ]
    )
    assert written.pieces == [("The sum", "aligned"), (" bec", "base"), (" end", "aligned")]
    assert written.finish_reason == "stop"


def test_the_base_takes_over_where_its_token_begins_the_next_word() -> None:
    written = play(
        [
            (("aligned", ""), say(" The", " sum", " is", " four")),
            (("base", " The"), say(" su", "n", tops=(0.1, 0.2))),
            (("aligned", " The su"), END),
        ]
    )
    assert written.pieces == [("The", "aligned"), (" su", "base"), (" end", "aligned")]


def test_all_words_but_the_last_are_taken_where_the_base_is_never_sure() -> None:
    unsure = say(" x", tops=(0.1,))
    written = play(
        [
            (("aligned", ""), say(" One", " two", "  three")),
            (("base", " One"), unsure),
            (("base", " One two "), unsure),
            (("aligned", " One two "), say("three")),
            (("aligned", " One two three"), END),
        ]
    )
    assert written.text == "One two three end"


def test_a_sure_base_is_called_again_until_it_repeats_itself() -> None:
    written = play(
        [
            (("aligned", ""), say("A", " b")),
            (("base", "A"), say(" c", " d")),
            (("base", "A c d"), say(" e", " f")),
            (("base", "A c d e f"), say(" d", " e")),
            (("aligned", "A c d e f"), END),
        ]
    )
    assert written.pieces == [("A", "aligned"), (" c d e f", "base"), (" end", "aligned")]


def test_the_same_aligned_words_four_times_end_the_answer() -> None:
    script: Any = []
    output = ""
    for _ in range(4):
        script.append((("aligned", output), say(" ha", " no")))
        script.append((("base", output + " ha"), say(" x", tops=(0.1,))))
        output += " ha"
    written = play(script)
    assert (written.text, written.finish_reason) == ("ha ha ha", "repeated")


def test_a_repeated_end_is_cut_off_and_so_is_white_space() -> None:
    repeated = play([(("aligned", ""), say("  ", "abcdefghij" * 6, " ", ended=True))])
    assert repeated.text == "abcdefghij" * 3
    assert repeated.pieces == [(repeated.text, "aligned")]


def test_an_answer_ends_at_its_limit() -> None:
    written = play([(("aligned", ""), say("A"))], lambda text: len(text) < 1)
    assert (written.text, written.finish_reason) == ("A", "length")


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return load_task("demo", 2).prompts


def test_answers_are_those_of_the_loop_over_naive_greedy_calls(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    setting = methods()["nudging-authors"].settings(Grid("full", 2))[3]
    rows = answer(demo, setting, prompts, Draw(2, 1, {"temperature": 0.0, "max_tokens": 24}))
    renderer, ends = demo.pair.renderer, demo.pair.end_ids
    for prompt, samples in zip(prompts, rows, strict=True):
        rendered = renderer.render(prompt.messages)

        def call(source: str, text: str) -> Continuation:
            head = rendered.base_text if source == "base" else rendered.aligned_text  # noqa: B023
            special = source == "base"
            ids = list(renderer.encoders[source].encode(head + text, special=special))
            model, tokens, tops = getattr(demo.pair, source), list[int](), list[float]()
            while len(tokens) < CALL and not (tokens and tokens[-1] in ends):
                row = model.score([*ids, *tokens])[-1]
                tops.append(float(row.softmax(-1).max()))
                if source == "base":
                    row = row.masked_fill(demo.pair.banned, -math.inf)
                tokens.append(int(row.argmax()))
            ended = tokens[-1] in ends
            if ended and len(tokens) > 1:
                del tokens[-1], tops[-1]
            texts = [demo.pair.spelling(t).decode() if t not in ends else "" for t in tokens]
            return Continuation(tuple(texts), tuple(tops), ended)

        def fits(text: str) -> bool:
            return len(demo.pair.tokenizer(text, add_special_tokens=False)["input_ids"]) < 24

        loop, reply = nudge(setting.options["threshold"], fits), None
        try:
            while True:
                reply = call(*(next(loop) if reply is None else loop.send(reply)))
        except StopIteration as end:
            expected = end.value
        assert [sample.text for sample in samples] == [expected.text] * 2
        assert samples[0].pieces == tuple(expected.pieces)
        assert 0 < (samples[0].base_share or 0) < 1


def test_samples_differ_above_temperature_0_and_replay(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    setting = methods()["nudging-authors"].settings(Grid("full", 2))[2]
    draw = Draw(4, 1, {"temperature": 1.0, "max_tokens": 16})
    rows = answer(demo, setting, prompts, draw)
    assert rows == answer(demo, setting, prompts, draw)
    assert len({sample.text for sample in rows[0]}) > 1
