"""A pair as a `transformers` model gives the answers of `Baco.generate` in transformers' loops."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from baco import Baco, BacoError, as_transformers
from baco.integrations.transformers.chat import ChatReader
from tests.pairs import ARCHITECTURES, PairFolder

Conversation = list[dict[str, str]]
SHORT: Conversation = [{"role": "user", "content": "Recommend a gift."}]
LONG: Conversation = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a good hobby?\n\nFor a rainy autumn, I mean."},
    {"role": "assistant", "content": "Painting is a quiet one."},
    {"role": "user", "content": "And what would you recommend for the summer?"},
]
ROUTERS = ("Base", "Aligned", "P:0.4", "P-Punc:0.4", "H-FC:1.0", "Nudging:0.3")
TOKENS = 24


def encoded(
    baco: Baco, *conversations: Conversation, continued: bool = False
) -> dict[str, torch.Tensor]:
    """The conversations as the aligned model's chat template renders them, padded on the left."""
    tokenizer = baco.pair.tokenizer
    batch = tokenizer.apply_chat_template(
        list(conversations),
        add_generation_prompt=not continued,
        continue_final_message=continued,
        padding=True,
        padding_side="left",
        return_dict=True,
        return_tensors="pt",
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def answers(baco: Baco, sequences: torch.Tensor, prompt: torch.Tensor) -> list[list[int]]:
    """The tokens generated after ``prompt``, up to and including the end token."""
    ends = set(baco.pair.end_ids)
    generated = []
    for row in sequences[:, prompt.shape[1] :].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        generated.append(row[:stop])
    return generated


@pytest.fixture(scope="module", params=ARCHITECTURES)
def random(request: pytest.FixtureRequest, random_pair: Callable[..., PairFolder]) -> Baco:
    folder = random_pair(request.param)
    return Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")


@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_answers_are_those_of_baco(demo: Baco, router: str) -> None:
    batch = encoded(demo, SHORT, LONG)
    model = as_transformers(demo, router)
    output = model.generate(
        **batch, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
    )
    start = batch["input_ids"].shape[1] - 1
    for row, conversation in enumerate((SHORT, LONG)):
        [expected] = demo.generate(conversation, router=router, temperature=0, max_tokens=TOKENS)
        count = len(expected.token_ids)
        got = output.sequences[row, start + 1 : start + 1 + count].tolist()
        assert got == list(expected.token_ids)
        by_base = output.past_key_values.source[row, start : start + count].tolist()
        assert by_base == [source == "base" for source in expected.sources]


@pytest.mark.parametrize("router", ["Base", "Aligned", "P:0.4", "P-Punc:0.6"])
def test_a_prefilled_answer_continues_as_with_baco(demo: Baco, router: str) -> None:
    conversations = [
        [*before, {"role": "assistant", "content": text}]
        for text in ("You could go", "Vis", "I", "The beach is", "How ab", "Why not try")
        for before in (SHORT, LONG)
    ]
    batch = encoded(demo, *conversations, continued=True)
    output = as_transformers(demo, router).generate(
        **batch, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
    )
    start = batch["input_ids"].shape[1]
    for row, conversation in enumerate(conversations):
        [expected] = demo.generate(conversation, router=router, temperature=0, max_tokens=TOKENS)
        count = len(expected.token_ids)
        assert output.sequences[row, start : start + count].tolist() == list(expected.token_ids)
        source = output.past_key_values.source[row, start - 1 : start - 1 + count].tolist()
        assert source == [source == "base" for source in expected.sources]


@pytest.mark.parametrize("router", ["Base", "P:0.4", "P-Punc:0.6", "H:2.0"])
def test_greedy_answers_of_every_architecture_are_those_of_baco(random: Baco, router: str) -> None:
    batch = encoded(random, SHORT, LONG)
    model = as_transformers(random, router)
    output = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    for row, conversation in enumerate((SHORT, LONG)):
        [expected] = random.generate(conversation, router=router, temperature=0, max_tokens=TOKENS)
        got = output[row, batch["input_ids"].shape[1] :][: len(expected.token_ids)].tolist()
        assert got == list(expected.token_ids)


def test_an_adapter_is_active_only_in_the_aligned_model(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    folder = random_pair("llama")
    torch.manual_seed(3)
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder.base), lora).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained(folder.aligned).save_pretrained(tmp_path)
    baco = Baco.load(base=str(folder.base), aligned=str(tmp_path), dtype="float32")
    batch = encoded(baco, SHORT)
    generated = []
    for router in ("Base", "Aligned", "P:0.5"):
        output = as_transformers(baco, router).generate(
            **batch, max_new_tokens=TOKENS, do_sample=False
        )
        [expected] = baco.generate(SHORT, router=router, temperature=0, max_tokens=TOKENS)
        generated.append(
            output[0, batch["input_ids"].shape[1] :][: len(expected.token_ids)].tolist()
        )
        assert generated[-1] == list(expected.token_ids)
    assert generated[0] != generated[1]


def test_aligned_alone_is_the_aligned_models_own_generate(random: Baco) -> None:
    batch = encoded(random, SHORT, LONG)
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    own = random.pair.aligned.model.generate(
        **batch, **settings, eos_token_id=list(random.pair.end_ids)
    )
    output = as_transformers(random, "Aligned").generate(**batch, **settings)
    assert answers(random, output, batch["input_ids"]) == answers(random, own, batch["input_ids"])


def test_scores_of_a_text_are_the_rows_it_was_drawn_from(random: Baco) -> None:
    batch = encoded(random, SHORT, LONG)
    model = as_transformers(random, "P:0.5")
    output = model.generate(
        **batch,
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    width = batch["input_ids"].shape[1]
    mask = torch.ones_like(output.sequences)
    mask[:, :width] = batch["attention_mask"]
    rows = model(output.sequences, attention_mask=mask).logits[:, width - 1 : -1]
    for row, answer in enumerate(answers(random, output.sequences, batch["input_ids"])):
        drawn = torch.stack([step[row] for step in output.logits[: len(answer)]])
        torch.testing.assert_close(rows[row, : len(answer)], drawn, atol=1e-4, rtol=1e-4)


def test_answers_are_the_same_with_and_without_a_cache(random: Baco) -> None:
    batch = encoded(random, SHORT, LONG)
    model = as_transformers(random, "P:0.5")
    settings: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}
    with_cache = model.generate(**batch, **settings)
    without = model.generate(**batch, **settings, use_cache=False)
    prompt = batch["input_ids"]
    assert answers(random, with_cache, prompt) == answers(random, without, prompt)


def test_assisted_decoding_rolls_both_models_back(random: Baco) -> None:
    batch = encoded(random, LONG)
    model = as_transformers(random, "P:0.5")
    plain = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    assisted = model.generate(
        **batch, max_new_tokens=TOKENS, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert assisted.tolist() == plain.tolist()


def test_sampling_takes_its_arguments_and_torchs_seed(demo: Baco) -> None:
    batch = encoded(demo, SHORT, LONG)
    model = as_transformers(demo, "P-Punc:0.4")

    def draw(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        output = model.generate(
            **batch, max_new_tokens=TOKENS, do_sample=True, min_p=0.1, num_return_sequences=4
        )
        return answers(demo, output, batch["input_ids"])

    first = draw(1)
    assert len(first) == 8
    assert len({tuple(answer) for answer in first[:4]}) > 1
    assert draw(1) == first
    assert draw(2) != first


def test_a_random_routers_coins_follow_the_seed(demo: Baco) -> None:
    batch = encoded(demo, SHORT)

    def sources(seed: int | None) -> list[bool]:
        output = as_transformers(demo, "Rand:0.5", seed=seed).generate(
            **batch, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
        )
        by_base: list[bool] = output.past_key_values.source[0].tolist()
        return by_base

    assert sources(1) == sources(1)
    assert any(sources(seed) != sources(1) for seed in (2, 3, 4))
    torch.manual_seed(0)
    fresh = sources(None)
    torch.manual_seed(0)
    assert sources(None) == fresh


def test_beams_share_their_history(demo: Baco) -> None:
    batch = encoded(demo, SHORT, LONG)
    output = as_transformers(demo, "P-Punc:0.4").generate(
        **batch, max_new_tokens=12, num_beams=3, num_return_sequences=2, do_sample=False
    )
    assert len(output) == 4
    assert output[0].tolist() != output[1].tolist()


@pytest.fixture(scope="module")
def twins(demo: Baco) -> Baco:
    """The demo pair with the base's weights in both models, and "Answer:" for a turn's opening.

    Both models open that turn after every question.
    """
    aligned = replace(demo.pair.aligned, model=demo.pair.base.model)
    renderer = replace(demo.pair.renderer)
    renderer.turn_opening = "Answer:"
    return replace(demo, pair=replace(demo.pair, aligned=aligned, renderer=renderer))


@pytest.mark.parametrize(
    ("router", "settings", "begun"),
    [
        ("Rand:0.5", {"do_sample": True, "num_return_sequences": 48}, " Go.\nQuestion: Where?"),
        (
            "Rand:0.5",
            {
                "do_sample": True,
                "num_return_sequences": 16,
                "max_new_tokens": 6,
                "use_cache": False,
            },
            " I would go to Rome.\nQuestion: Where?\n",
        ),
        ("Punc", {"do_sample": True, "num_return_sequences": 24}, " I see.\nQuestion: is it"),
        (
            "Punc",
            {"do_sample": False, "num_beams": 6, "num_return_sequences": 6},
            " Go.\nQuestion: ",
        ),
        ("Base", {"do_sample": False, "prompt_lookup_num_tokens": 3}, " Go.\nQuestion: Where?"),
    ],
)
def test_answers_end_where_the_base_opened_a_turn(
    twins: Baco, router: str, settings: dict[str, Any], begun: str
) -> None:
    """This holds whichever model wrote the rest; an opening begun by the aligned model is kept."""
    tokenizer = twins.pair.tokenizer
    model = as_transformers(twins, router, seed=1)
    batch = encoded(twins, SHORT)
    more = torch.tensor([tokenizer.encode(begun, add_special_tokens=False)], dtype=torch.int64)
    prompt = torch.cat([batch["input_ids"], more], dim=1)
    width = prompt.shape[1]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, **settings}
    torch.manual_seed(0)
    rows = model.generate(prompt, **arguments)
    by_base = model.sources(rows, torch.ones_like(rows), prompt_length=width, seed=1)
    opening, seen = tokenizer.convert_tokens_to_ids(["Answer", ":"]), set()
    for row, based in zip(rows.tolist(), by_base.tolist(), strict=True):
        for at in range(width, len(row) - 1):
            if at + 2 == width + arguments["max_new_tokens"]:
                continue  # every answer ends there
            if row[at : at + 2] == opening and tokenizer.decode(row[at - 1]).endswith("\n"):
                ended = set(row[at + 2 :]) <= {tokenizer.pad_token_id}
                assert ended == based[at - 1]
                seen.add(ended)
    assert seen == ({True, False} if router == "Rand:0.5" else {True})


def test_raw_text_has_no_turns(twins: Baco) -> None:
    text = "Question: Tell me a story about a fox.\nAnswer"
    prompt = twins.pair.tokenizer(text, return_tensors="pt").input_ids
    rows = as_transformers(twins, "Base").generate(prompt, max_new_tokens=8, do_sample=False)
    assert rows.shape[1] == prompt.shape[1] + 8


def test_streamers_see_the_answer_as_it_grows(
    demo: Baco, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = encoded(demo, SHORT)
    tokenizer = demo.pair.tokenizer
    model = as_transformers(demo, "P-Punc:0.4")
    settings: dict[str, Any] = {**batch, "max_new_tokens": TOKENS, "do_sample": False}
    [expected] = demo.generate(SHORT, router="P-Punc:0.4", temperature=0, max_tokens=TOKENS)

    options = {"skip_prompt": True, "skip_special_tokens": True}
    model.generate(**settings, streamer=TextStreamer(tokenizer, **options))
    assert capsys.readouterr().out.strip() == expected.text.strip()

    streamer = TextIteratorStreamer(tokenizer, timeout=240, **options)
    thread = Thread(target=model.generate, kwargs={**settings, "streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces).strip() == expected.text.strip()


def test_the_pipeline_answers_conversations_and_batches(demo: Baco) -> None:
    model = as_transformers(demo, "P-Punc:0.4")
    talk = pipeline("text-generation", model=model, tokenizer=demo.pair.tokenizer)
    results = talk([SHORT, LONG], max_new_tokens=TOKENS, do_sample=False, batch_size=2)
    for conversation, [result] in zip((SHORT, LONG), results, strict=True):
        [expected] = demo.generate(
            conversation, router="P-Punc:0.4", temperature=0, max_tokens=TOKENS
        )
        assert result["generated_text"][-1]["content"].strip() == expected.text.strip()


def test_the_base_model_reads_the_conversation_as_plain_text(demo: Baco) -> None:
    reader = ChatReader(demo.pair.renderer)
    for conversation in (SHORT, LONG):
        prompt = demo.pair.renderer.render(conversation)
        aligned = list(prompt.aligned_ids)
        begun = demo.pair.tokenizer.encode(" I would", add_special_tokens=False)
        for ids in (aligned, aligned + begun):
            [reading] = reader.read([ids])
            assert reading is not None
            assert reading.ids == prompt.base_ids
            assert reading.start == len(aligned)


def test_raw_text_is_read_alike_by_both(demo: Baco) -> None:
    ids = demo.pair.tokenizer("Once upon a time", return_tensors="pt").input_ids
    own = demo.pair.base.model(ids).logits[:, 1:, : demo.pair.vocabulary.size].float()
    rows = as_transformers(demo, "Base")(ids).logits[:, 1:]
    sayable = rows > rows.min() + 1  # special tokens may not come from the base model
    torch.testing.assert_close(rows[sayable], own[sayable], atol=1e-3, rtol=1e-3)
    assert (rows.argmax(-1) == own.argmax(-1)).all()


def test_base_prompt_same_gives_the_base_the_aligned_prompt(demo: Baco) -> None:
    batch = encoded(demo, SHORT)
    model = as_transformers(demo, "Base", base_prompt="same")
    output = model.generate(**batch, max_new_tokens=1, do_sample=False)
    logits = demo.pair.base.model(**batch).logits[0, -1, : demo.pair.vocabulary.size]
    ordinary = logits.masked_fill(demo.pair.vocabulary.special, -torch.inf)
    end_ids = list(demo.pair.end_ids)
    ordinary[end_ids] = logits[end_ids]
    assert output[0, -1] == ordinary.argmax()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, _: model.generate(), "no prompt"),
        (lambda model, ids: model.generate(ids[:, :0], max_new_tokens=2), "prompt has no token"),
        (lambda model, ids: model(ids, labels=ids), "labels"),
        (lambda model, ids: model(ids, past_key_values=object()), "past_key_values"),
        (lambda model, _: model.save_pretrained("x"), "two models"),
    ],
)
def test_unsupported_arguments_are_one_line(
    demo: Baco, call: Callable[[Any, torch.Tensor], object], words: str
) -> None:
    model = as_transformers(demo, "P:0.4")
    with pytest.raises(BacoError, match=words) as error:
        call(model, torch.tensor([[5, 6, 7]]))
    assert "\n" not in str(error.value)


def test_a_model_without_keys_and_values_is_refused_by_name(random: Baco) -> None:
    config = MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = replace(random.pair.base, name="snake", model=AutoModelForCausalLM.from_config(config))
    with pytest.raises(BacoError, match=r"snake \(MambaForCausalLM\)"):
        as_transformers(replace(random.pair, base=mamba), "P:0.4")


def test_unknown_routers_and_base_prompts_are_refused(demo: Baco) -> None:
    with pytest.raises(BacoError, match="Sphinx"):
        as_transformers(demo, "Sphinx:0.4")
    with pytest.raises(BacoError, match="auto"):
        as_transformers(demo, "P:0.4", base_prompt="both")  # type: ignore[arg-type]
