"""A last assistant message is continued: both models read its text and the answer follows it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError
from baco.cli import run
from baco.text.prompts import Prompt, Renderer
from tests.chat_templates import (
    DEEPSEEK_R1,
    FAMILIES,
    LLAMA_3,
    MISTRAL,
    MISTRAL_NEMO,
    NO_SYSTEM,
    QUESTION_LAST,
    QWEN_3,
)
from tests.pairs import train_tokenizer, wrapped
from tests.test_vocabulary import byte_level, sentencepiece, unigram

QUESTION = {"role": "user", "content": "Where should I go?"}
PREFILLS = [
    "You could go",
    "You could g",
    "You could go ",
    "  ",
    "\n",
    "    return x\n  ",
    "{",
    "夏",
]


def renderer(template: str, **options: Any) -> Renderer:
    backend = train_tokenizer()
    aligned = wrapped(backend, aligned=True)
    aligned.chat_template = template
    aligned.bos_token = "<|endoftext|>"
    return Renderer(wrapped(backend, aligned=False), aligned, **options)


RENDERERS = {name: renderer(template) for name, template in FAMILIES.items()}


def begun(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def common_end(prompt: Prompt) -> int:
    pairs = zip(reversed(prompt.base_ids), reversed(prompt.aligned_ids), strict=False)
    return next((n for n, (base, aligned) in enumerate(pairs) if base != aligned), 0)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_prompts_end_in_the_very_text_and_tokens_of_the_prefill(
    family: str, prefill: str
) -> None:
    both = RENDERERS[family]
    prompt = both.render([QUESTION, begun(prefill)])
    assert not prompt.joining_space
    for text, ids, tokenizer in (
        (prompt.base_text, prompt.base_ids, both.base_tokenizer),
        (prompt.aligned_text, prompt.aligned_ids, both.aligned_tokenizer),
    ):
        assert text.endswith(prefill)
        assert tokenizer.decode(ids) == text
    own = both.aligned_tokenizer(prefill, add_special_tokens=False)["input_ids"]
    assert common_end(prompt) >= max(1, len(own) - 1)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.text(alphabet="aé夏 \n\t.<>{}|", min_size=1))
def test_any_prefill_ends_both_prompts(family: str, prefill: str) -> None:
    prompt = RENDERERS[family].render([QUESTION, begun(prefill)])
    assert prompt.base_text.endswith(prefill)
    assert prompt.aligned_text.endswith(prefill)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefill_follows_the_generation_prompt(family: str) -> None:
    both = RENDERERS[family]
    system = None if family in NO_SYSTEM else "Be brief."
    asking = both.render([QUESTION], system)
    prompt = both.render([QUESTION, begun("Go there")], system)
    between = {"qwen 3": "<think>\n\n</think>\n\n", "mistral": " ", "question last": " "}
    if family == "deepseek r1":  # an answer stands outside of the thoughts
        assert prompt.aligned_text == asking.aligned_text.removesuffix("<think>\n") + "Go there"
        return
    if family == "mistral nemo":  # it drops the system message, so the ordinary prompt is kept
        between[family] = " "
    assert prompt.aligned_text == asking.aligned_text + between.get(family, "") + "Go there"
    space = " " if not asking.base_text[-1].isspace() else ""
    assert prompt.base_text == asking.base_text + space + "Go there"


def test_a_template_that_joins_without_a_space_has_none_in_the_base_prompt() -> None:
    prompt = renderer(MISTRAL_NEMO).render([QUESTION, begun("Go there")])
    assert prompt.aligned_text.endswith("[/INST]Go there")
    assert prompt.base_text.endswith("Answer:\nGo there")


def test_a_template_that_joins_with_a_space_has_it_in_both_prompts() -> None:
    both = renderer(MISTRAL)
    prompt = both.render([QUESTION, begun("Go there")])
    assert prompt.aligned_text.endswith("[/INST] Go there")
    assert prompt.base_text.endswith("Answer: Go there")
    own = tuple(both.aligned_tokenizer(" Go there", add_special_tokens=False)["input_ids"])
    assert prompt.aligned_ids[-len(own) :] == prompt.base_ids[-len(own) :] == own


@pytest.mark.parametrize("kind", [sentencepiece, unigram, byte_level])
@pytest.mark.parametrize("prefill", ["the sea", "sea is w", " the", "the sea "])
def test_a_tokenizer_that_puts_a_space_before_a_text_puts_none_inside(
    kind: Callable[[], Any], prefill: str
) -> None:
    tokenizer = kind()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    both = Renderer(tokenizer, tokenizer, aligned_template=template, base_template="aligned")
    prompt = both.render([{"role": "user", "content": "the sea"}, begun(prefill)])
    assert prompt.aligned_text == f"user: the sea assistant: {prefill}"
    assert tokenizer.decode(prompt.aligned_ids).lstrip() == prompt.aligned_text


def test_a_system_message_is_kept_with_a_prefill() -> None:
    prompt = renderer(MISTRAL).render([QUESTION, begun("Go")], "Be brief.")
    assert "Be brief." in prompt.aligned_text
    assert "Be brief." in prompt.base_text


def test_a_message_that_a_template_would_change_is_read_as_it_is() -> None:
    prefill = "<think>\nWell.\n</think>\n\nGo"
    assert (
        renderer(QWEN_3)
        .render([QUESTION, begun(prefill)])
        .aligned_text.endswith("<|im_start|>assistant\n" + prefill)
    )
    trimmed = renderer(QWEN_3).render([QUESTION, begun("\n\n\nGo")])
    assert trimmed.aligned_text.endswith("assistant\n<think>\n\n</think>\n\n\n\n\nGo")
    prompt = renderer(DEEPSEEK_R1).render([QUESTION, begun(prefill)])
    assert prompt.aligned_text.endswith(prefill)
    assert prompt.base_text.endswith(prefill)


def test_indentation_of_a_prefill_is_kept_by_templates_that_trim() -> None:
    prompt = renderer(LLAMA_3).render([QUESTION, begun("    return")])
    assert prompt.aligned_text.endswith("[assistant]\n\n    return")
    assert prompt.base_text.endswith("Answer:\n    return")


def test_both_models_may_read_one_prompt() -> None:
    prompt = renderer(QUESTION_LAST, base_template="aligned").render([QUESTION, begun("Go")])
    assert prompt.base_ids == prompt.aligned_ids
    assert (
        prompt.base_text
        == prompt.aligned_text
        == "<user>Where should I go?<|im_end|>" + ("<assistant> Go")
    )


def test_an_empty_last_message_is_an_ordinary_question() -> None:
    both = RENDERERS["chatml"]
    assert both.render([QUESTION, begun("")]) == both.render([QUESTION])


@pytest.mark.parametrize(
    ("messages", "continue_final", "message"),
    [
        ([QUESTION], True, "continue_final_message is true: end the conversation"),
        ([QUESTION, begun("Go")], False, "continue_final_message is false, but"),
        ([begun("Go")], None, "no message of role 'user'"),
        ([begun("Go")], True, "no message of role 'user'"),
        ([{"role": "user", "content": " "}, begun("Go")], None, "the prompt is empty"),
        ([QUESTION, {"role": "system", "content": "x"}], None, "must end with"),
    ],
)
def test_a_conversation_that_cannot_be_continued_is_refused(
    messages: list[dict[str, str]], continue_final: bool | None, message: str
) -> None:
    with pytest.raises(BacoError, match=message):
        RENDERERS["chatml"].render(messages, continue_final=continue_final)


@pytest.mark.parametrize("router", ["Aligned", "Base"])
def test_a_continued_answer_is_the_uninterrupted_one(demo: Baco, router: str) -> None:
    settings: dict[str, Any] = {"router": router, "temperature": 0, "max_tokens": 24}
    question = {"role": "user", "content": "Recommend a summer destination"}
    (whole,) = demo.generate([question], **settings)
    for cut in (1, len(whole.token_ids) // 2):
        beginning = demo.pair.tokenizer.decode(whole.token_ids[:cut]).removeprefix(" ")
        (rest,) = demo.generate([question, begun(beginning)], continue_final=True, **settings)
        assert (beginning + rest.text).startswith(whole.text)
        assert rest.text[0] == " "


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_files_of_prompts_may_hold_begun_answers(demo: Baco, command: str, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Recommend a summer destination"}, begun("You could")]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    settings = ["-r", "P-Punc:0.4", "-s", "3", "--max-tokens", "12", "-n", "2"]
    if command == "generate":
        out = tmp_path / "out.jsonl"
        assert run(["generate", "--jsonl", str(file), "-o", str(out), *settings]) == 0
    else:
        out = tmp_path / "out" / "rows-000000000-000000000.jsonl"
        assert run(["batch", str(file), str(out.parent), *settings]) == 0
    record = json.loads(out.read_text())
    assert record["prompt"] == messages
    expected = demo.generate(messages, router="P-Punc:0.4", seed=3, max_tokens=12, n=2)
    assert [s["text"] for s in record["samples"]] == [answer.text for answer in expected]
    assert not any(answer.text.startswith("You could") for answer in expected)


def test_a_continued_answer_is_the_same_streamed_and_whole(demo: Baco) -> None:
    messages = [{"role": "user", "content": "Recommend a summer destination"}, begun("You could ")]
    chunks = list(demo.stream(messages, router="P-Punc:0.4", seed=3, max_tokens=12))
    assert chunks[-1].completion is not None
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text
