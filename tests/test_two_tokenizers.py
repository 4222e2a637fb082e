"""Pairs whose models have different tokenizers: the engine against the naive reference."""

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
)

from baco import Baco, BacoError
from baco.cli import run
from baco.engine.engine import Engine
from baco.integrations.transformers import as_transformers
from baco.models.model import PairModel
from baco.models.pair import make_pair
from baco.outputs import Token
from baco.source import MODELS, Source
from baco.text.answer_text import name_of
from baco.text.shared_text import EncodingStats, OwnTokens
from tests import naive_text_decoding
from tests.chat_templates import DEEPSEEK_R1, QWEN_3
from tests.pairs import END, TURN_END, TURN_START
from tests.serving import served
from tests.text_pairs import (
    PARTS,
    PROMPT,
    assert_cuts_at_seams_keep_the_ids,
    assert_is_naive,
    baco_of,
    baco_of_kinds,
    permuted_model,
    save_pair,
    text_tokenizer,
    tiny_model,
)
from tests.tiny import tiny_config
from tests.tiny import tiny_model as random_model
from tests.tokenizer_kinds import KINDS, MAKERS, permuted, tokenizer_of

ROUTERS = ("P:0.5", "H:1.5", "Rand:0.5")
# Every two kinds, the one or the other as the base model.
_PAIRS = [
    (one, other) if (first + second) % 2 else (other, one)
    for second, other in enumerate(KINDS)
    for first, one in enumerate(KINDS[: second + 1])
]


@pytest.mark.parametrize(("base", "aligned"), _PAIRS)
def test_the_engine_equals_the_naive_reference_token_for_token(base: str, aligned: str) -> None:
    baco, number = baco_of_kinds(base, aligned), KINDS.index(base) + 3 * KINDS.index(aligned)
    spelling, temperature = ROUTERS[number % len(ROUTERS)], (0.0, 0.7, 1.0)[number % 4 % 3]
    drawn: dict[str, Any] = {"seed": number, "temperature": temperature, "max_tokens": 20}
    answers = baco.generate(PROMPT, router=spelling, n=3, **drawn)
    assert_is_naive(baco, answers[number % 3], **drawn)


def penalised(
    row: torch.Tensor, prompt: list[int], answer: list[int], used: dict[str, Any]
) -> torch.Tensor:
    """The penalties and ``no_repeat_ngram:1``, token by token."""
    row = row.clone()
    for token in range(len(row)):
        count, value = answer.count(token), float(row[token])
        if token in prompt or count:
            strength = used.get("repetition_penalty", 1.0)
            value = value * strength if value < 0 else value / strength
        value -= used.get("presence_penalty", 0.0) * (count > 0)
        row[token] = value - used.get("frequency_penalty", 0.0) * count
    if "samplers" in used:
        row[answer] = float("-inf")
    return row


@pytest.mark.parametrize(
    "used",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"repetition_penalty": 1.1, "samplers": ("no_repeat_ngram:1",)},
    ],
)
@pytest.mark.parametrize("kinds", [("gpt2", "gemma"), ("llama2", "qwen")])
def test_penalties_and_samplers_read_the_ids_that_the_source_has_of_the_answer(
    kinds: tuple[str, str], used: dict[str, Any]
) -> None:
    baco = baco_of_kinds(*kinds)
    drawn: dict[str, Any] = {"seed": 5, "temperature": 0.6, "max_tokens": 24}
    for spelling in ("P:0.5", "Rand:0.5"):
        options = {"router": spelling, "n": 2, **drawn}
        plain, answers = (
            baco.generate(PROMPT, **options, **more) for more in (dict[str, Any](), used)
        )
        assert [a.token_ids for a in plain] != [a.token_ids for a in answers]
        for answer in answers:
            assert_is_naive(baco, answer, shape=partial(penalised, used=used), **drawn)


MARKS = ("<think>", "</think>")


def thinking_model(kind: str, template: str) -> Any:
    """A tokenizer with marks of thinking and a model that writes them often."""
    tokenizer = MAKERS[kind]()
    tokenizer.add_tokens(list(MARKS))
    tokenizer.chat_template = template
    model = tiny_model(tokenizer, 1)
    line_break = tokenizer.convert_tokens_to_ids("Ċ")
    begin, end = tokenizer.convert_tokens_to_ids(list(MARKS))
    with torch.no_grad():  # the first dimension is the same at every position
        head = model.get_output_embeddings().weight
        model.get_input_embeddings().weight[:, 0], head[:, 0] = 1.0, 0.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        for token, weight in ((begin, 9.0), (end, 7.0), (line_break, 6.0)):
            head[token], head[token, 0] = 0.0, weight
    return tokenizer, model


@pytest.mark.parametrize("begun", [False, True])
def test_the_aligned_model_thinks_alone_and_the_base_model_reads_no_thinking(begun: bool) -> None:
    template = DEEPSEEK_R1 if begun else QWEN_3
    base = tokenizer_of("gemma"), tiny_model(tokenizer_of("gemma"), 0)
    baco = baco_of(base, thinking_model("gpt2", template))
    baco.pair.renderer.turn_opening = None  # the naive loop knows no text
    prompt = baco.pair.renderer.render(PROMPT)
    assert prompt.thinking == ("begun" if begun else "possible")
    marks = baco.pair.thinking_tokens(prompt.thinking)
    assert marks is not None
    drawn: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 40}
    answers = baco.generate(PROMPT, router="P:0.5", n=8, **drawn)
    thinking = (marks.begin, marks.end, marks.separators)
    for answer in answers:
        assert_is_naive(baco, answer, thinking=thinking, **drawn)
    assert {"base", "aligned"} == {source for answer in answers for source in answer.sources}
    assert sum(bool(answer.thinking) for answer in answers) > 1
    assert begun or any(answer.thinking_tokens == 0 for answer in answers)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=14))
def test_a_text_has_the_same_ids_whether_it_is_cut_at_safe_seams_or_not(parts: list[str]) -> None:
    text = "".join(parts).encode()
    for kind in KINDS:
        assert_cuts_at_seams_keep_the_ids(kind, text_tokenizer(kind), text)


def test_most_words_begin_at_a_safe_seam_except_where_tokens_span_words() -> None:
    text = b"We walk along the shore of Lisbon with the dog"
    seams = {
        kind: sum(text_tokenizer(kind).is_seam(text, at) for at in range(1, len(text)))
        for kind in KINDS
    }
    assert seams.pop("superwords") < 6
    assert set(seams.values()) == {text.count(b" ")}


def test_letters_of_scripts_without_spaces_have_seams_where_no_token_spans_them() -> None:
    text = "夏天去海边春の海"
    for kind in ("gpt2", "qwen", "gemma", "unigram"):
        tokenizer = text_tokenizer(kind)
        places = [len(text[:count].encode()) for count in range(1, len(text))]
        seams = [tokenizer.is_seam(text.encode(), place) for place in places]
        spelled = [tokenizer.data[id_].decode(errors="replace") for id_ in range(tokenizer.size)]
        joined = [any(text[at : at + 2] in token for token in spelled) for at in range(len(places))]
        assert any(seams)
        assert not any(seam and spanned for seam, spanned in zip(seams, joined, strict=True))


def test_one_model_answers_alike_through_its_own_tokenizer_and_a_shared_one() -> None:
    for kind in ("llama3", "gemma"):
        models = [
            PairModel(name, tiny_model(tokenizer_of(kind), 0), tokenizer_of(kind))
            for name in ("base", "aligned")
        ]
        for router in ("Base", "Aligned"):
            one, two = (
                Baco(make_pair(kind, *models, separate_tokenizers=separate)).generate(
                    PROMPT, router=router, temperature=0.0, max_tokens=30
                )[0]
                for separate in (False, True)
            )
            assert one.token_ids == two.token_ids
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.booleans(), st.sampled_from(PARTS)), min_size=1, max_size=14),
)
def test_ids_spell_the_text_and_change_only_after_the_last_seam(
    kind: str, turns: list[tuple[bool, str]]
) -> None:
    tokenizer, stats, text = text_tokenizer(kind), EncodingStats(), b""
    own = OwnTokens(tokenizer)
    for draws, part in turns:
        before, seams = (
            list(own.ids),
            [at for at in range(len(text)) if tokenizer.is_seam(text, at)],
        )
        text += part.encode()
        if draws:
            own.read(text[: -len(part.encode())], stats)
            before = list(own.ids)
            for token in tokenizer.encode(part.encode()):
                own.draw(token)
            text = text[: -len(part.encode())] + tokenizer.bytes_of(own.ids[len(before) :])
            assert own.ids[: len(before)] == before
        elif own.covered < len(text):
            covered = own.covered
            same = own.read(text, stats)
            assert own.ids[:same] == before[:same]
            kept = len(tokenizer.bytes_of(own.ids[:same]))
            if tokenizer.bytes_of(own.ids) == text:
                assert kept >= max((at for at in seams if at <= covered), default=0)
    if tokenizer.bytes_of(tokenizer.encode(text)) == text and own.covered == len(text):
        assert tokenizer.bytes_of(own.ids) == text


@cache
def naive_model(kind: str) -> naive_text_decoding.Model:
    return naive_text_decoding.Model(baco_of_kinds(kind, kind).pair, "aligned", ())


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.booleans(), st.sampled_from(PARTS)), min_size=1, max_size=14),
)
def test_ids_of_a_text_by_two_writers_are_those_of_the_naive_reference(
    kind: str, turns: list[tuple[bool, str]]
) -> None:
    tokenizer, stats, text = text_tokenizer(kind), EncodingStats(), b""
    own, naive = OwnTokens(tokenizer), naive_model(kind)
    naive.ids, naive.fixed = [], 0
    for draws, part in [*turns, (True, "")]:
        if not draws:
            text += part.encode()
            continue
        if own.covered < len(text):
            own.read(text, stats)
            naive.encode(text)
        assert own.ids == [token for token, _ in naive.ids]
        for token in tokenizer.encode(part.encode()):
            own.draw(token)
            text += tokenizer.data[token]
            naive.ids.append((token, len(text)))
            if not tokenizer.data[token]:
                naive.fixed = len(naive.ids)


def test_drawn_ids_are_replaced_only_where_a_token_spans_the_seam() -> None:
    tokenizer = text_tokenizer("llama3")
    own, stats = OwnTokens(tokenizer), EncodingStats()
    letters = [tokenizer.encode(letter)[0] for letter in (b" ", b"w", b"a", b"r", b"m", b".")]
    for token in letters:  # not as the tokenizer spells it
        own.draw(token)
    assert own.read(b" warm. The", stats) == len(letters)
    assert own.ids == [*letters, *tokenizer.encode(b" The")]
    own = OwnTokens(tokenizer)
    for token in letters:
        own.draw(token)
    assert tokenizer.encode(b" warm.\n")[-1:] == tokenizer.encode(b".\n")  # one token
    assert own.read(b" warm.\n", stats) == len(letters) - 1
    assert own.ids == [*letters[:-1], *tokenizer.encode(b".\n")]


def test_names_of_special_tokens_are_read_as_plain_text() -> None:
    for kind in KINDS:
        tokenizer, special = text_tokenizer(kind), tokenizer_of(kind).all_special_ids
        ids = tokenizer.encode(b" a <|im_end|> b<|endoftext|>")
        assert not {*tokenizer_of(kind).convert_tokens_to_ids([END, TURN_END])} & {*ids}
        assert tokenizer.data[special[0]] == b""


# Every kind once, permuted as base model or as aligned model in turn.
_PERMUTED = [
    (kind, KINDS[(3 * at + 4) % len(KINDS)], ("base", "aligned")[at % 2])
    for at, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("kind", "partner", "source"), _PERMUTED)
def test_permuting_the_ids_of_a_tokenizer_changes_no_byte_of_any_answer(
    kind: str, partner: str, source: str
) -> None:
    kinds = (kind, partner) if source == "base" else (partner, kind)
    plain = [
        (tokenizer_of(kind), tiny_model(tokenizer_of(kind), at)) for at, kind in enumerate(kinds)
    ]
    at = ("base", "aligned").index(source)
    tokenizer, order = permuted(plain[at][0], seed=1)
    changed = list(plain)
    changed[at] = tokenizer, permuted_model(plain[at][0], at, tokenizer, order)
    ids = []
    shaped: dict[str, Any] = {"repetition_penalty": 1.3, "samplers": ("no_repeat_ngram:2", "xtc")}
    routers: dict[str, dict[str, Any]] = {
        "P-Punc:0.5": {},
        "Rand:0.5": shaped,
        "FC:predict=either": {},
    }
    for router, more in routers.items():
        answers = [
            baco_of(*pair).generate(PROMPT, router=router, n=3, seed=2, max_tokens=24, **more)
            for pair in (plain, changed)
        ]
        assert [a.pieces for a in answers[0]] == [a.pieces for a in answers[1]]
        assert [a.logprobs for a in answers[0]] == [
            pytest.approx(a.logprobs, abs=1e-3) for a in answers[1]
        ]
        ids += [[a.token_ids for a in each] for each in answers]
    assert ids[0] != ids[1]


@pytest.mark.parametrize("router", ["P-Punc:0.5", "Rand:0.5", "Base"])
def test_an_answer_does_not_depend_on_the_rows_beside_it(router: str) -> None:
    baco = baco_of_kinds("gpt2", "gemma")
    options: dict[str, Any] = {"router": router, "seed": 3, "max_tokens": 24}
    answers = baco.generate(PROMPT, n=8, **options)
    assert len({answer.text for answer in answers}) > 4
    few = Baco(baco.pair, max_rows=3, enable_prefix_caching=False)
    for other in (baco.generate(PROMPT, n=2, **options), few.generate(PROMPT, n=8, **options)):
        assert [a.token_ids for a in other] == [a.token_ids for a in answers[: len(other)]]


def test_rows_that_wait_for_one_model_are_read_in_one_forward() -> None:
    baco = baco_of_kinds("gpt2", "gemma")
    decoder = baco.decoder()
    decoder.submit(PROMPT, router=baco.router("P:0.6"), n=8, seed=3, max_tokens=30)
    while decoder.busy:
        decoder.step()
    stats: Any = decoder.engine.stats
    tokens = sum(stats.tokens.values())
    assert min(stats.tokens.values()) > tokens / 10
    assert sum(stats.forwards.values()) < tokens / 2
    assert 0 < stats.rolled_back < stats.read / 4
    assert stats.encoding.encoded > 0


def test_explained_tokens_name_what_the_router_read() -> None:
    baco = baco_of_kinds("gpt2", "gemma")
    decoder = baco.decoder()
    router = baco.router("P-Punc:0.6")
    decoder.submit(PROMPT, router=router, explain=True, seed=3, max_tokens=30, logprobs=2)
    tokens: list[Token] = []
    while decoder.busy:
        for chunk in decoder.step():
            tokens += chunk.tokens
    assert {token.source for token in tokens} == {"base", "aligned"}
    for token in tokens:
        assert token.why is not None
        own = token.why.base_logprob if token.source == "base" else token.why.aligned_logprob
        assert own == token.logprob
        assert token.top_logprobs is not None
        assert len(token.top_logprobs) == 2
        if token.why.asked:
            assert 0 < token.why.max_base <= 1
        if token.source == "base":  # of the raw distribution, without bans
            likeliest = math.exp(max(token.top_logprobs.values()))
            assert token.why.max_base == pytest.approx(likeliest, rel=1e-4)
    assert any(token.why and token.why.asked for token in tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "Gap:0.5"}, "Gap:0.5 compares the distributions of both models"),
        ({"switch": "token"}, "change sources between words only"),
        ({"logit_bias": {3: 1.0}}, "logit_bias names tokens"),
        ({"router": "Ensemble:0.3"}, "Ensemble:0.3 compares the distributions of both models"),
        ({"dry_multiplier": 0.8}, "DRY and a repetition window count tokens of one tokenizer"),
    ],
)
def test_what_needs_one_tokenizer_is_refused_in_one_line(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BacoError, match=message) as error:
        baco_of_kinds("gpt2", "gemma").generate(PROMPT, **{"router": "P:0.5"} | settings)
    assert "\n" not in str(error.value)


def test_methods_and_prompts_of_token_ids_need_one_tokenizer() -> None:
    baco = baco_of_kinds("gpt2", "gemma")
    with pytest.raises(BacoError, match="this method needs one tokenizer for both models"):
        Engine(baco.pair)
    with pytest.raises(BacoError, match="a prompt of token ids needs one tokenizer"):
        baco.decoder().submit_text((1, 2, 3), router=baco.router("P:0.5"))
    with pytest.raises(BacoError, match="the transformers object needs one tokenizer"):
        as_transformers(baco)


def test_one_tokenizer_can_be_demanded_and_pairs_that_have_it_share_token_ids() -> None:
    models = {
        kind: PairModel(kind, tiny_model(tokenizer_of(kind), 0), tokenizer_of(kind))
        for kind in ("gpt2", "gemma")
    }
    with pytest.raises(BacoError, match=r"vocabularies differ at token .* needs one tokenizer"):
        make_pair("two", models["gpt2"], models["gemma"], separate_tokenizers=False)
    assert make_pair("two", models["gpt2"], models["gemma"]).own_vocabularies is not None
    assert make_pair("one", models["gpt2"], models["gpt2"]).own_vocabularies is None


def test_a_sweep_refuses_methods_that_compare_distributions_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, tokenizer_of("gemma"), tokenizer_of("gpt2"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\nWhere?\n")
    sweep = ["sweep", "-p", str(tmp_path), "-t", str(prompts), "-n", "2", "--max-tokens", "6"]
    sweep += ["--no-score", "-o", str(tmp_path / "run")]
    assert run([*sweep, "-m", "ensemble", "-r", "P:0.5", "-r", "Gap:0.5"]) == 2
    refused = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has two tokenizers" in refused
    assert "of both models: -r Gap -m ensemble; name the others alone: -r P" in refused
    assert not (tmp_path / "run").exists()
    sweep += ["-m", "mixing", "-m", "truncation", "-r", "P:0.5", "-r", "Nudging:0.5"]
    assert run([*sweep, "-m", "verbalized", "--preset", "quick"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "run" / "samples.jsonl").open()]
    assert {"P", "Nudging"} < {row["method"] for row in rows}
    shares = {row["base_share"] for row in rows if row["method"] == "P"}
    assert shares != {0.0}


def test_a_model_with_a_recurrent_state_is_refused() -> None:
    tokenizer = tokenizer_of("gemma")
    config = tiny_config("mamba", vocab_size=len(tokenizer))
    aligned = tokenizer_of("gpt2"), tiny_model(tokenizer_of("gpt2"), 1)
    baco = baco_of((tokenizer, random_model(config)), aligned)
    with pytest.raises(BacoError, match="the state of base cannot be rolled back to any place"):
        baco.generate(PROMPT, router="P:0.5", max_tokens=3)


def lower_case() -> Any:
    backend = Tokenizer.from_str(tokenizer_of("gpt2").backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lower_case, "base does not keep text: it reads 'The weather in Lisbon is warm, so we walk "
         "along the shore' as 'the weather in lisbon is warm"),
        (ByT5Tokenizer, "base has no fast tokenizer, and models of different tokenizers need one"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_share_text_is_refused_in_one_line(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, make(), tokenizer_of("gemma"))
    capsys.readouterr()
    assert run(["generate", PROMPT, "--pair", str(tmp_path), "--max-tokens", "1"]) == 2
    detected, refused = capsys.readouterr().err.strip().splitlines()
    assert "have different tokenizers" in detected
    assert message in refused


def test_the_command_line_answers_with_two_tokenizers_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pair(tmp_path, tokenizer_of("gemma"), tokenizer_of("gpt2"))
    command = ["generate", PROMPT, "--pair", str(tmp_path), "-s", "1", "--max-tokens", "12"]
    assert run([*command, "-r", "P:0.5", "--json"]) == 0
    detected = capsys.readouterr()
    assert "the models have different tokenizers" in detected.err
    sample = json.loads(detected.out)["samples"][0]
    assert {*sample["sources"]} == {"base", "aligned"}
    command.append("--separate-tokenizers")
    assert run([*command, "-r", "P:0.5", "--json"]) == 0
    forced = capsys.readouterr()
    assert json.loads(forced.out)["samples"][0]["text"] == sample["text"]
    assert "different tokenizers" not in forced.err
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\nWhere?\n")
    pair = ["--pair", str(tmp_path)]
    batch = ["batch", str(prompts), str(tmp_path / "answers"), *pair, "-r", "P:0.5", "-s", "1"]
    assert run([*batch, "--max-tokens", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    shard = next((tmp_path / "answers").glob("**/*.jsonl")).read_text().splitlines()
    assert json.loads(shard[0])["samples"][0]["text"] == sample["text"]
    curve = ["--samples", "2", "--max-tokens", "3", "-o", str(tmp_path / "curve.json")]
    calibrate = ["calibrate", *pair, "--prompts", str(prompts), *curve]
    assert run([*calibrate, "--router", "P"]) == 0
    assert "P" in json.loads((tmp_path / "curve.json").read_text())["curves"]
    assert run([*calibrate, "--router", "Gap"]) == 2
    assert "compares the distributions" in capsys.readouterr().err
    for options, message in (
        (["-r", "Gap:0.5"], "compares the distributions of both models"),
        (["-r", "P:0.5", "--base-template", "aligned"], "needs one tokenizer for both models"),
    ):
        assert run([*command[:-1], *options]) == 2
        refused = capsys.readouterr().err.strip().splitlines()
        assert message in refused[-1]
        assert len(refused) <= 2
    diagnose = ["diagnose", *pair, "--prompts", str(prompts), "-n", "1", "--max-tokens", "12"]
    assert run(diagnose) == 0
    shown = capsys.readouterr().out
    for line in ("same next word", "share of base words", "safe seam", "left out: overlap"):
        assert line in shown
    assert run([*diagnose, "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["overlap"] is None
    assert diagnosis["left_out"].keys() >= {"overlap", "Gap"}
    assert diagnosis["shared_text"]["rolled_back"] <= diagnosis["shared_text"]["read"]


def test_the_server_spells_log_probabilities_in_the_ids_of_their_source() -> None:
    with served(baco_of_kinds("gpt2", "gemma")) as server, server.client as client:
        body = {
            "model": "baco",
            "router": "P-Punc:0.6",
            "messages": [{"role": "user", "content": PROMPT}],
            "seed": 3,
            "max_tokens": 30,
            "logprobs": True,
            "top_logprobs": 2,
            "explain": True,
        }
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        choice = reply.json()["choices"][0]
        content = choice["logprobs"]["content"]
        spelled = b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace")
        spelled = spelled.replace(TURN_START, "").replace(TURN_END, "")
        assert spelled.removeprefix(" ") == choice["message"]["content"].removeprefix(" ")
        assert {source for _, source in choice["baco"]["sources"]} == {"base", "aligned"}
        for change in ({"logit_bias": {"3": 1}}, {"router": "Gap:0.5"}, {"switch": "token"}):
            assert client.post("/v1/chat/completions", json=body | change).status_code == 400
        ids = {"model": "baco", "router": "P:0.5", "prompt": [1, 2, 3], "max_tokens": 3}
        assert client.post("/v1/completions", json=ids).status_code == 400


@pytest.mark.parametrize("source", MODELS)
def test_the_server_scores_a_text_by_either_model_in_its_own_ids(source: Source) -> None:
    baco, text = baco_of_kinds("gpt2", "gemma"), "The sea near 海边 is warm.<|im_end|> We walk"
    model, tokenizer = baco.pair.model(source), baco.pair.model(source).tokenizer
    ids = tokenizer(text)["input_ids"]
    rows = model.score(ids).log_softmax(-1)
    expected = [float(rows[at, token]) for at, token in enumerate(ids[1:])]
    with served(baco) as server, server.client as client:
        body = {"model": f"baco/{source}", "max_tokens": 0, "logprobs": 2, "echo": True}
        for prompt in (text, ids):
            reply = client.post(
                "/v1/completions", json=body | {"prompt": prompt, "return_token_ids": True}
            )
            assert reply.status_code == 200, reply.text
            (choice,) = reply.json()["choices"]
            assert choice["prompt_token_ids"] == ids
            assert choice["text"] == tokenizer.decode(ids)
            assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
            most_likely = baco.pair.spelling(int(rows[0].argmax()), source)
            assert name_of(most_likely) in choice["logprobs"]["top_logprobs"][1]
        refused = client.post("/v1/completions", json=body | {"prompt": [10**6]})
        assert refused.status_code == 400
        assert "the vocabulary has" in refused.json()["error"]["message"]
