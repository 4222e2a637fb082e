"""From prompts to text: two renderings, stop strings, whole characters, and pairs."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from baco import Baco, BacoError
from baco.calibration.diagnose import diagnose, judge
from baco.calibration.store import isotonic
from baco.models.known_pairs import find_pair, known_pairs
from baco.text.answer_text import AnswerText
from baco.text.prompts import Renderer
from baco.text.segmentation import distinct
from tests.pairs import PairFolder
from tests.test_vocabulary import byte_level

BYTE_LEVEL = byte_level()
Words = list[tuple[str, Any]]  # each with its source


@pytest.fixture(scope="module")
def llama(random_pair: Callable[..., PairFolder]) -> Baco:
    folder = random_pair("llama", noise=0.3)
    return Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")


def read(text: str, **options: Any) -> tuple[str, bool, int]:
    """Push a text's tokens until it ends; what was handed out, whether a stop was met, tokens."""
    answer = AnswerText(BYTE_LEVEL, **options)
    shown = ""
    for token in BYTE_LEVEL(text, add_special_tokens=False)["input_ids"]:
        pieces, stopped = answer.push(token, "base")
        shown += "".join(piece.text for piece in pieces)
        assert "\ufffd" not in shown
        if stopped:
            return shown, True, answer.tokens
    shown += "".join(piece.text for piece in answer.close()[0])
    assert shown == answer.text
    return shown, False, answer.tokens


def push_words(words: Words, **options: Any) -> tuple[str, bool]:
    """Push words with their sources until the answer ends; its text, and whether a stop was met."""
    answer = AnswerText(BYTE_LEVEL, **options)
    for text, source in words:
        for token in BYTE_LEVEL(text, add_special_tokens=False)["input_ids"]:
            if answer.push(token, source)[1]:
                return answer.text, True
    _, stopped = answer.close()
    return answer.text, stopped


@given(st.text(alphabet="ab ü夏🌊\n.é", max_size=30), st.booleans())
def test_pieces_join_to_the_text_and_no_character_is_cut(text: str, joined: bool) -> None:
    assert read(text, joining_space=joined)[0] == (text.removeprefix(" ") if joined else text)


def test_only_the_joining_space_is_removed_where_there_is_one(llama: Baco, demo: Baco) -> None:
    code = "        return x\n    y"
    assert read(code)[0] == code
    assert read(code, joining_space=True)[0] == code[1:]
    # ChatML ends in a new line; the demo pair's template ends in a role token.
    assert not llama.pair.renderer.render("Hello").joining_space
    assert demo.pair.renderer.render("Hello").joining_space
    assert not demo.pair.renderer.raw("Hello").joining_space
    same = replace(demo.pair.renderer, base_template="aligned")
    assert same.render("Hello").joining_space


def test_indentation_is_kept_streamed_and_whole(llama: Baco, demo: Baco) -> None:
    """The answers are forced to begin with spaces, after a line break and after a joining space."""
    for baco, lost in ((llama, 0), (demo, 1)):
        (space,) = baco.pair.tokenizer(" ", add_special_tokens=False)["input_ids"]
        settings: dict[str, Any] = {"router": "Aligned", "max_tokens": 4, "seed": 1}
        chunks = list(baco.stream("Hello", logit_bias={space: 100}, **settings))
        whole = chunks[-1].completion
        assert whole is not None
        assert whole.text == " " * (4 - lost)
        assert "".join(chunk.text for chunk in chunks) == whole.text
        (raw,) = set(whole.token_ids)
        assert raw == space


@given(st.text(alphabet="abEND \n", max_size=40))
def test_a_stop_string_ends_the_answer_and_is_never_shown(text: str) -> None:
    shown, stopped, _ = read(text, stops=("END", "aab"))
    ends = [(at + 3, at) for stop in ("END", "aab") if (at := text.find(stop)) >= 0]
    assert stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


OPENING = "Question:"


def by_hand(words: Words) -> int | None:
    """Where a text ends because the base opens the next turn there, by a regular expression."""
    text = "".join(word for word, _ in words)
    wrote = [source for word, source in words for _ in word]
    for match in re.finditer(rf"(?:^|(?<=\n))[ \t]*({OPENING})", text):
        if wrote[match.start(1)] == "base":
            return len(text[: match.start()].rstrip())
    return None


WORDS = ("Question", ":", "Question:", "Quest", "ion:", "\n", "\nQ", "uestion", " ", "\t", "x", "Q")


@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(("base", "aligned")))))
def test_a_turn_is_cut_off_if_the_base_wrote_its_first_character(words: Words) -> None:
    text, cut = "".join(word for word, _ in words), by_hand(words)
    assert push_words(words, opening=OPENING) == (text[:cut], cut is not None)


@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(("base", "aligned")))))
def test_text_is_held_back_only_while_the_base_may_be_opening_a_turn(words: Words) -> None:
    answer = AnswerText(BYTE_LEVEL, opening=OPENING)
    for count, (word, source) in enumerate(words, 1):
        for token in BYTE_LEVEL(word, add_special_tokens=False)["input_ids"]:
            if answer.push(token, source)[1]:
                return
        text = "".join(word for word, _ in words[:count])
        # A turn opened from here on cuts off white space and the beginning of an opening.
        least = len(text.rstrip())
        for length in range(1, len(OPENING)):
            begun = [*words[:count], (OPENING[length:], "aligned")]
            if text.endswith(OPENING[:length]) and (cut := by_hand(begun)) is not None:
                least = min(least, cut)
        assert answer.text == text[:least]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([("Go to Naxos.", "aligned"), ("\n\nQuestion", "base"), (":", "aligned")], "Go to Naxos."),
        ([("Naxos.", "base"), ("\n", "aligned"), ("  Question:", "base")], "Naxos."),
        ([("The Question: is open.", "base")], None),
        ([("Naxos.\n", "base"), ("Question: why?", "aligned")], None),
        ([("Question: why?", "aligned")], None),
        ([("Question: why?", "base")], ""),
    ],
)
def test_a_turn_opened_by_the_base_model_is_cut_and_a_similar_line_is_not(
    words: Words, text: str | None
) -> None:
    whole = "".join(word for word, _ in words)
    assert push_words(words, opening=OPENING) == (whole if text is None else text, text is not None)


def test_an_answer_that_continues_a_line_opens_no_turn_there() -> None:
    words: Words = [("Question:", "base"), ("\nQuestion:", "base")]
    assert push_words(words, opening=OPENING, starts_line=False) == ("Question:", True)


# Line breaks are the base's, so that it opens turns; an opening's colon is the aligned model's.
MARKS_ALIGNED = "Role:punctuation=aligned," + ",".join(
    f"{role}=base" for role in ("format", "function", "number", "name", "opinion", "content")
)


@pytest.mark.parametrize("router", [MARKS_ALIGNED, "Punc", "P-Punc:0.8", "Base"])
def test_answers_end_where_the_base_opens_a_turn(demo: Baco, router: str) -> None:
    """The colon may be the aligned model's. A line that the aligned model begins is kept."""
    renderer = replace(demo.pair.renderer)
    renderer.turn_opening = None
    running_on = replace(demo, pair=replace(demo.pair, renderer=renderer))
    settings: dict[str, Any] = {"router": router, "n": 80, "seed": 1, "max_tokens": 80}
    if router == MARKS_ALIGNED:  # a colon more often than the aligned model would write one
        colon = demo.pair.tokenizer.convert_tokens_to_ids(":")
        settings["logit_bias"] = {colon: 8.0}
    colons = set()
    for whole, cut in zip(
        running_on.generate("Recommend a summer destination", **settings),
        demo.generate("Recommend a summer destination", **settings),
        strict=True,
    ):
        words = [(piece.text, piece.source) for piece in whole.pieces]
        end = by_hand(words)
        assert cut.text == whole.text[:end]
        assert cut.finish_reason == ("stop" if end is not None else whole.finish_reason)
        if end is not None:
            texts = [demo.pair.spelling(token).decode() for token in whole.token_ids]
            colons.add(whole.sources[texts.index(":", len(cut.token_ids))])
    if router in (MARKS_ALIGNED, "Base"):
        assert colons == {"base" if router == "Base" else "aligned"}


def test_tokens_beyond_a_cut_are_dropped() -> None:
    _, _, tokens = read("sea\nQuestion: more", opening="Question:")
    assert tokens == len(BYTE_LEVEL("sea", add_special_tokens=False)["input_ids"])


def test_both_prompts_end_so_that_the_answer_starts_alike(llama: Baco, demo: Baco) -> None:
    chat = llama.pair.renderer.render("Hello", system="Be kind.")
    assert chat.aligned_text.endswith("assistant\n")
    assert chat.base_text == "Be kind.\n\nQuestion: Hello\nAnswer:\n"
    spaced = demo.pair.renderer.render("Hello")
    assert spaced.base_text == "Question: Hello\nAnswer:"
    assert not spaced.aligned_text[-1].isspace()


def test_turns_are_rendered_for_both_and_the_next_opening_is_known(llama: Baco) -> None:
    turns = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    rendered = llama.pair.renderer.render(turns)
    assert rendered.base_text == "Question: A\nAnswer:\nB\n\nQuestion: C\nAnswer:\n"
    assert llama.pair.renderer.turn_opening == "Question:"


def test_the_next_turn_continues_what_both_models_read(llama: Baco, demo: Baco) -> None:
    question = {"role": "user", "content": "Where to?"}
    for baco, answer in ((llama, "Naxos."), (demo, " Naxos.")):  # as it was drawn
        first = baco.pair.renderer.render([question])
        replied = {"role": "assistant", "content": answer.strip()}
        second = baco.pair.renderer.render([question, replied, question])
        assert second.base_text.startswith(first.base_text + answer)
        assert second.aligned_text.startswith(first.aligned_text + answer)


def test_templates_can_be_overridden(llama: Baco) -> None:
    tokenizers = (llama.pair.base.tokenizer, llama.pair.aligned.tokenizer)
    own = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
    assert Renderer(*tokenizers, base_template=own).render("Hi").base_text == (
        "<user> Hi\n<assistant>"
    )
    same = Renderer(*tokenizers, base_template="aligned").render("Hi")
    assert same.base_ids == same.aligned_ids
    with pytest.raises(BacoError, match="not valid Jinja"):
        Renderer(*tokenizers, base_template="{% for %}")
    with pytest.raises(BacoError, match="no chat template"):
        Renderer(tokenizers[0], tokenizers[0]).render("Hi")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("  ", "prompt is empty"),
        ([], "must end with a message of role 'user'"),
        ([{"role": "assistant", "content": "x"}], "has no message of role 'user'"),
        ([{"role": "system", "content": "x"}], "must end with"),
        ([{"role": "bot", "content": "x"}], "message 0 has role 'bot'"),
        (["x"], "message 0 is 'x'"),
        (None, "the prompt is None: give a text, or a list of messages"),
        (float("nan"), "the prompt is nan"),
    ],
)
def test_a_bad_conversation_is_refused(llama: Baco, prompt: Any, message: str) -> None:
    with pytest.raises(BacoError, match=message):
        llama.generate(prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": 3}, "system is 3: give the text of a system message"),
        ({"router": 0.4}, "router 0.4: give a spelling such as P-Punc:0.4, or a router"),
        ({"digests": [b"one"]}, "1 digests for 2 prompts: give one for each prompt"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_decoded(
    llama: Baco, arguments: Any, message: str
) -> None:
    with pytest.raises(BacoError, match=message):
        llama.stream_batch(["Hi", "Plan a walk."], **{"router": "P:0.4", **arguments})


def test_a_pair_is_found_by_short_name_or_folder_and_typos_get_a_hint() -> None:
    assert find_pair("Qwen2.5-7B").aligned == "Qwen/Qwen2.5-7B-Instruct"
    assert find_pair(str(known_pairs()[0].base).removesuffix("/base")).name == "demo"
    with pytest.raises(BacoError, match=r"nearest are .*qwen2\.5-7b"):
        find_pair("qwen2.5-7")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_an_isotonic_fit_is_non_decreasing_and_keeps_non_decreasing_values(
    values: list[float],
) -> None:
    fit = isotonic(values)
    assert list(fit) == sorted(fit)
    assert sum(fit) == pytest.approx(sum(values))
    assert isotonic(sorted(values)) == tuple(sorted(values))


def test_distinct_2_by_hand() -> None:
    assert distinct(["a b c", "a b d"], 2) == 3 / 4
    assert distinct(["a", ""], 2) == 0


def test_diagnosis_of_the_demo_pair_is_good_and_of_twins_useless(demo: Baco, llama: Baco) -> None:
    prompts = ["Recommend a summer destination", "Give me a dinner idea", "Tell me a fun fact"]
    diagnosis = diagnose(demo, prompts, samples=1, max_tokens=32)
    assert diagnosis.verdict == "good"
    assert diagnosis.entropy_base > 1.2 * diagnosis.entropy_aligned
    shares = [diagnosis.base_share[f"P:{gamma}"] for gamma in ("0.1", "0.3", "0.5", "0.7")]
    assert shares == sorted(shares)
    assert set(diagnosis.forwards.values()) == {"BACo's own forward, all rows at once"}
    for milliseconds in diagnosis.forward_ms.values():
        assert list(milliseconds) == ["1", "8"]
        assert min(milliseconds.values()) > 0
    figures = {
        "agreement": 0.99,
        "overlap": 0.98,
        "entropy_base": 1.0,
        "entropy_aligned": 1.0,
        "prompt_gain": 0.5,
        "base_ends": 1.0,
        "first_token": 1.0,
    }
    verdict, reasons = judge(figures)
    assert verdict == "useless"
    assert "hardly differ" in reasons[0]
    follows = figures | {"agreement": 0.7, "entropy_aligned": 0.2, "prompt_gain": 0.0}
    assert "does not follow the prompt" in judge(follows)[1][0]
    assert diagnosis.sharing == "each model has its own weights"


def test_diagnosis_of_one_model_compares_its_two_prompts() -> None:
    figures = {
        "agreement": 0.75,
        "overlap": 0.79,
        "entropy_base": 2.0,
        "entropy_aligned": 1.0,
        "prompt_gain": 0.5,
        "base_ends": 1.0,
        "first_token": 1.0,
    }
    verdict, reasons = judge(figures, two_prompts=True)
    assert verdict == "good"
    assert reasons == [
        "the plain prompt has 1.00 nats a token more entropy than the chat template, and the base "
        "model follows the prompt"
    ]
    alike = figures | {"agreement": 0.99, "overlap": 0.98}
    assert "nearly the same under both prompts" in judge(alike, two_prompts=True)[1][0]
    diverse = figures | {"entropy_aligned": 1.9}
    verdict, reasons = judge(diverse, two_prompts=True)
    assert verdict == "doubtful"
    assert "nearly as diverse under its chat template" in reasons[0]


def test_an_adapter_over_the_base_holds_the_weights_once(
    random_pair: Callable[..., PairFolder], tmp_path: Any
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = random_pair("llama", noise=0.3)
    model = AutoModelForCausalLM.from_pretrained(folder.base)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path)
    whole = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")
    whole.pair.tokenizer.save_pretrained(tmp_path)
    pair = Baco.load(base=str(folder.base), aligned=str(tmp_path), dtype="float32").pair
    assert pair.base.model is pair.aligned.model
    ids = list(range(20))
    plain = AutoModelForCausalLM.from_pretrained(folder.base)
    expected = plain(torch.tensor([ids])).logits[0]
    assert torch.allclose(pair.base.score(ids), expected, atol=1e-5)
    assert not torch.allclose(pair.aligned.score(ids), expected, atol=1e-2)


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"quantization_config": "int8"}])
def test_placement_and_quantisation_are_passed_through(options: dict[str, Any]) -> None:
    if options.get("quantization_config") == "int8":
        options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    baco = Baco.load("demo", **options)
    weights = {type(w.data).__name__ for w in baco.pair.base.model.parameters()}
    assert weights == ({"Tensor"} if "device_map" in options else {"Tensor", "Int8Tensor"})
    # The default router asks for the pair's calibration, and that for its weights.
    (answer,) = baco.generate("Recommend a summer destination", seed=1)
    assert answer.text
    assert set(answer.sources) <= {"base", "aligned"}
