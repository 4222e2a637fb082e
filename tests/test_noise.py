"""Noise depends on the prompt: different prompts draw independently, equal prompts equally."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency

from baco import Baco, BacoError, as_transformers
from baco.backends.remote.model import Draws
from baco.backends.vllm.middleware import TwoPrompts
from baco.backends.vllm.options import PairOptions, pair_prompt
from baco.backends.vllm.table import RequestTable
from baco.batch.shards import begin as begin_batch
from baco.cli import run
from baco.evaluation import store
from baco.evaluation.methods import Draw, Grid, answer, methods
from baco.evaluation.plan import PairSpec, Plan
from baco.evaluation.records import Prompt
from baco.evaluation.tasks import load_task
from baco.sampling.noise import ROUTER, coin, gumbel, noise_keys
from baco.sampling.params import SamplingParams
from baco.sampling.seeds import NOISE_VERSION, noise_seed
from baco.text.prompts import chat_digest, ids_digest, text_digest
from tests import naive_decoding as naive
from tests.fuzzing import budget
from tests.remoting import remote
from tests.serving import served

QUESTIONS = ["Recommend a summer destination", "Give me a cosy dinner idea", "Tell me a story"]
TEXTS = st.text(min_size=1, max_size=40)
SEEDS = st.integers(0, 2**63 - 1)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def table_of_keys(seed: int, digest: bytes, samples: int, positions: int) -> torch.Tensor:
    """int64 [samples, positions, 2]"""
    at = torch.arange(positions).expand(samples, positions)
    sample = torch.arange(samples)[:, None].expand(samples, positions)
    return noise_keys(torch.full_like(at, noise_seed(seed, digest)), sample, at)


@given(SEEDS, TEXTS)
def test_a_prompts_seed_is_the_same_function_as_in_the_reference(seed: int, text: str) -> None:
    digest = chat_digest(user(text))
    assert digest == naive.chat_digest(user(text))
    assert noise_seed(seed, digest) == naive.prompt_seed(seed, digest)
    keys = table_of_keys(seed, digest, 2, 3)
    drawn = float(coin(keys, ROUTER)[1, 2])
    assert drawn == naive.uniform(naive.prompt_seed(seed, digest), 1, 2, naive.coin_word("router"))


@settings(max_examples=budget(30))
@given(SEEDS, st.lists(TEXTS, min_size=2, max_size=2, unique=True))
def test_the_coins_and_the_noise_of_two_prompts_are_independent(
    seed: int, texts: list[str]
) -> None:
    one, other = (table_of_keys(seed, chat_digest(user(text)), 64, 64) for text in texts)
    draws: list[Callable[[torch.Tensor], torch.Tensor]] = [
        partial(coin, stream=ROUTER),
        partial(coin, stream="another"),
        partial(gumbel, token=torch.tensor(17)),
    ]
    for drawn in draws:
        columns = torch.stack([drawn(one).flatten(), drawn(other).flatten()])
        # 4,096 independent pairs: a standard deviation of 1/64.
        assert abs(float(torch.corrcoef(columns)[0, 1])) < 7 / 64


def test_streams_of_coins_are_independent_of_each_other_and_of_the_tokens_noise() -> None:
    keys = table_of_keys(1, text_digest("a"), 64, 64)
    tokens = [gumbel(keys, torch.tensor(token)).flatten() for token in range(3)]
    columns = torch.stack([coin(keys, name).flatten() for name in (ROUTER, "xtc")] + tokens)
    assert float((torch.corrcoef(columns) - torch.eye(5)).abs().max()) < 5 / 64


def test_the_sources_that_random_routing_gives_two_prompts_are_independent(demo: Baco) -> None:
    rows = demo.generate_batch(
        QUESTIONS[:2], router="Rand:0.5", switch="token", n=64, seed=1, max_tokens=12
    )
    counts = np.zeros((2, 2), dtype=int)
    for one, other in zip(*rows, strict=True):
        for pair in zip(one.sources, other.sources, strict=False):
            counts[int(pair[0] == "base"), int(pair[1] == "base")] += 1
    assert counts.sum() > 400
    assert chi2_contingency(counts).pvalue > 0.001


def test_intervals_over_prompts_hold_the_mean_base_share(demo: Baco) -> None:
    """About 19 of 20 hold it. With one key for all prompts the means spread several times wider
    than the bootstrap believes; `python -m benchmarks.noise` prints both.
    """
    measured: Any = import_module("benchmarks.noise")
    seeds = budget(20)
    prompts = [f"Recommend a {word} destination" for word in "abcdefghijklmnopqrstuvwx"]
    assert measured.spread(demo, prompts, 8, 1, apart=False).ratio > 2
    apart = measured.spread(demo, prompts, seeds, 1, apart=True)
    assert apart.ratio < 1.8
    held = apart.holding(float(apart.means.mean()))
    assert binomtest(held, seeds, 0.95).pvalue > 0.001


def test_equal_prompts_give_equal_answers_and_others_draw_independently(demo: Baco) -> None:
    """This holds for any order, batch and number of samples."""
    settings: dict[str, Any] = {"router": "Rand:0.5", "seed": 3, "max_tokens": 16}
    first, second, again = demo.generate_batch(
        [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], n=6, **settings
    )
    whole = [(a.text, a.sources) for a in first]
    assert [(a.text, a.sources) for a in again] == whole
    alone = demo.generate(user(QUESTIONS[0]), n=2, **settings)
    assert [(a.text, a.sources) for a in alone] == whole[:2]
    turned = demo.generate_batch(QUESTIONS[1::-1], n=2, **settings)
    assert [(a.text, a.sources) for a in turned[1]] == whole[:2]
    assert [a.text for a in turned[0]] == [a.text for a in second[:2]]
    assert [a.sources[:6] for a in first] != [a.sources[:6] for a in second]


def test_prompts_given_one_digest_share_their_noise(demo: Baco) -> None:
    settings: dict[str, Any] = {"router": "Rand:0.5", "switch": "token", "max_tokens": 8, "n": 4}
    rows = demo.generate_batch(QUESTIONS[:2], seed=3, digests=[b"one", b"one"], **settings)
    for one, other in zip(*rows, strict=True):
        many = min(len(one.sources), len(other.sources))
        assert one.sources[:many] == other.sources[:many]


def test_a_digest_reads_every_message_and_neither_dates_nor_template_arguments(demo: Baco) -> None:
    digest: Callable[..., bytes] = lambda *a, **k: demo.pair.renderer.render(*a, **k).digest  # noqa: E731
    plain = digest(QUESTIONS[0])
    assert plain == digest(user(QUESTIONS[0])) == chat_digest(user(QUESTIONS[0]))
    assert plain == digest(
        QUESTIONS[0], template_args={"enable_thinking": True, "date": "2026-01-01"}
    )
    prefilled = [*user(QUESTIONS[0]), {"role": "assistant", "content": "Try"}]
    turns = [*user("Hello"), {"role": "assistant", "content": "Hi"}, *user(QUESTIONS[0])]
    other_role = [{"role": "system", "content": "Hello"}, *user(QUESTIONS[0])]
    prompts = [QUESTIONS[0] + " ", prefilled, turns, other_role]
    digests = {digest(each) for each in prompts} | {digest(QUESTIONS[0], "Be brief."), plain}
    assert len(digests) == 6
    assert digest(QUESTIONS[0], "Hello") == digest(other_role)


def test_raw_text_and_its_token_ids_have_one_digest(demo: Baco) -> None:
    text = "The sea is"
    ids = tuple(demo.pair.tokenizer(text, add_special_tokens=False)["input_ids"])
    raw = demo.pair.renderer.raw
    assert raw(text).digest == text_digest(text)
    assert raw(ids).digest == text_digest(demo.pair.tokenizer.decode(ids))
    assert raw(text).digest != raw(text + " ").digest


def test_coins_of_the_transformers_object_do_not_depend_on_padding_or_batch(
    demo: Baco,
) -> None:
    model = as_transformers(demo, "Rand:0.5", seed=5)
    tokenizer = demo.pair.tokenizer
    texts = [
        tokenizer.apply_chat_template(user(text), tokenize=False, add_generation_prompt=True)
        for text in (
            QUESTIONS[0],
            "Recommend a quiet place by the sea to spend two weeks in summer",
        )
    ]

    def sources(prompts: list[str], **more: Any) -> list[list[bool]]:
        batch = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output = model.generate(
            **batch, max_new_tokens=12, return_dict_in_generate=True, **{"do_sample": False} | more
        )
        source = output.past_key_values.source[:, batch["input_ids"].shape[1] - 1 :]
        by_base: list[list[bool]] = source.tolist()
        return by_base

    together = sources(texts)
    assert [sources([text])[0][:12] for text in texts] == [row[:12] for row in together]
    assert together[0] != together[1]
    several = sources(texts[:1], num_return_sequences=4, do_sample=True, top_k=1)
    assert several[0] == together[0]
    assert len({tuple(row) for row in several}) > 1
    without_cache = model.generate(
        **tokenizer(texts[:1], return_tensors="pt", add_special_tokens=False),
        max_new_tokens=12,
        do_sample=False,
        use_cache=False,
    )
    cached = model.generate(
        **tokenizer(texts[:1], return_tensors="pt", add_special_tokens=False),
        max_new_tokens=12,
        do_sample=False,
    )
    assert without_cache.tolist() == cached.tolist()


def test_the_remote_backend_uses_the_coins_of_this_process(demo: Baco) -> None:
    """Only the sources agree, because servers draw the tokens themselves."""
    settings: dict[str, Any] = {"router": "Rand:0.5", "switch": "token", "max_tokens": 8, "seed": 4}
    with served(demo) as server, remote(server.url) as remote_pair:
        for prompt in QUESTIONS[:2]:
            here, there = (
                demo.generate(prompt, **settings)[0],
                remote_pair.generate(prompt, **settings)[0],
            )
            many = min(len(here.sources), len(there.sources))
            assert here.sources[:many] == there.sources[:many]
    sent = {
        Draws(SamplingParams(), sample, noise_seed(4, chat_digest(user(prompt)))).seed(position)
        for prompt in QUESTIONS
        for sample in range(3)
        for position in range(3)
    }
    assert len(sent) == 27


def test_coins_inside_vllm_have_the_keys_of_this_process(demo: Baco) -> None:
    prompt = demo.pair.renderer.render(QUESTIONS[0])
    table = RequestTable(64, "cpu")
    ids, arguments = pair_prompt(prompt.base_ids, prompt.aligned_ids, prompt.digest)
    given = arguments | {"baco_seed": 9, "baco_sample": 2}
    table.add("ours", ids, PairOptions.read(given))
    del given["baco_digest"]
    table.add("a client's", ids, PairOptions.read(given))
    ours, clients = table.identity[table.slots(["ours", "a client's"])].tolist()
    assert ours == [noise_seed(9, prompt.digest), 2]
    assert clients == [noise_seed(9, ids_digest(prompt.aligned_ids)), 2]
    with pytest.raises(BacoError, match="hexadecimal"):
        PairOptions.read({"baco_digest": "no digest"})

    middleware = TwoPrompts(None)
    middleware._pair = demo.pair

    def changed(text: str) -> dict[str, Any]:
        body = json.dumps({"messages": user(text), "seed": 9}).encode()
        changed_body: dict[str, Any] = json.loads(middleware._changed(body))
        return changed_body

    one, other = changed(QUESTIONS[0]), changed(QUESTIONS[1])
    assert one["seed"] == noise_seed(9, prompt.digest) != other["seed"]
    assert one["vllm_xargs"]["baco_digest"] == prompt.digest.hex()


def test_answers_of_one_request_to_vllm_have_coins_of_their_own() -> None:
    table, options = RequestTable(64, "cpu"), PairOptions.read({"baco_router": "Rand:0.5"})
    seeds = {"0_chat": 7, "1_chat": 8, "0_other": None, "1_other": None, "again": 7}
    for request, seed in seeds.items():
        table.add(request, [1, 2, 3], options, seed)
    coins = dict(zip(seeds, table.identity[table.slots(list(seeds))][:, 0].tolist(), strict=True))
    assert len(set(coins.values())) == 4
    assert coins["again"] == coins["0_chat"]


@pytest.mark.parametrize("name", ["system-prompt", "paraphrase", "regeneration", "verbalized"])
def test_methods_that_rewrite_prompts_key_draws_by_the_tasks_prompt_and_a_word_of_their_own(
    demo: Baco, name: str
) -> None:
    calls: list[dict[str, Any]] = []

    class Spy:
        pair = demo.pair

        def generate_batch(self, prompts: Any, **options: Any) -> Any:
            calls.append(options)
            return demo.generate_batch(prompts, **options)

    prompts = [Prompt(str(i), tuple(user(text))) for i, text in enumerate(QUESTIONS[:2])]
    method = methods()[name]
    spy: Any = Spy()
    answer(spy, method.settings(Grid("quick", 2))[0], prompts, Draw(2, 7, {"max_tokens": 8}))
    own = [chat_digest(prompt.messages) for prompt in prompts]
    assert calls
    for options in calls:
        assert options["digests"] and set(options["digests"]) <= set(own)
        assert options["seed"] != 7


BEGUN = "was begun with version 1 of the noise"


def test_a_file_begun_with_other_noise_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "Recommend a summer destination"}\n')
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text('{"settings": {"router": "P:0.1"}, "seed": 5}\n')
    before = partial.read_bytes()
    options = ["--jsonl", str(prompts), "-o", str(out), "-n", "1", "-r", "P:0.1", "-s", "5"]
    assert run(["generate", *options]) == 2
    message = capsys.readouterr().err
    assert BEGUN in message and message.count("\n") == 1
    assert partial.read_bytes() == before


def test_a_batch_and_a_run_begun_with_other_noise_are_refused(tmp_path: Path) -> None:
    settings = {"seed": 5, "noise": NOISE_VERSION}
    assert begin_batch(tmp_path / "batch", settings, {})["settings"] == settings
    assert begin_batch(tmp_path / "batch", settings, {})
    del settings["noise"]
    begin_batch(tmp_path / "old batch", settings, {})
    with pytest.raises(BacoError, match=BEGUN):
        begin_batch(tmp_path / "old batch", settings | {"noise": NOISE_VERSION}, {})

    task = replace(load_task("demo"), prompts=(Prompt("1", tuple(user("Hello"))),))
    plan = Plan([PairSpec("demo")], [task], methods()["aligned"].settings(Grid("quick", 2)), 2, 1)
    config = plan.config()
    assert config["noise"] == NOISE_VERSION
    store.begin(tmp_path / "run", config, {task.name: task.prompts})
    store.begin(tmp_path / "run", config, {task.name: task.prompts})
    del config["noise"]
    store.begin(tmp_path / "old run", config, {task.name: task.prompts})
    with pytest.raises(BacoError, match=BEGUN):
        store.begin(tmp_path / "old run", plan.config(), {task.name: task.prompts})
