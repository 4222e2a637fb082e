"""The parts of the vLLM backend that need no vLLM: pair folders, options, each model's inputs."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baco import Baco, BacoError
from baco.backends.vllm import versions
from baco.backends.vllm.folder import export_pair, has_adapter, is_one_model, read_pair
from baco.backends.vllm.middleware import TwoPrompts
from baco.backends.vllm.model_inputs import ModelInputs, Step
from baco.backends.vllm.options import Limits, PairOptions, pair_prompt, structure_named
from baco.backends.vllm.rows import RoutingTables, Rows
from baco.backends.vllm.table import RequestTable
from baco.cli import run
from baco.engine.draft import Positions
from baco.models.known_pairs import KnownPair, find_pair
from baco.routing.combiners import ALIGNED, BASE, MIXED, Combination
from baco.routing.signals import Allowed, Signals
from baco.sampling.structure import ANY_OBJECT, Structure
from baco.source import MODELS
from tests.pairs import PairFolder, save_adapter

WIDTH, BLOCK = 64, 8


def test_an_exported_pair_is_a_model_folder_and_a_pair(tmp_path: Path) -> None:
    out = tmp_path / "pair"
    assert run(["pair", "export", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BacoForCausalLM"]
    demo = Baco.load("demo")
    assert config["vocab_size"] == demo.pair.vocabulary.size
    pair = read_pair(out)
    assert pair.name == "demo"
    assert pair.end_ids == demo.pair.end_ids
    assert pair.vocabulary.role.equal(demo.pair.vocabulary.role)
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "seed": 1}
    there = Baco.load(str(out)).generate("Recommend a summer destination", **settings)
    assert there[0].text == demo.generate("Recommend a summer destination", **settings)[0].text


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}, True),
        ({"use_dora": True}, False),
        ({"alpha_pattern": {"q_proj": 16}}, False),
        ({"rank_pattern": {"q_proj": 2}}, False),
        ({"target_modules": ["lm_head"]}, False),
    ],
)
def test_a_low_rank_adapter_is_exported_as_it_is_and_any_other_is_merged(
    options: dict[str, Any], kept: bool, random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    models = save_adapter(random_pair("llama"), tmp_path / "adapter", **options)
    export_pair(KnownPair("adapted", **models, dtype="float32"), tmp_path / "pair")
    assert has_adapter(tmp_path / "pair") == kept
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    there = Baco.load(str(tmp_path / "pair"), dtype="float32").generate("A walk", **greedy)
    here = Baco.load(**models, dtype="float32").generate("A walk", **greedy)
    assert there[0].sources == here[0].sources
    assert there[0].text == here[0].text
    assert read_pair(tmp_path / "pair").aligned.context == 256


def test_one_model_under_two_prompts_is_exported_once(
    random_pair: Callable[..., PairFolder], tmp_path: Path
) -> None:
    model = str(random_pair("llama").aligned)
    export_pair(KnownPair("one", model, model), tmp_path / "pair", copy=True)
    assert is_one_model(tmp_path / "pair")
    assert (tmp_path / "pair" / "aligned").is_symlink()


def test_a_folder_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(BacoError, match="not empty"):
        export_pair(find_pair("demo"), tmp_path)


def test_arguments_of_a_request_are_read() -> None:
    ids, arguments = pair_prompt([1, 2, 3, 4, 5], [7, 8, 9])
    assert ids == [7, 7, 7, 8, 9]
    options = PairOptions.read(arguments | {"baco_router": "P", "baco_threshold": 0.3})
    assert (options.base_ids, options.fill) == ((1, 2, 3, 4, 5), 2)
    assert options.router.spelling == "P:0.3"
    options.check_prompt(len(ids), 10)


def test_the_middleware_passes_template_arguments_to_the_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = replace(find_pair("demo"), name="toned")
    export_pair(known, tmp_path / "pair", copy=True)
    chat = "{{ tone }}" + Baco.load("demo").pair.tokenizer.chat_template
    (tmp_path / "pair" / "aligned" / "chat_template.jinja").write_text(chat)
    monkeypatch.setattr(Limits, "here", replace(Limits.here, folder=tmp_path / "pair"))
    renderer = read_pair(tmp_path / "pair").renderer
    messages = [
        {"role": "user", "content": "Recommend a book"},
        {"role": "assistant", "content": "You could"},
    ]
    chat_body = {"messages": messages, "chat_template_kwargs": {"tone": "Kindly. "}}
    sent, received = [], []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        received.append(json.loads((await receive())["body"]))

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    def post(body: dict[str, Any], root: str = "") -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        path = f"{root}/v1/chat/completions"
        scope = {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": []}
        asyncio.run(TwoPrompts(app)(scope, receive, send))

    post(chat_body)
    expected = renderer.render(messages, template_args={"tone": "Kindly. "})
    ids, arguments = pair_prompt(expected.base_ids, expected.aligned_ids, expected.digest)
    assert received[0]["kv_transfer_params"]["prompt_token_ids"] == ids
    assert received[0]["vllm_xargs"].items() >= arguments.items()
    post(chat_body, root="/behind/a/proxy")
    assert received[1] == received[0]
    post(chat_body | {"continue_final_message": False})
    assert sent[0]["status"] == 400
    assert b"continue_final_message is false, but a last message" in sent[1]["body"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ messages }}"),
        ("documents", [{"text": "A book."}]),
        ("reasoning_effort", "high"),
        ("truncate_prompt_tokens", 3),
        ("use_beam_search", True),
    ],
)
def test_the_middleware_refuses_fields_that_would_have_no_effect(
    field: str, value: Any, demo: Baco
) -> None:
    middleware = TwoPrompts(None)
    middleware._pair = demo.pair
    chat = {"messages": [{"role": "user", "content": "Recommend a book"}]}
    with pytest.raises(BacoError, match=f"{field} has no effect"):
        middleware._changed(json.dumps(chat | {field: value}).encode())
    assert b"prompt_token_ids" in middleware._changed(json.dumps(chat | {field: None}).encode())


def test_the_middleware_reads_messages_as_openais_api_has_them(demo: Baco) -> None:
    middleware = TwoPrompts(None)
    middleware._pair = demo.pair

    def prompt_of(*messages: Any) -> Any:
        body = json.loads(middleware._changed(json.dumps({"messages": messages}).encode()))
        return body["kv_transfer_params"], body["vllm_xargs"]

    parts = [{"type": "text", "text": "Recommend "}, {"type": "text", "text": "a book"}]
    assert prompt_of(
        {"role": "developer", "content": "Be kind"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
    ) == prompt_of(
        {"role": "system", "content": "Be kind"}, {"role": "user", "content": "Recommend a book"}
    )
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(BacoError, match="a part that is not text"):
        prompt_of({"role": "user", "content": [image]})
    with pytest.raises(BacoError, match="message 0 is 1"):
        prompt_of(1)


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"messages": [{"role": "user", "content": "x"}], "kv_transfer_params": 3}'],
    ids=["nested", "kv_transfer_params"],
)
def test_the_middleware_leaves_bodies_that_vllm_refuses(demo: Baco, body: bytes) -> None:
    middleware = TwoPrompts(None)
    middleware._pair = demo.pair
    assert middleware._changed(body) == body


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baco_rooter": "P:0.4"}, "unknown argument"),
        ({"baco_router": "Q"}, "unknown router"),
        ({"baco_router": "P"}, "needs a threshold"),
        ({"baco_base_prompt_ids": []}, "one at least"),
        ({"baco_base_prompt_ids": [1, -2]}, "-2"),
        ({"baco_base_prompt_ids": [True]}, "True"),
        ({"baco_fill": 1.5}, "baco_fill"),
        ({"baco_switch": "line"}, "word or token"),
    ],
)
def test_wrong_arguments_of_a_request_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BacoError, match=message):
        PairOptions.read(arguments)


def test_options_that_do_not_go_with_a_prompt_are_refused() -> None:
    with pytest.raises(BacoError, match="put 2 tokens before"):
        PairOptions.read({"baco_base_prompt_ids": [1, 2, 3]}).check_prompt(1, 10)
    with pytest.raises(BacoError, match="vocabulary has 3"):
        PairOptions.read({"baco_base_prompt_ids": [1, 3]}).check_prompt(2, 3)


prompts = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 11), st.integers(1, 14)),
    min_size=1,
    max_size=5,
)


@given(prompts)
def test_each_model_reads_its_own_prompt_at_its_own_positions(
    drawn: list[tuple[int, int, int, int]],
) -> None:
    """Requests of (base's length, aligned's, tokens computed, tokens scheduled), read token by
    token and all at once.
    """
    table = RequestTable(WIDTH, "cpu")
    names, texts, scheduled, computed = [], [], [], []
    for at, (base, aligned, before, now) in enumerate(drawn):
        base_ids = [100 * at + each for each in range(base)]
        aligned_ids = [100 * at + 50 + each for each in range(aligned)]
        ids, arguments = pair_prompt(base_ids, aligned_ids)
        answer = [100 * at + 80 + each for each in range(20)]
        table.add(str(at), ids, PairOptions.read(arguments))
        names.append(str(at))
        texts.append((ids + answer, {"base": base_ids + answer, "aligned": aligned_ids + answer}))
        computed.append(before)
        scheduled.append(now)
    spans = [range(b, b + n) for b, n in zip(computed, scheduled, strict=True)]
    step = Step(
        names,
        np.array(scheduled, dtype=np.int32),
        np.array(computed, dtype=np.int32),
        torch.tensor([row for row, span in enumerate(spans) for _ in span]),
        torch.tensor([ids[at] for (ids, _), span in zip(texts, spans, strict=True) for at in span]),
        torch.tensor([at for span in spans for at in span]),
        torch.tensor([span.stop for span in spans], dtype=torch.int32),
    )
    slot = torch.tensor(table.slots(names))
    blocks = torch.arange(len(names) * 8).view(-1, 8).flip(0)
    for source in MODELS:
        inputs = ModelInputs.of(step, source, table, slot)
        read = list(zip(inputs.ids.tolist(), inputs.positions.tolist(), strict=True))
        expected, places, lengths = [], [], []
        for row, ((ids, mine), span) in enumerate(zip(texts, spans, strict=True)):
            offset = len(ids) - len(mine[source])
            own = [at - offset for at in span if at >= offset]
            expected += [(mine[source][at], at) for at in own]
            places += [int(blocks[row, at // BLOCK]) * BLOCK + at % BLOCK for at in own]
            lengths += [own[-1] + 1] if own else []
        assert read == expected
        assert inputs.slots(blocks, BLOCK).tolist() == places
        assert inputs.lengths.tolist() == lengths
        kept = inputs.kept.tolist() if inputs.kept is not None else list(range(len(step.ids)))
        assert len(kept) == len(read)


def test_a_slot_is_given_again_when_its_request_has_gone() -> None:
    table = RequestTable(WIDTH, "cpu")
    for at in range(40):
        table.add(str(at), [1, 2], PairOptions.read({"baco_base_prompt_ids": [at + 1]}))
        if at >= 3:
            table.drop(str(at - 3))
    assert len(table.prompt) == 16
    (slot,) = table.slots(["39"])
    assert int(table.base_ids[slot, 0]) == 40
    assert "0" not in table


def test_without_vllm_the_error_names_the_package_to_install() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(BacoError, match=r"vLLM is not installed: pip install 'baco\[vllm\]'"):
            Baco.load("demo", backend="vllm")


def test_another_vllm_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", {"vllm": "0.33.1"}.__getitem__)
    with pytest.raises(BacoError, match=r"vLLM 0\.33\.1 is installed: .* works with 0\.32\.\*"):
        Baco.load("demo", backend="vllm")
    monkeypatch.setattr(versions, "version", {"vllm": "0.32.4"}.__getitem__)
    assert versions.check_version() == "0.32.4"


def test_combiners_and_routers_share_a_step(demo: Baco) -> None:
    pair, table = demo.pair, RequestTable(WIDTH, "cpu")
    spellings = ("Base", "Ensemble:0.3", "Aligned", "Ensemble:0.3", "Contrast")
    names = [str(index) for index in range(len(spellings))]
    for name, spelling in zip(names, spellings, strict=True):
        table.add(name, [5, 6, 7], PairOptions.read({"baco_router": spelling}))
    tables = RoutingTables(
        pair.vocabulary, pair.banned, pair.base.unknown_ids, tuple(sorted(pair.end_ids))
    )
    counts = [1, 2, 1, 1, 2]  # two requests have a draft token
    rules, rule = table.rules(names)
    rows = Rows(
        tables,
        table,
        torch.tensor(table.slots(names)),
        rules,
        torch.tensor(rule),
        Positions.of(counts, torch.empty(0)),
        torch.tensor([0, 1, 3, 4, 5]),
        torch.full((7,), 7),
        torch.tensor([2, 2, 3, 2, 2, 2, 3]),
        torch.zeros(5, dtype=torch.bool),
    )
    generator = torch.Generator().manual_seed(0)
    base, aligned = torch.randn(2, 7, pair.vocabulary.size, generator=generator)
    unbanned = base.masked_fill(pair.base.unknown_ids, -torch.inf)
    left = rows.route(base, aligned)
    assert rows.source is not None
    assert rows.source.tolist() == [BASE, MIXED, MIXED, ALIGNED, MIXED, MIXED, MIXED]
    signals = Signals(unbanned, aligned, pair.vocabulary)
    for spelling, index in (("Ensemble:0.3", [1, 2, 4]), ("Contrast", [5, 6])):
        combination, at = demo.router(spelling), torch.tensor(index)
        assert isinstance(combination, Combination)
        expected = combination.next_rows(signals, at, tables.banned, tables.ends).logits
        assert left[at].equal(expected)
    assert left[3].equal(aligned[3])
    assert left[0].equal(unbanned[0].masked_fill(pair.banned, -torch.inf))


def test_rows_of_structured_requests_wait_for_their_masks_and_follow_them() -> None:
    pair = Baco.load("demo").pair
    table = RequestTable(WIDTH, torch.device("cpu"))
    names = ["free", "held"]
    for name in names:
        table.add(name, [5, 6, 7], PairOptions.read({"baco_router": "P:0.5"}))
    rules, rule = table.rules(names)
    tables = RoutingTables(
        pair.vocabulary, pair.banned, pair.base.unknown_ids, tuple(sorted(pair.end_ids))
    )
    rows = Rows(
        tables,
        table,
        torch.tensor(table.slots(names)),
        rules,
        torch.tensor(rule),
        Positions.of([1, 1], torch.empty(0)),
        torch.tensor([0, 1]),
        torch.full((2,), 7),
        torch.tensor([2, 2]),
        torch.zeros(2, dtype=torch.bool),
        structured=True,
    )
    generator = torch.Generator().manual_seed(0)
    base, aligned = torch.randn(2, 2, pair.vocabulary.size, generator=generator)
    assert rows.of(base.clone(), aligned.clone()).equal(aligned)
    assert rows.source is None
    only = torch.zeros(1, pair.vocabulary.size, dtype=torch.bool)
    only[0, 40] = True
    no, yes = torch.tensor([False, False]), torch.tensor([True, True])
    allowed = Allowed(
        torch.tensor([1]), only, torch.tensor([False, True]), yes, no, lambda position, token: False
    )
    left = rows.route_held(allowed)
    assert rows.held is None
    assert rows.source is not None
    # Unsure, the base model would write; a forced token stays with the active aligned model.
    assert rows.source.tolist() == [BASE, ALIGNED]
    assert left[0].isfinite().sum() > 1
    assert left[1].isfinite().nonzero().flatten().tolist() == [40]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"structural_tag": "{}"}, "structural_tag"),
        ({"json": {"uniqueItems": True}}, "'uniqueItems'"),
        ({"json": "{"}, "not JSON"),
        ({"regex": " "}, "regex is ' '"),
    ],
)
def test_a_structure_that_a_pair_does_not_follow_is_refused(given: Any, message: str) -> None:
    with pytest.raises(BacoError, match=message):
        structure_named(_outputs(**given))


def test_structures_are_read_by_vllms_names() -> None:
    assert structure_named(_outputs()) is None
    assert structure_named(_outputs(json_object=True)) == Structure("schema", ANY_OBJECT)
    assert structure_named(_outputs(choice=["a", "b"])) == Structure("choice", '["a", "b"]')


def _outputs(**given: Any) -> Any:
    names = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
    fields = dict.fromkeys((*names, "whitespace_pattern")) | given
    return SimpleNamespace(**fields, all_constraints_none=lambda: not given)
