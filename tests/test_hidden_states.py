"""Routers can read the models' last hidden states, whatever way rows are read."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from baco import Baco, BacoError, as_transformers, register_router, router
from baco.backends.base import Capabilities
from baco.backends.vllm.options import PairOptions
from baco.cli import run as baco_command
from baco.decoder import Decoder
from baco.engine.budget import Budget, Needs
from baco.engine.engine import Engine
from baco.kv_cache import shared_prefix
from baco.kv_cache.prefix_cache import PrefixCache
from baco.kv_cache.protocol import finish
from baco.models.llama_cpp_model import LlamaCppModel
from baco.models.model import PairModel
from baco.routing.learned import FEATURES, LearnedModel, load, principal_axes
from baco.routing.router import hidden_widths
from baco.routing.rules import RULES
from baco.routing.signals import Signals
from baco.routing.two_vocabularies import check_router
from baco.source import MODELS
from tests.pairs import PairFolder, save_adapter
from tests.test_engine import PROMPTS, reference, rules, tokens_and_sources, without_turn_cut
from tests.test_long_rope import KINDS as LONG_ROPE
from tests.tiny import drafting, save_tiny_pair

# The own forward; with soft-capped logits; that of transformers over all rows; rows of both models
# in one forward; an adapter, in the own forward and in that of transformers; two sets of rotary
# factors; recurrent states; a cache for each row.
KINDS = (
    *("llama", "gemma2", "starcoder2", "one model", "adapter", "adapter of transformers"),
    *("phi3", "lfm2", "bloom"),
)
WIDTH = 32


@pytest.fixture(scope="module", autouse=True)
def probe() -> Iterator[None]:
    """A rule that reads nothing but hidden states."""

    def rule(signals: Signals, threshold: float) -> torch.Tensor:
        # Of both models, also where one is skipped because it cannot matter.
        assert signals.hidden_base is not signals.hidden_aligned
        return signals.hidden_base[:, 0] + signals.hidden_aligned[:, 1] > threshold

    register_router("Probe", rule, reads=("hidden_base", "hidden_aligned"))
    yield
    del RULES["Probe"]


@pytest.fixture(scope="module")
def load_pair(
    random_pair: Callable[..., PairFolder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Baco]:
    """Pairs that no other test has: their models return hidden states from the first router on."""
    loaded: dict[str, Baco] = {}

    def load(kind: str) -> Baco:
        if kind in loaded:
            return loaded[kind]
        options: dict[str, Any] = {"dtype": "float32"}
        if kind.startswith("adapter"):
            plain = kind != "adapter"
            folder = random_pair("qwen3" if plain else "llama", noise=0.3)
            options |= save_adapter(folder, tmp_path_factory.mktemp("adapter"))
            options["packed"] = not plain
        elif kind in ("phi3", "lfm2", "bloom"):
            changes = LONG_ROPE.get(kind, {}) | {"max_position_embeddings": 128}
            saved = save_tiny_pair(tmp_path_factory.mktemp(kind), kind, **changes)
            options |= {"base": str(saved / "base"), "aligned": str(saved / "aligned")}
        else:
            folder = random_pair("llama" if kind == "one model" else kind, noise=0.3)
            base = folder.aligned if kind == "one model" else folder.base
            options |= {"base": str(base), "aligned": str(folder.aligned)}
        baco = Baco.load(**options)
        return loaded.setdefault(kind, drafting(without_turn_cut(baco)))

    return load


def decode(
    baco: Baco, routers: list[str], *, later: int = 0, **options: Any
) -> list[list[tuple[list[int], list[str]]]]:
    """Answers to each prompt, sample by sample; the first joins ``later`` steps later."""
    sampling = {"n": 2, "max_tokens": 12, "seed": 7, **options.pop("sampling", {})}
    decoder = Decoder(baco.pair, Engine(baco.pair, **options))
    asked = list(enumerate(zip(PROMPTS, routers, strict=False)))
    tickets: dict[Any, int] = {}
    done: list[dict[int, Any]] = [{} for _ in asked]
    while asked or decoder.busy:
        while asked and (len(asked) > 1 or later <= 0):
            index, (prompt, spelling) = asked.pop()
            tickets[decoder.submit(prompt, router=baco.router(spelling), **sampling)] = index
        later -= 1
        for chunk in decoder.step():
            if chunk.completion is not None:
                answer = tokens_and_sources(chunk.completion)
                done[tickets[chunk.prompt]][chunk.sample] = answer
    return [[samples[sample] for sample in sorted(samples)] for samples in done]


def as_before(*models: PairModel) -> None:
    """Let models return logits alone, as before the first router that reads hidden states."""
    for model in models:
        if model._wide_head is not None:
            model._head.forward = model._wide_head.forward
        assert not model.hidden_width


def capped(baco: Baco, row: torch.Tensor) -> torch.Tensor:
    """Hidden states, as a model with soft-capped logits returns them."""
    cap = getattr(baco.pair.aligned.model.config, "final_logit_softcapping", None)
    return row if cap is None else cap * (row / cap).tanh()


def naive_probe(baco: Baco) -> Callable[..., bool]:
    def rule(*read: Any) -> bool:
        base, aligned = (capped(baco, row) for row in read[3:])
        return bool(base[0] + aligned[1] > 0)

    return rule


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_naive_loop_with_the_hidden_states_of_transformers(
    load_pair: Callable[[str], Baco], kind: str
) -> None:
    baco, rule = load_pair(kind), naive_probe(load_pair(kind))
    settings: dict[str, Any] = {"seed": 7, "max_tokens": 12}
    routers = ["Probe:0", "P:0.5", "Probe:0"]
    answers = decode(baco, routers, speculate=True)
    assert decode(baco, routers, speculate=False) == answers
    sources = set()
    for index, own in enumerate(PROMPTS):
        other = rules(baco.pair)["P:0.5"]
        read = {"rule": other} if index == 1 else {"rule": rule, "reads_hidden_states": True}
        expected = reference(baco, own, **read, sample=1, temperature=1.0, **settings)
        assert answers[index][1] == expected, own
        sources |= set(expected[1])
    assert sources == {"base", "aligned"}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_batch_on_prompts_in_common_or_on_when_they_begin(
    load_pair: Callable[[str], Baco], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    baco = load_pair(kind)
    routers = ["Probe:0", "P:0.5", "Rand:0.5"]
    expected = decode(baco, routers, sampling={"n": 1})
    many = decode(baco, routers, sampling={"n": 8}, max_rows=11)
    assert [samples[:1] for samples in many] == expected
    monkeypatch.setattr(shared_prefix, "_MIN_SAVED", 1)
    assert decode(baco, routers, sampling={"n": 8}) == many
    kept = PrefixCache()
    for _ in range(2):
        assert decode(baco, routers, sampling={"n": 8}, prefix_cache=kept) == many
    as_before(baco.pair.base, baco.pair.aligned)
    assert decode(baco, routers, sampling={"n": 1}, later=4) == expected


def test_models_return_hidden_states_only_once_a_router_reads_them(
    random_pair: Callable[..., PairFolder],
) -> None:
    folder = random_pair("llama", noise=0.3)
    baco = Baco.load(base=str(folder.base), aligned=str(folder.aligned), dtype="float32")
    baco.generate(PROMPTS[0], router="P-Punc:0.5", seed=1, max_tokens=4)
    models = (baco.pair.base, baco.pair.aligned)
    assert [model.hidden_width for model in models] == [0, 0]
    rows = [model.score([1, 2, 3]) for model in models]
    widths = [model.logits_width for model in models]
    budget = Budget(2**30, dict(zip(MODELS, models, strict=True)), baco.pair.vocabulary.size)
    needs = Needs(64, {"base": 8, "aligned": 8}, 0, {"base": 8, "aligned": 8})
    planned = budget.total(needs)
    baco.generate(PROMPTS[0], router="Probe:0", seed=1, max_tokens=4)
    assert budget.total(needs) > planned
    assert [model.hidden_width for model in models] == [WIDTH, WIDTH]
    assert [model.logits_width - width for model, width in zip(models, widths, strict=True)] == [
        WIDTH,
        WIDTH,
    ]
    for model, row in zip(models, rows, strict=True):
        again, states = model.score_with_hidden_states([1, 2, 3])
        assert torch.equal(again, row) and torch.equal(model.score([1, 2, 3]), row)
        assert torch.allclose(model._head.weight @ states[-1], row[-1, : len(model._head.weight)])
        more = replace(model, vocab_size=model.embedding_rows + 5)
        assert more.score([1, 2, 3])[:, -5:].isneginf().all()


@pytest.mark.parametrize("kind", ["lfm2", "bloom"])
@torch.inference_mode()
def test_a_row_that_was_read_before_is_continued_once_hidden_states_are_returned(
    load_pair: Callable[[str], Baco], kind: str
) -> None:
    model = load_pair(kind).pair.base
    as_before(model)
    cache, tokens = model.new_cache(), torch.tensor([[4]])
    cache.copy_prefix(finish(cache.prefill([1, 2, 3])), 1)
    logits = cache.extend(tokens, [1], 1).clone()
    cache.roll_back([3])
    model.keep_hidden_states()
    again = cache.extend(torch.tensor([[4, 5]]), [2], 2)
    assert torch.equal(model.to_common_vocab(again[:, 0]), model.to_common_vocab(logits[:, 0]))
    _, states = model.score_with_hidden_states([1, 2, 3, 4, 5])
    assert torch.allclose(model.hidden_states(again[0, 1]), states[-1], atol=1e-4)


# --- learned routers ------------------------------------------------------------------------------


def learned_model(axes: dict[Any, torch.Tensor]) -> LearnedModel:
    """A model that reads projections alone."""
    count = sum(map(len, axes.values()))
    weight = torch.cat((torch.zeros(len(FEATURES)), torch.linspace(1, -1, count)))[None]
    mean, scale = torch.zeros(weight.shape[1]), torch.full((weight.shape[1],), 2.0)
    return LearnedModel(mean, scale, ((weight, torch.zeros(1)),), {}, axes)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    generator = torch.Generator().manual_seed(3)
    axes = {s: torch.randn(3, WIDTH, generator=generator) for s in ("base", "aligned")}
    path = tmp_path_factory.mktemp("routers") / "hidden.json"
    path.write_text(json.dumps(learned_model(axes).to_json()))
    return str(path)


@pytest.mark.parametrize("kind", ["llama", "one model", "adapter"])
def test_a_learned_router_reads_projections_as_the_naive_loop_does(
    load_pair: Callable[[str], Baco], file: str, kind: str
) -> None:
    baco, model = load_pair(kind), load(file)
    weight = model.layers[0][0][0, len(FEATURES) :].double()

    def rule(*read: Any) -> bool:
        projected = [
            model.axes[s].double() @ row for s, row in zip(model.axes, read[3:], strict=True)
        ]
        return 1 / (1 + math.exp(-float(torch.cat(projected) / 2 @ weight))) > 0.4

    routers = [f"Learned:{file},0.4", "Rand:0.5"]
    answers = decode(baco, routers, speculate=True, sampling={"n": 8})
    assert decode(baco, routers, speculate=False, sampling={"n": 8}) == answers
    sources = set()
    for sample in (0, 7):
        expected = reference(
            baco,
            PROMPTS[0],
            rule,
            reads_hidden_states=True,
            seed=7,
            sample=sample,
            temperature=1.0,
            max_tokens=12,
        )
        assert answers[0][sample] == expected
        sources |= set(expected[1])
    assert sources == {"base", "aligned"}


def test_a_file_holds_the_axes_and_their_widths(file: str) -> None:
    model = load(file)
    assert model.hidden_widths == {"base": WIDTH, "aligned": WIDTH}
    assert hidden_widths(router(f"Learned:{file}")) == model.hidden_widths
    written = model.to_json()
    assert written["features"][len(FEATURES) :] == [
        f"hidden_{source}_{axis}" for source in ("base", "aligned") for axis in range(3)
    ]
    assert "axes" not in learned_model({}).to_json()


@pytest.mark.parametrize(
    ("axes", "error"),
    [
        ([], "its axes are not those of base and aligned"),
        ({"draft": [[1.0]]}, "its axes are not those of base and aligned"),
        ({"base": []}, "the base model has no axes, or more than 64"),
        ({"base": [[1.0]] * 65}, "the base model has no axes, or more than 64"),
        ({"base": [[1.0], [1.0, 2.0]]}, "its base axes is not numbers"),
        ({"base": [[1.0]]}, "its features are others"),
    ],
)
def test_a_file_with_bad_axes_is_refused_in_one_line(
    file: str, tmp_path: Path, axes: Any, error: str
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({**json.loads(Path(file).read_text()), "axes": axes}))
    with pytest.raises(BacoError, match=error) as caught:
        load(str(bad))
    assert "\n" not in str(caught.value)


def test_principal_axes_are_those_along_which_states_vary_most() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(300, 5, generator=generator) * torch.tensor([1.0, 9.0, 1.0, 4.0, 1.0])
    axes = principal_axes(states + 50, 2)
    assert axes.abs().argmax(dim=1).tolist() == [1, 3]
    assert principal_axes(states[:2], 5).shape == (2, 5)


def test_a_run_trains_a_router_that_reads_hidden_states(tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "router.json"
    sweep = ["sweep", "--pair", "demo", "--task", "demo", "--limit", "3", "-n", "4", "--no-score"]
    more = ["-r", "Rand:0.4", "--workers", "1", "--max-tokens", "48", "--out", run]
    assert baco_command([*sweep, *more]) == 0
    assert baco_command(["router", "train", run, "--hidden-states", "4", "--out", str(out)]) == 0
    model = load(str(out))
    demo = Baco.load("demo")
    assert model.trained["models"] == {s: demo.pair.model(s).name for s in ("base", "aligned")}
    assert model.trained["hidden_widths"] == model.hidden_widths
    assert model.layers[0][0].shape == (1, len(FEATURES) + 8)
    assert demo.generate(PROMPTS[0], router=f"Learned:{out}", seed=1, max_tokens=8)[0].token_ids


# --- refusals -------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(BacoError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hidden_states_of_another_width_are_refused(
    load_pair: Callable[[str], Baco], file: str, tmp_path: Path
) -> None:
    baco = load_pair("llama")
    path = tmp_path / "other.json"
    path.write_text(json.dumps(learned_model({"aligned": torch.ones(2, 48)}).to_json()))
    text = refusal(lambda: baco.generate(PROMPTS[0], router=f"Learned:{path}", max_tokens=2))
    assert "width 48 of its aligned model" in text and f"have width {WIDTH}" in text


def test_models_that_return_no_hidden_states_are_refused(
    load_pair: Callable[[str], Baco], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_cpp = cast(LlamaCppModel, SimpleNamespace(name="a.gguf"))
    llama_cpp._without_hidden_states = MethodType(PairModel._without_hidden_states, llama_cpp)  # type: ignore[method-assign]
    assert "llama.cpp computes its logits" in refusal(
        lambda: LlamaCppModel.keep_hidden_states(llama_cpp)
    )
    plain = load_pair("starcoder2").pair.base.model
    model = PairModel("tiny", plain, None, vocab_size=400)
    monkeypatch.setattr(plain, "get_output_embeddings", lambda: None)
    assert "its head is not one layer" in refusal(model.keep_hidden_states)
    unused = torch.nn.Linear(WIDTH, 4)
    monkeypatch.setattr(plain, "get_output_embeddings", lambda: unused)
    model = PairModel("tiny", plain, None, vocab_size=400)
    assert "its head is not one layer" in refusal(model.keep_hidden_states)
    assert unused(torch.ones(1, WIDTH)).shape == (1, 4)


def test_backends_that_supply_no_hidden_states_refuse_routers_that_read_them(
    load_pair: Callable[[str], Baco], file: str
) -> None:
    baco = load_pair("llama")
    probe = baco.router("Probe:0")
    request = SimpleNamespace(
        router=probe, explain=False, switch="word", thinking=None, params=baco.pair.defaults
    )
    capabilities = Capabilities("remote")
    assert "reads hidden states" in refusal(lambda: capabilities.check(cast(Any, request)))
    assert "reads hidden states" in refusal(lambda: as_transformers(baco, f"Learned:{file}"))
    assert "two tokenizers do not supply" in refusal(lambda: check_router(probe))
    options = {"baco_router": "Probe:0"}
    assert "which vLLM does not supply" in refusal(lambda: PairOptions.read(options))
    assert baco_command(["bench", "--pair", "demo", "--router", f"Learned:{file}"]) == 2
