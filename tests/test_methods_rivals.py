"""Methods published since the paper follow their descriptions."""

from collections.abc import Sequence
from typing import Any

import pytest

from baco import Baco
from baco.evaluation.methods import (
    Draw,
    Grid,
    answer,
    groups,
    methods,
    needs_one_tokenizer,
    select_settings,
)
from baco.evaluation.methods.string_seed import answer_of
from baco.evaluation.methods.unformatted import text_of
from baco.evaluation.methods.verbalized import parse
from baco.evaluation.methods.verbalized_forms import MORE, tail_system
from baco.evaluation.records import Prompt, Setting
from baco.evaluation.tasks import load_task

FULL = Grid("full", 4)


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return load_task("demo", 2).prompts


def setting_of(name: str, **changes: Any) -> Setting:
    setting = methods()[name].settings(FULL)[0]
    return Setting(setting.method, setting.label, setting.value, dict(setting.options) | changes)


class Scripted:
    """A pair whose aligned model gives these replies, one a call, and records its chats."""

    def __init__(self, baco: Baco, replies: Sequence[str]) -> None:
        self._baco, self.pair, self.replies = baco, baco.pair, list(replies)
        self.chats: list[list[dict[str, str]]] = []
        self.options: list[dict[str, Any]] = []

    def generate_batch(self, chats: Sequence[Any], **options: Any) -> Any:
        from dataclasses import replace

        from baco.text.answer_text import Piece

        rows = self._baco.generate_batch(chats, **options | {"max_tokens": 1})
        self.chats += [list(chat) for chat in chats]
        self.options.append(options)
        return [
            [
                replace(completion, text=text, pieces=(Piece(text, "aligned"),))
                for completion in row
                for text in [self.replies.pop(0)]
            ]
            for row in rows
        ]


def test_every_setting_of_a_combiner_needs_one_tokenizer() -> None:
    settings = select_settings(["ensemble", "contrastive"], ["Ensemble:0.5"], Grid("quick", 2))
    assert all(map(needs_one_tokenizer, settings))


def test_rivals_are_a_group_of_their_own() -> None:
    rivals = groups()["rivals"]
    assert set(rivals) <= set(methods())
    assert not set(rivals) & set(groups()["all"])
    assert not set(rivals) & set(groups()["prompting"])


@pytest.mark.parametrize("format", ["plain", "minimal"])
def test_the_aligned_model_continues_text_without_its_template(
    demo: Baco, prompts: tuple[Prompt, ...], format: Any
) -> None:
    """Greedy, next to the aligned model's own rows for the text, token by token."""
    changes = {"sampling": {"temperature": 0.0}}
    rows = answer(
        demo, setting_of(f"{format}-prompt", **changes), prompts, Draw(2, 1, {"max_tokens": 12})
    )
    for prompt, samples in zip(prompts, rows, strict=True):
        content = prompt.messages[0]["content"]
        text = content if format == "plain" else f"user\n{content}\nassistant\n"
        ids, tokens = demo.pair.renderer.read(text, "aligned"), list[int]()
        while len(tokens) < 12 and not (tokens and tokens[-1] in demo.pair.end_ids):
            tokens.append(int(demo.pair.aligned.score([*ids, *tokens])[-1].argmax()))
        expected = demo.pair.tokenizer.decode(tokens, skip_special_tokens=True)
        assert [sample.text for sample in samples] == [expected.partition("\nuser\n")[0]] * 2
        assert {sample.base_share for sample in samples} == {0.0}


def test_a_conversation_without_its_template_keeps_its_messages_in_order() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    assert text_of(messages, "plain") == "Be kind.\n\nHi"
    assert text_of(messages, "minimal") == "system\nBe kind.\nuser\nHi\nassistant\n"


def test_a_prompt_draws_by_its_own_digest_without_a_template(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    draw = Draw(3, 1, {"max_tokens": 12})
    together = answer(demo, setting_of("plain-prompt"), prompts, draw)
    alone = [answer(demo, setting_of("plain-prompt"), [prompt], draw)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (
            "<random_string>a7</random_string><thinking>97 % 2</thinking><answer> Oslo </answer>",
            "Oslo",
        ),
        ("<thinking>an <answer></answer> tag</thinking>\n<ANSWER>Rome", "Rome"),
        ("Oslo", None),
        ("<answer></answer>", None),
    ],
)
def test_a_string_seed_is_cut_off_before_the_answer(reply: str, expected: str | None) -> None:
    assert answer_of(reply) == expected


def test_string_seed_keeps_answers_and_marks_replies_without_one(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    replies = ["<random_string>x</random_string><answer>Oslo</answer>", "no tag"]
    scripted: Any = Scripted(demo, replies)
    (row,) = answer(scripted, setting_of("string-seed"), prompts[:1], Draw(2, 1))
    assert [(a.text, a.finish_reason == "unparsed") for a in row] == [
        ("Oslo", False),
        ("no tag", True),
    ]
    assert row[0].pieces == (("Oslo", "aligned"),)
    system = scripted.chats[0][0]
    assert system["role"] == "system"
    assert "<random_string>" in system["content"]
    assert scripted.options[0]["max_tokens"] == demo.pair.defaults.max_tokens + 256


def tagged(*texts: str) -> str:
    return "".join(
        f"<response><text>{text}</text><probability>0.01</probability></response>" for text in texts
    )


def test_verbalized_sampling_from_the_tail_names_its_threshold(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    settings = methods()["verbalized-tail"].settings(FULL)
    assert [setting.value for setting in settings] == [0.5, 0.1, 0.05, 0.01, 0.001]
    scripted: Any = Scripted(demo, [tagged("a", "b")])
    (row,) = answer(scripted, settings[1], prompts[:1], Draw(2, 1))
    assert [a.text for a in row] == ["a", "b"]
    system = scripted.chats[0][0]["content"]
    assert system == tail_system(0.1).replace("{count}", "2")
    assert "the probability of each response is less than 0.1." in system
    assert "full distribution" not in system


def test_verbalized_sampling_reasons_first_where_it_has_a_chain_of_thought(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    reply = "<reasoning>Many places.</reasoning>" + tagged("a", "b")
    scripted: Any = Scripted(demo, [reply])
    (row,) = answer(scripted, setting_of("verbalized-cot"), prompts[:1], Draw(2, 1))
    assert [a.text for a in row] == ["a", "b"] == parse(reply)
    system = scripted.chats[0][0]["content"]
    assert system.index("<reasoning>") < system.index("generate a set of 2")


def test_verbalized_sampling_over_turns_continues_one_chat(
    demo: Baco, prompts: tuple[Prompt, ...]
) -> None:
    first, second = tagged("a", "b"), tagged("c", "d", "e")
    scripted: Any = Scripted(demo, [first, second])
    (row,) = answer(scripted, setting_of("verbalized-multi"), prompts[:1], Draw(4, 1))
    assert [a.text for a in row] == ["a", "b", "c", "d"]
    opening, later = scripted.chats
    assert later[: len(opening)] == opening
    assert later[len(opening) :] == [
        {"role": "assistant", "content": first},
        {"role": "user", "content": MORE.replace("{count}", "4")},
    ]
    assert scripted.options[0]["seed"] != scripted.options[1]["seed"]
