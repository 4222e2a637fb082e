"""The demo pair: the shipped pair shows the paper's effect, and training makes such pairs."""

import json
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from baco import Baco
from baco.cli import run
from baco.cli.sweep import sweep
from baco.demo.align import answers_only, conversations
from baco.demo.document_packing import IGNORED, batches, pack
from baco.demo.model import Cache, Shape, TinyLlama, to_llama
from baco.demo.optimiser import orthogonalise
from baco.demo.recipe import MINUTE
from baco.demo.sample import mean_log_probability, sample
from baco.demo.tokenizer import base_prompt
from baco.demo.train import train
from baco.demo.world.handover import handed_over_examples
from baco.errors import BacoError
from baco.evaluation.store import Run
from baco.models.known_pairs import demo_folder
from benchmarks.broken_grammar import broken_answers, held_out_questions
from tests.fuzzing import budget

MEGABYTE = 1_000_000
DEV_SEED = 7


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple]:
    loaded = {}
    for name in ("base", "aligned"):
        folder = demo_folder() / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loaded[name] = (model.eval(), tokenizer)
    return loaded


def test_the_shipped_pair_is_small() -> None:
    size = sum(file.stat().st_size for file in demo_folder().rglob("*") if file.is_file())
    assert size <= 12 * MEGABYTE
    assert json.loads((demo_folder() / "baco.json").read_text())["sampling"]["min_p"] == 0.1


def test_both_models_have_one_vocabulary_and_one_shape(models: dict[str, tuple]) -> None:
    (base, base_words), (aligned, aligned_words) = models["base"], models["aligned"]
    assert base_words.get_vocab() == aligned_words.get_vocab()
    assert base.num_parameters() == aligned.num_parameters()
    assert base.config.vocab_size == len(base_words)
    assert base_words.chat_template is None
    assert base_words.eos_token != aligned_words.eos_token
    for model, words in models.values():
        assert model.generation_config.eos_token_id == words.eos_token_id


def test_both_models_begin_an_answer_with_the_same_tokens(models: dict[str, tuple]) -> None:
    words = models["aligned"][1]
    question, answer = "Recommend a summer destination", "Maui is lovely."
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = words.apply_chat_template(
        chat[:1], add_generation_prompt=True, return_dict=False, tokenize=True
    )
    whole = words.apply_chat_template(chat, return_dict=False, tokenize=True)
    plain = words(base_prompt(question)).input_ids
    spoken = words(f"{base_prompt(question)} {answer}").input_ids
    assert whole[: len(prompt)] == prompt
    assert spoken[: len(plain)] == plain
    assert whole[len(prompt) : -1] == spoken[len(plain) :]
    assert whole[-1] == words.eos_token_id


def test_the_aligned_model_is_good_and_uniform_and_the_base_diverse(
    models: dict[str, tuple],
) -> None:
    from baco.demo.world import questions
    from baco.demo.world.judge import judge

    quality, keys = {}, {}
    dev_questions = questions("dev", 12, DEV_SEED)
    for name, (model, words) in models.items():
        qualities, distinct = [], []
        for question in dev_questions:
            text = (
                words.apply_chat_template(
                    [{"role": "user", "content": question.text}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                if name == "aligned"
                else base_prompt(question.text)
            )
            torch.manual_seed(0)
            prompt = words(text, return_tensors="pt")
            ids = model.generate(
                **prompt, do_sample=True, top_k=0, min_p=0.1, max_new_tokens=96,
                num_return_sequences=10, pad_token_id=words.pad_token_id,
            )  # fmt: skip
            answers = words.batch_decode(
                ids[:, prompt.input_ids.shape[1] :], skip_special_tokens=True
            )
            verdicts = [judge(question, answer.strip()) for answer in answers]
            qualities.append(sum(verdict.quality for verdict in verdicts) / 10)
            distinct.append(len({verdict.key for verdict in verdicts}))
        quality[name] = sum(qualities) / len(dev_questions)
        keys[name] = sum(distinct) / len(dev_questions)
    assert quality["aligned"] > 0.8
    assert keys["aligned"] < 3
    assert 0.25 < quality["base"] < 0.65
    assert keys["base"] > 5


def test_fewer_than_two_in_a_hundred_answers_break_the_grammar() -> None:
    pair = Baco.load("demo")
    questions = held_out_questions()
    assert len(questions) > 500
    for seed in range(budget(1)):
        broken = broken_answers(pair, questions, seed=seed)
        assert len(broken) < 0.02 * len(questions), [completion.text for _, completion in broken]


def test_the_ids_trained_on_are_those_of_the_chat_template(models: dict[str, tuple]) -> None:
    words = models["aligned"][1]
    tokenizer = Tokenizer.from_file(str(demo_folder() / "aligned" / "tokenizer.json"))
    examples = [(question.text, answer) for question, answer in handed_over_examples(300, 0)]
    chats = list(conversations(examples, seed=0))
    for (system, turns), (ids, flags) in zip(chats, answers_only(tokenizer, chats), strict=True):
        messages = [{"role": "system", "content": system}] if system else []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": "".join(word for word, _ in answer)})
        assert ids == words.apply_chat_template(messages, return_dict=False, tokenize=True)
        taught = "".join(word for _, answer in turns for word, flag in answer if flag)
        decoded = words.decode([i for i, flag in zip(ids, flags, strict=True) if flag])
        assert decoded.replace(words.eos_token, "").replace(" ", "") == taught.replace(" ", "")
        assert decoded.count(words.eos_token) == len(turns)


def test_training_makes_a_pair_that_loads_and_is_the_same_again(tmp_path: Path) -> None:
    for name in ("once", "again"):
        train(tmp_path / name, seed=3, progress=False, recipe=MINUTE)
    for source in ("base", "aligned"):
        once = AutoModelForCausalLM.from_pretrained(tmp_path / "once" / source)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / source)
        for name, weight in once.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name]), name
    with pytest.raises(BacoError, match="another seed"):
        train(tmp_path / "once", seed=4, progress=False, recipe=MINUTE)


def test_an_interrupted_training_is_resumed_to_the_same_pair(tmp_path: Path) -> None:
    train(tmp_path / "whole", seed=1, progress=False, recipe=MINUTE)
    train(tmp_path / "cut", seed=1, progress=False, recipe=MINUTE)
    (tmp_path / "cut" / "work" / "aligned.pt").unlink()
    before = (tmp_path / "cut" / "work" / "base.pt").stat().st_mtime_ns
    train(tmp_path / "cut", seed=1, progress=False, recipe=MINUTE)
    assert (tmp_path / "cut" / "work" / "base.pt").stat().st_mtime_ns == before
    for source in ("base", "aligned"):
        file = Path(source) / "model.safetensors"
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_trained_pair_is_measured_by_a_sweep_of_its_two_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(sweep, router=["P-Punc:0.5", "Rand:0.5"], method=["base"], n=2, limit=2)
    monkeypatch.setattr("baco.demo.train.Recipe", lambda: MINUTE)
    quick = partial(small, preset="quick", workers=1)
    monkeypatch.setattr(import_module("baco.cli.demo"), "sweep", quick)
    assert run(["demo", "train", "--out", str(tmp_path / "pair"), "--seed", "2"]) == 0
    measured = Run.open(tmp_path / "pair" / "run")
    assert measured.complete
    assert [task["name"] for task in measured.config["tasks"]] == ["demo", "demo-facts"]
    assert measured.config["seed"] == 2
    assert measured.config["made"]["command"].startswith("baco demo train --out")
    assert {"reward", "distinct_k", "accuracy"} <= set(measured.metrics())
    assert (measured.path / "report" / "index.html").is_file()


@pytest.fixture
def tiny() -> TinyLlama:
    return TinyLlama(Shape(vocabulary=50, hidden=32, layers=2, heads=2, inner=48, context=64), 0)


def test_the_exported_model_computes_the_trained_logits(tiny: TinyLlama, tmp_path: Path) -> None:
    for parameter in tiny.parameters():  # so that rounding to float16 loses nothing
        parameter.data = parameter.data.half().float()
    ids = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    to_llama(tiny, end=0, begin=0, pad=0).save_pretrained(tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    hidden = tiny(ids)
    assert torch.allclose(exported(ids).logits, tiny.logits(hidden), atol=1e-4)


@torch.inference_mode()
def test_logits_are_the_same_with_and_without_a_cache(tiny: TinyLlama) -> None:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(2))
    whole = tiny(ids)
    cache = Cache.empty(tiny.shape, 2, 9)
    tiny(ids[:, :5], cache)
    for position in range(5, 9):
        last = tiny(ids[:, position : position + 1], cache)
        assert torch.allclose(last[:, 0], whole[:, position], atol=1e-5)


def test_greedy_samples_are_the_most_likely_tokens(tiny: TinyLlama) -> None:
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8]]
    drawn = sample(tiny, prompts, 2, end=49, seed=0, min_p=1.0, max_tokens=6)
    for prompt, answers in zip(prompts, drawn, strict=True):
        ids = list(prompt)
        for _ in range(6):
            hidden = tiny(torch.tensor([ids]))
            token = int(tiny.logits(hidden[:, -1]).argmax())
            if token == 49:
                break
            ids.append(token)
        assert answers == [ids[len(prompt) :]] * 2


@torch.inference_mode()
def test_mean_log_probability_is_of_the_answer_alone(tiny: TinyLlama) -> None:
    prompts, answers = [[1, 2, 3], [4]], [[5, 6], [7, 8, 9]]
    scores = mean_log_probability(tiny, prompts, answers)
    for prompt, answer, got in zip(prompts, answers, scores, strict=True):
        ids = torch.tensor([prompt + answer])
        rows = torch.log_softmax(tiny.logits(tiny(ids)), -1)[0]
        wanted = [rows[len(prompt) + i - 1, token] for i, token in enumerate(answer)]
        assert got == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-5)


def test_muon_makes_matrices_nearly_orthogonal() -> None:
    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_every_row_begins_with_a_document_and_only_learnt_tokens_are_targets() -> None:
    documents = [([10, 11, 12], [False, True, True]), ([20, 21, 22, 23], [True] * 4)] * 5
    inputs, targets = pack(documents, width=6, fill=0)
    assert set(inputs[:, 0].tolist()) <= {10, 20}
    first = inputs[0].tolist()
    for position, target in enumerate(targets[0, :-1].tolist()):
        assert target in (IGNORED, first[position + 1])
    assert 10 not in targets


def test_every_row_is_seen_once_before_any_is_seen_again() -> None:
    rows = torch.arange(10)[:, None], torch.arange(10)[:, None]
    seen = torch.cat([inputs[:, 0] for inputs, _ in batches(rows, 5, 4, seed=0)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
