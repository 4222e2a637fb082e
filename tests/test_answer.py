"""From prompts to text: two renderings, stop strings, characters that are never cut, pairs."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig

from baco import Baco, BacoError
from baco.calibration import distinct_2, isotonic
from baco.diagnose import diagnose, judge
from baco.known import find_pair, known_pairs
from baco.prompts import Renderer
from baco.text import AnswerText
from tests.pairs import PairFolder
from tests.test_vocabulary import byte_level

BYTE_LEVEL = byte_level()


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
    shown += "".join(piece.text for piece in answer.close())
    assert shown == answer.text
    return shown, False, answer.tokens


@given(st.text(alphabet="ab ü夏🌊\n.é", max_size=30))
def test_pieces_join_to_the_text_and_no_character_is_cut(text: str) -> None:
    assert read(text)[0] == text.lstrip(" ")


@given(st.text(alphabet="abEND \n", max_size=40))
def test_a_stop_string_ends_the_answer_and_is_never_shown(text: str) -> None:
    shown, stopped, _ = read(text, stops=("END", "aab"))
    body = text.lstrip(" ")
    cuts = [at for stop in ("END", "aab") if (at := body.find(stop)) >= 0]
    assert stopped == bool(cuts)
    assert shown == (body[: min(cuts)] if cuts else body)


def test_the_bases_next_turn_is_cut_off_only_at_a_lines_start() -> None:
    assert read("Go to Naxos.\n\nQuestion: and", opening="Question:")[:2] == ("Go to Naxos.", True)
    kept = "The Question: is open."
    assert read(kept, opening="Question:")[:2] == (kept, False)


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
    assert rendered.base_text == "Question: A\nAnswer: B\n\nQuestion: C\nAnswer:\n"
    assert llama.pair.renderer.turn_opening == "Question:"


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
    ],
)
def test_a_bad_conversation_is_refused(llama: Baco, prompt: Any, message: str) -> None:
    with pytest.raises(BacoError, match=message):
        llama.generate(prompt)


def test_a_pair_is_found_by_short_name_or_folder_and_typos_get_a_hint() -> None:
    assert find_pair("Qwen2.5-7B").aligned == "Qwen/Qwen2.5-7B-Instruct"
    assert find_pair(str(known_pairs()[0].base).removesuffix("/base")).name == "demo"
    with pytest.raises(BacoError, match=r"nearest are .*qwen2\.5-7b"):
        find_pair("qwen2.5-7")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_an_isotonic_fit_never_falls_and_leaves_what_never_fell(values: list[float]) -> None:
    fit = isotonic(values)
    assert list(fit) == sorted(fit)
    assert sum(fit) == pytest.approx(sum(values))
    assert isotonic(sorted(values)) == tuple(sorted(values))


def test_distinct_2_by_hand() -> None:
    assert distinct_2(["a b c", "a b d"]) == 3 / 4
    assert distinct_2(["a", ""]) == 0


def test_diagnosis_of_the_demo_pair_is_good_and_of_twins_useless(demo: Baco, llama: Baco) -> None:
    prompts = ["Recommend a summer destination", "Give me a dinner idea", "Tell me a fun fact"]
    found = diagnose(demo, prompts, samples=1, max_tokens=32)
    assert found.verdict == "good"
    assert found.entropy_base > 1.2 * found.entropy_aligned
    shares = [found.base_share[f"P:{gamma}"] for gamma in ("0.1", "0.3", "0.5", "0.7")]
    assert shares == sorted(shares)
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
