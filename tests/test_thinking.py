"""Models that think: the aligned model writes the thinking alone, and the base begins after it."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, RwkvConfig, RwkvForCausalLM

from baco import Baco, BacoError, Chunk, Completion, as_transformers
from baco.backends.base import Capabilities
from baco.cli import run
from baco.cli.answers import Show
from baco.decoder import Decoder
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.sequence import Request
from baco.engine.verify import Verifier
from baco.models.caches.per_row import PerRowKVCache
from baco.sampling.params import SamplingParams
from baco.source import MODELS
from baco.text.answer_text import Piece
from baco.text.prompts import Renderer
from baco.text.thinking import ThinkingText, find_marks
from tests import naive_decoding as naive
from tests.chat_templates import CHATML, DEEPSEEK_R1, QWEN_3
from tests.serving import served
from tests.thinking_pairs import (
    BEGIN_ID,
    END_ID,
    LOGIT_BIAS,
    PROMPTS,
    save_thinking_pair,
)

TEMPLATES = {"qwen 3": QWEN_3, "deepseek r1": DEEPSEEK_R1}
SETTINGS: dict[str, Any] = {"seed": 11, "max_tokens": 40, "logit_bias": LOGIT_BIAS}


@pytest.fixture(scope="module")
def thinking_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Baco]:
    """``thinking_pair("qwen3", "deepseek r1")``: loaded once for the same arguments."""

    @cache
    def load(architecture: str = "qwen3", template: str = "qwen 3", **options: Any) -> Baco:
        folder = tmp_path_factory.mktemp("thinking")
        pair = save_thinking_pair(folder, architecture, template=TEMPLATES[template], **options)
        baco = Baco.load(base=str(pair.base), aligned=str(pair.aligned), dtype="float32")
        baco.pair.renderer.turn_opening = None  # the naive loop knows no text
        return baco

    return load


def rule(base: torch.Tensor, aligned: torch.Tensor, coin: float) -> bool:
    return naive.max_probability(base) <= 0.5


def chunks_of(decoder: Decoder) -> Iterator[Chunk]:
    while decoder.busy:
        yield from decoder.step()


def completions(decoder: Decoder) -> list[list[Completion]]:
    """The samples of every prompt, in order."""
    samples: dict[int, list[Completion]] = {}
    for chunk in chunks_of(decoder):
        if chunk.completion is not None:
            samples.setdefault(chunk.prompt, []).append(chunk.completion)
    return [sorted(samples[ticket], key=lambda c: c.sample) for ticket in sorted(samples)]


def decode(baco: Baco, *, speculate: bool = True, **sampling: Any) -> list[list[Completion]]:
    decoder = Decoder(baco.pair, Engine(baco.pair, speculate=speculate))
    for prompt in PROMPTS:
        decoder.submit(prompt, router=baco.router("P:0.5"), **{**SETTINGS, **sampling})
    return completions(decoder)


def drawn(completion: Completion) -> tuple[Any, ...]:
    return (
        completion.thinking_tokens,
        completion.thinking,
        completion.token_ids,
        completion.sources,
        completion.finish_reason,
    )


def reference(
    baco: Baco, prompt: str, sample: int, temperature: float, *, begun: bool
) -> tuple[list[int], list[int], list[str]]:
    """The thinking, then the answer's tokens and sources, by plain loops without caches."""
    pair, rendered = baco.pair, baco.pair.renderer.render(prompt)
    special = pair.tokenizer.convert_tokens_to_ids("<|im_start|>")

    def between(token: int) -> bool:
        data = pair.spelling(token)
        return token == special or (data.isspace() and data.endswith(b"\n"))

    settings: dict[str, Any] = {
        "digest": naive.chat_digest([{"role": "user", "content": prompt}]),
        "sample": sample,
        "marks": (BEGIN_ID, END_ID),
        "temperature": temperature,
        **SETTINGS,
    }
    thought = naive.think(
        pair,
        rendered.aligned_ids,
        begun=begun,
        between=between,
        **settings,
    )
    if END_ID not in thought and (thought or begun):
        return thought, [], []
    tokens, sources = naive.decode(
        pair, rendered.base_ids, rendered.aligned_ids, rule, thought=thought, **settings
    )
    return thought, tokens, sources


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_naive_loop_that_first_thinks_gives_the_same_tokens_and_sources(
    thinking_pair: Callable[..., Baco], template: str, temperature: float
) -> None:
    baco, begun = thinking_pair("qwen3", template), template == "deepseek r1"
    seen = set()
    for prompt, samples in zip(PROMPTS, decode(baco, n=8, temperature=temperature), strict=True):
        for completion in samples[: 5 if temperature else 1]:
            thought, tokens, sources = reference(
                baco, prompt, completion.sample, temperature, begun=begun
            )
            assert completion.thinking_tokens == len(thought)
            assert list(completion.token_ids) == tokens
            assert list(completion.sources) == sources
            seen |= {
                "thought" if END_ID in thought else "unended" if thought else "none",
                *sources,
            }
            if END_ID in thought and thought[-1] != END_ID:
                seen.add("separated")
    assert {"thought", "base", "aligned"} <= seen
    if temperature and not begun:
        assert {"unended", "none", "separated"} <= seen


@pytest.mark.parametrize(
    ("architecture", "template", "base_has_marks"),
    [("qwen3", "qwen 3", True), ("gemma2", "deepseek r1", True), ("llama", "qwen 3", False)],
)
def test_answers_are_the_same_without_drafts_alone_and_among_others(
    thinking_pair: Callable[..., Baco], architecture: str, template: str, base_has_marks: bool
) -> None:
    baco = thinking_pair(architecture, template, base_has_marks=base_has_marks)
    together = decode(baco, n=8)
    assert any(c.thinking_tokens and c.token_ids for row in together for c in row)
    plain = decode(baco, n=8, speculate=False)
    assert [[drawn(c) for c in row] for row in plain] == [[drawn(c) for c in r] for r in together]
    alone = [baco.generate(prompt, router="P:0.5", n=2, **SETTINGS) for prompt in PROMPTS]
    expected = [[drawn(c) for c in row[:2]] for row in together]
    assert [[drawn(c) for c in row] for row in alone] == expected
    beside = Decoder(baco.pair, Engine(baco.pair))
    for prompt in PROMPTS:
        beside.submit(prompt, router=baco.router("P:0.5"), n=2, **SETTINGS)
        beside.submit(prompt, router=baco.router("Base"), n=2, **SETTINGS)
        beside.submit(prompt, router=baco.router("Aligned"), n=2, explain=True, **SETTINGS)
    rows = completions(beside)
    assert [[drawn(c) for c in row] for row in rows[::3]] == expected
    assert not any(c.thinking_tokens for row in rows[1::3] for c in row)
    assert [c.thinking for c in rows[2]] == [c.thinking for c in rows[0]]


def test_the_aligned_model_alone_writes_the_thinking_of_every_method(
    thinking_pair: Callable[..., Baco],
) -> None:
    baco = thinking_pair("qwen3", "deepseek r1")
    decoder = Decoder(baco.pair, Engine(baco.pair))
    for prompt in PROMPTS:
        decoder.submit(prompt, router=baco.router("LogitEnsemble:0.5"), n=4, **SETTINGS)
    mixed = completions(decoder)
    expected = [[c.thinking for c in row[:4]] for row in decode(baco, n=4)]
    assert [[c.thinking for c in row] for row in mixed] == expected


def test_chunks_join_to_the_thinking_and_the_answer(thinking_pair: Callable[..., Baco]) -> None:
    baco = thinking_pair()
    thinking, texts, tokens = dict[Any, str](), dict[Any, str](), dict[Any, list[int]]()
    whole: dict[Any, Completion] = {}
    for chunk in baco.stream_batch(PROMPTS, router="P:0.5", n=4, logprobs=2, **SETTINGS):
        place = chunk.prompt, chunk.sample
        assert not (chunk.thinking and texts.get(place))
        thinking[place] = thinking.get(place, "") + chunk.thinking
        texts[place] = texts.get(place, "") + chunk.text
        tokens.setdefault(place, []).extend(token.id for token in chunk.tokens)
        if chunk.completion is not None:
            whole[place] = chunk.completion
    assert any(c.thinking and c.text for c in whole.values())
    for place, completion in whole.items():
        assert thinking[place] == completion.thinking == completion.thinking.strip()
        assert texts[place] == completion.text
        assert tokens[place] == list(completion.token_ids)
        assert completion.top_logprobs is None or len(completion.top_logprobs) == len(
            completion.token_ids
        )
        assert len(completion.logprobs) == len(completion.sources) == len(completion.token_ids)
        assert completion.thinking_tokens + len(completion.token_ids) <= 40
        assert not any(mark in completion.thinking for mark in ("<think>", "</think>"))


def test_stop_strings_end_the_answer_and_not_the_thinking(
    thinking_pair: Callable[..., Baco],
) -> None:
    baco = thinking_pair()
    whole, ended = (
        [c for row in decode(baco, n=8, stop=stop) for c in row] for stop in ((), ("a", "e"))
    )
    for plain, stopped in zip(whole, ended, strict=True):
        assert (stopped.thinking, stopped.thinking_tokens) == (
            plain.thinking,
            plain.thinking_tokens,
        )
        cut = min((plain.text + stop).index(stop) for stop in ("a", "e"))
        assert stopped.text == plain.text[:cut]


def test_another_request_that_breaks_a_step_changes_no_thinking(
    thinking_pair: Callable[..., Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    baco, verify = thinking_pair(), Verifier.verify
    expected = decode(baco, n=4)
    bad = baco.pair.renderer.render("Break").digest
    for tokens in (0, 9):

        def poisoned(verifier: Verifier, draft: Any, logits: Any, tokens: int = tokens) -> Any:
            for row in draft.batch.rows:
                if row.request.digest == bad and len(row.tokens) >= tokens:
                    raise ValueError("poison")
            return verify(verifier, draft, logits)

        monkeypatch.setattr(Verifier, "verify", poisoned)
        decoder = Decoder(baco.pair, IsolatingEngine(lambda: Engine(baco.pair)))
        for prompt in (*PROMPTS, "Break"):
            decoder.submit(prompt, router=baco.router("P:0.5"), n=4, **SETTINGS)
        *rows, broken = completions(decoder)
        assert {c.finish_reason for c in broken} <= {"error", "stop"}
        assert [[drawn(c) for c in row] for row in rows] == [
            [drawn(c) for c in row] for row in expected
        ]


def test_the_context_of_the_base_model_bounds_the_answer_alone(
    thinking_pair: Callable[..., Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    baco = thinking_pair("qwen3", "qwen 3")
    longer = [c for c in decode(baco, n=8)[0] if c.thinking_tokens and len(c.token_ids) > 9]
    window = len(baco.pair.renderer.render(PROMPTS[0]).base_ids) + 9
    monkeypatch.setitem(vars(baco.pair.base), "context", window)
    for one in longer:
        (cut,) = [c for c in decode(baco, n=8)[0] if c.sample == one.sample]
        assert (cut.thinking, cut.token_ids) == (one.thinking, one.token_ids[:9])
        assert cut.finish_reason == "length"
    assert max(c.thinking_tokens for c in longer) > 9


def test_a_model_that_keeps_its_state_to_itself_thinks_as_the_naive_loop(tmp_path: Path) -> None:
    pair = save_thinking_pair(tmp_path, template=DEEPSEEK_R1)
    rows = len(AutoTokenizer.from_pretrained(pair.aligned))
    config = RwkvConfig(vocab_size=rows, hidden_size=32, num_hidden_layers=2, context_length=256)
    for seed, half in enumerate((pair.base, pair.aligned)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            RwkvForCausalLM(config).save_pretrained(half)
    baco = Baco.load(base=str(pair.base), aligned=str(pair.aligned), dtype="float32")
    baco.pair.renderer.turn_opening = None
    assert isinstance(baco.pair.aligned.new_cache(), PerRowKVCache)
    for sample, completion in enumerate(decode(baco, n=3)[0]):
        thought, tokens, sources = reference(baco, PROMPTS[0], sample, 1.0, begun=True)
        assert completion.thinking_tokens == len(thought)
        assert (list(completion.token_ids), list(completion.sources)) == (tokens, sources)


# --- prompts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(thinking_pair: Callable[..., Baco]) -> Any:
    return thinking_pair().pair.tokenizer


@pytest.mark.parametrize(
    ("template", "arguments", "thinking", "end"),
    [
        (QWEN_3, {}, "possible", "assistant\n"),
        (QWEN_3, {"enable_thinking": True}, "possible", "assistant\n"),
        (QWEN_3, {"enable_thinking": False}, None, "<think>\n\n</think>\n\n"),
        (DEEPSEEK_R1, {}, "begun", "<think>\n"),
        (DEEPSEEK_R1, {"enable_thinking": False}, None, "<think>\n\n</think>\n\n"),
        (DEEPSEEK_R1, {"thinking": False}, None, "<think>\n\n</think>\n\n"),
        (CHATML, {}, None, "assistant\n"),
    ],
)
@pytest.mark.parametrize("question", ["Why?", "Is <think> a tag?", "</think>"])
def test_a_prompt_says_whether_thinking_can_follow(
    tokenizer: Any,
    template: str,
    arguments: dict[str, bool],
    thinking: str | None,
    end: str,
    question: str,
) -> None:
    both = Renderer(tokenizer, tokenizer, aligned_template=template)
    prompt = both.render(question, template_args=arguments)
    assert prompt.thinking == thinking
    assert prompt.aligned_text.endswith(end)
    assert tokenizer.decode(prompt.aligned_ids) == prompt.aligned_text
    assert prompt.base_text == f"Question: {question}\nAnswer:\n"
    assert not prompt.joining_space


def test_a_base_model_that_reads_the_aligned_prompt_reads_an_ended_thinking(tokenizer: Any) -> None:
    both = Renderer(tokenizer, tokenizer, aligned_template=DEEPSEEK_R1, base_template="aligned")
    prompt = both.render("Why?")
    assert prompt.base_text == prompt.aligned_text + "\n</think>\n\n"
    assert tokenizer.decode(prompt.base_ids) == prompt.base_text


def test_earlier_thinking_is_not_read_again(tokenizer: Any) -> None:
    both = Renderer(tokenizer, tokenizer, aligned_template=QWEN_3)
    earlier = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}
    question = {"role": "user", "content": "Why?"}
    prompt = both.render([question, earlier, question])
    assert prompt.base_text == "Question: Why?\nAnswer:\nSo.\n\nQuestion: Why?\nAnswer:\n"
    assert "Hm." not in prompt.aligned_text


def test_a_continued_message_has_no_thinking(thinking_pair: Callable[..., Baco]) -> None:
    baco = thinking_pair("qwen3", "deepseek r1")
    begun: list[Any] = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So"},
    ]
    assert baco.pair.renderer.render(begun).thinking is None
    assert not any(c.thinking_tokens for c in baco.generate(begun, router="P:0.5", n=2, **SETTINGS))


def test_thinking_that_is_turned_off_is_an_ordinary_answer(
    thinking_pair: Callable[..., Baco],
) -> None:
    baco = thinking_pair("qwen3", "deepseek r1")
    off = {"enable_thinking": False}
    answers = baco.generate(PROMPTS[0], router="P:0.5", n=4, template_args=off, **SETTINGS)
    assert {(c.thinking, c.thinking_tokens) for c in answers} == {("", 0)}
    assert {source for c in answers for source in c.sources} == {"base", "aligned"}


def test_only_added_tokens_are_marks(demo: Baco, tokenizer: Any) -> None:
    assert find_marks(demo.pair.tokenizer) is None
    marks = find_marks(tokenizer)
    assert marks is not None
    assert (marks.begin_id, marks.end_id) == (BEGIN_ID, END_ID)


def test_the_base_model_never_writes_a_mark(thinking_pair: Callable[..., Baco]) -> None:
    assert thinking_pair().pair.banned[[BEGIN_ID, END_ID]].all()


def test_the_text_of_a_thinking_has_no_white_space_around_it(tokenizer: Any) -> None:
    marks = find_marks(tokenizer)
    assert marks is not None
    text = ThinkingText(tokenizer, marks)
    shown = []
    for token in tokenizer("<think>\n\n the sea  \n and é\n</think>\n\n")["input_ids"]:
        text.push(token)
        shown.append(text.text)
    assert text.text == "the sea  \n and é"
    assert all(text.text.startswith(part) and part == part.rstrip() for part in shown)


def test_a_backend_that_cannot_think_refuses_to(thinking_pair: Callable[..., Baco]) -> None:
    baco = thinking_pair()
    thinking = baco.pair.thinking_tokens("possible")
    request = Request(
        (1,), (1,), SamplingParams(), baco.router("P:0.5"), thinking=thinking, digest=b""
    )
    with pytest.raises(BacoError, match="turn it off"):
        Capabilities("elsewhere").check(request)
    Capabilities("elsewhere", thinking=True).check(request)


# --- front ends -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(thinking_pair: Callable[..., Baco]) -> Iterator[openai.OpenAI]:
    with served(thinking_pair(), max_n=8, max_tokens=64) as running:
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)


def asking(**more: Any) -> dict[str, Any]:
    return {
        "model": "baco",
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "n": 4,
        "seed": SETTINGS["seed"],
        "max_tokens": SETTINGS["max_tokens"],
        "logit_bias": {str(token): bias for token, bias in LOGIT_BIAS.items()},
        "extra_body": {"router": "P:0.5", **more},
    }


def test_openais_client_reads_the_thinking_apart(
    client: openai.OpenAI, thinking_pair: Callable[..., Baco]
) -> None:
    answers = thinking_pair().generate(PROMPTS[0], router="P:0.5", n=4, **SETTINGS)
    assert any(c.thinking for c in answers)
    reply: Any = client.chat.completions.create(**asking())
    for choice, answer in zip(reply.choices, answers, strict=True):
        extra = choice.message.model_extra or {}
        assert extra.get("reasoning_content", "") == extra.get("reasoning", "") == answer.thinking
        assert choice.message.content == answer.text
    thinking = sum(c.thinking_tokens for c in answers)
    assert reply.usage.completion_tokens_details.reasoning_tokens == thinking
    assert reply.usage.completion_tokens == thinking + sum(len(c.token_ids) for c in answers)


def test_a_stream_has_the_thinking_in_its_deltas(
    client: openai.OpenAI, thinking_pair: Callable[..., Baco]
) -> None:
    answers = thinking_pair().generate(PROMPTS[0], router="P:0.5", n=4, **SETTINGS)
    thinking, texts = [""] * 4, [""] * 4
    stream: Any = client.chat.completions.create(stream=True, **asking())
    for chunk in stream:
        for choice in chunk.choices:
            extra = choice.delta.model_extra or {}
            assert extra.get("reasoning_content") == extra.get("reasoning")
            if extra.get("reasoning_content"):
                assert not texts[choice.index]
            thinking[choice.index] += extra.get("reasoning_content") or ""
            texts[choice.index] += choice.delta.content or ""
    assert thinking == [c.thinking for c in answers]
    assert texts == [c.text for c in answers]


def test_tokens_of_the_thinking_are_in_the_metrics_the_log_and_a_methods_usage(
    thinking_pair: Callable[..., Baco],
) -> None:
    baco = thinking_pair(template="deepseek r1")
    with served(baco, max_n=8, max_tokens=64) as running:
        body = asking()
        body |= body.pop("extra_body")
        reply = running.ask(**body)
        usage = reply.json()["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
        counted = [running.metric(f'baco_tokens_total{{source="{name}"}}') for name in MODELS]
        assert sum(counted) == usage["completion_tokens"] == running.entry(reply)["tokens"]
        body |= {"model": "baco/system-prompt", "router": None}
        usage = running.ask(**body).json()["usage"]
        thinking = usage["completion_tokens_details"]["reasoning_tokens"]
        assert 0 < thinking < usage["completion_tokens"]


def test_a_request_can_turn_thinking_off(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        **asking(chat_template_kwargs={"enable_thinking": False})
    )
    assert not any("reasoning" in (one.message.model_extra or {}) for one in reply.choices)
    assert reply.usage.completion_tokens_details is None


def test_the_command_line_turns_thinking_off_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = save_thinking_pair(tmp_path, template=DEEPSEEK_R1)
    models = ["--base", str(pair.base), "--aligned", str(pair.aligned), "--seed", "3"]
    command = ["generate", PROMPTS[0], "--json", "-r", "P:0.5", "--max-tokens", "9", *models]
    assert run(command) == 0
    thinking = json.loads(capsys.readouterr().out)["samples"][0]
    assert thinking["thinking_tokens"] > 0
    assert len(thinking["token_ids"]) + thinking["thinking_tokens"] <= 9
    assert run([*command, "--no-thinking"]) == 0
    off = json.loads(capsys.readouterr().out)
    assert "thinking" not in off["samples"][0]
    assert off["params"]["template_args"] == {"enable_thinking": False, "thinking": False}


def test_shards_hold_the_thinking_in_every_format(tmp_path: Path) -> None:
    pair, prompts = save_thinking_pair(tmp_path, template=DEEPSEEK_R1), tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS[0] + "\n")
    models = ["--base", str(pair.base), "--aligned", str(pair.aligned), "--seed", "3"]
    kept = []
    for form in ("jsonl", "parquet"):
        out = tmp_path / form
        settings = ["-n", "2", "-r", "P:0.5", "--max-tokens", "9", "--format", form, *models]
        assert run(["batch", str(prompts), str(out), *settings]) == 0
        (shard,) = out.glob("rows-*")
        text = shard.read_text() if form == "jsonl" else ""
        (row,) = [json.loads(text)] if text else pq.read_table(shard).to_pylist()
        kept.append([(one["thinking"], one["thinking_tokens"]) for one in row["samples"]])
    assert kept[0] == kept[1]
    assert all(count > 0 for _, count in kept[0])


def test_a_terminal_shows_the_thinking_before_the_answer(demo: Baco) -> None:
    show = Show(demo, "Why?", None, {"n": 1})
    show._take(Chunk(0, 0, (), thinking="Hm.\x1b"))
    assert show._answer(0).plain == "Hm.\ufffd"
    show._take(Chunk(0, 0, (Piece("So.", "base"),)))
    assert show._answer(0).plain == "Hm.\ufffd\n\nSo."


def test_the_transformers_object_refuses_to_think(thinking_pair: Callable[..., Baco]) -> None:
    baco = thinking_pair()
    model, tokenizer = as_transformers(baco, "P:0.5"), baco.pair.tokenizer
    messages = [{"role": "user", "content": PROMPTS[0]}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with pytest.raises(BacoError, match="thinking=False"):
        model.generate(**ids, max_new_tokens=3)
