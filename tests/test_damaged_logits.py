"""NaN or infinite logits end the answers that need them with a one-line error, and no others."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco, BacoError, Completion, as_transformers
from baco.backends.vllm.backend import VllmBackend, VllmEngine
from baco.calibration.diagnose import diagnose
from baco.calibration.measure import calibrate
from baco.cli import run
from baco.engine.draft import Logits
from baco.engine.sequence import Request, SequenceState
from baco.engine.speculative.cost_model import DraftPlanner, Plan
from baco.engine.speculative.proposer import Proposer
from baco.engine.verify import _damaged, damaged_models
from baco.errors import DamagedLogitsError
from baco.evaluation.methods import Draw, Grid, answer, methods
from baco.evaluation.records import Prompt
from baco.routing.signals import Distribution
from tests.pairs import PairFolder
from tests.serving import served

GOOD = ["Plan a walk.", "What do you recommend for a rainy day?", "Tell me of the sea."]
# A letter that no other prompt has.
BAD = "Where is the Zoo of the town, and what is in it?"
KINDS = ("llama", "llama, as in transformers", "gemma2", "starcoder2")


def damaged(folder: PairFolder, *, packed: bool, model: str, token: int | None = None) -> Baco:
    """A pair with one model that embeds a token as NaN, by default a token that only `BAD` has."""
    folders: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    baco = Baco.load(**folders, dtype="float32", packed=packed)
    # An output that shares the weights of the embedding would be damaged for every text.
    token = own_token(baco) if token is None else token
    embedding = getattr(baco.pair, model).model.get_input_embeddings()
    read = embedding.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = read(ids)
        return embedded.masked_fill((ids == token)[..., None], math.nan)

    embedding.forward = forward
    return baco


def own_token(baco: Baco) -> int:
    """A token that only `BAD` has among the prompts."""
    rendered = [baco.pair.renderer.render(prompt) for prompt in [*GOOD, BAD]]
    *others, mine = [{*one.base_ids, *one.aligned_ids} for one in rendered]
    return min(mine - set().union(*others))


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, random_pair: Callable[..., PairFolder]) -> PairFolder:
    return random_pair(request.param.partition(",")[0], noise=0.3)


@pytest.fixture
def packed(request: pytest.FixtureRequest) -> bool:
    return "transformers" not in str(request.node.callspec.params["folder"])


def whole(rows: list[list[Completion]]) -> list[list[tuple[Any, Any]]]:
    return [[(one.token_ids, one.sources) for one in row] for row in rows]


@pytest.mark.parametrize("model", ["base", "aligned"])
def test_only_affected_answers_end_and_their_rows_can_be_reused(
    folder: PairFolder, packed: bool, model: str
) -> None:
    baco = damaged(folder, packed=packed, model=model)
    healthy = Baco.load(
        base=str(folder.base), aligned=str(folder.aligned), dtype="float32", packed=packed
    )
    # The token must not be drawn, because it would damage every answer that has it.
    bias = {own_token(baco): -100.0}
    settings: dict[str, Any] = {"router": "P:0.5", "n": 3, "seed": 1, "logit_bias": bias}
    expected = healthy.generate_batch(GOOD, max_tokens=12, **settings)
    # Two rows, so that others take the places that damaged rows leave.
    for rows in (2, 256):
        baco.max_rows = rows
        prompts = [GOOD[0], BAD, *GOOD[1:], BAD]
        answers = baco.generate_batch(prompts, max_tokens=12, **settings)
        assert whole([answers[0], answers[2], answers[3]]) == whole(expected)
        for broken in (answers[1], answers[4]):
            assert [completion.finish_reason for completion in broken] == ["error"] * 3
            message = str(broken[0].error)
            name = getattr(baco.pair, model).name
            assert name in message and "NaN" in message and "float32" in message
            assert all(
                math.isfinite(value) for completion in broken for value in completion.logprobs
            )


@pytest.mark.parametrize("model", ["base", "aligned"])
def test_damage_in_a_model_that_is_not_needed_is_not_an_error(
    folder: PairFolder, model: str
) -> None:
    """The other model's logits are used instead."""
    baco = damaged(folder, packed=True, model=model)
    other = "Aligned" if model == "base" else "Base"
    settings: dict[str, Any] = {"n": 2, "seed": 1, "max_tokens": 8}
    assert all(c.error is None for c in baco.generate(BAD, router=other, **settings))
    alone = {"base": "Base", "aligned": "Aligned"}[model]
    for completion in baco.generate(BAD, router=alone, **settings):
        assert getattr(baco.pair, model).name in str(completion.error)


def test_damage_in_rows_that_do_not_need_the_model_is_not_an_error(
    folder: PairFolder, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """For it such rows are padding, token 0, which no text here has."""
    baco = damaged(folder, packed=packed, model="base", token=0)
    decoder = baco.decoder()
    for router in ("Aligned", "P:0.5"):
        decoder.submit(GOOD[0], router=baco.router(router), seed=1, max_tokens=8)
    done = []
    while decoder.busy:
        done += [chunk.completion for chunk in decoder.step() if chunk.completion is not None]
    assert [completion.error for completion in done] == [None, None]
    assert "failed" not in caplog.text


def test_a_rejected_draft_leaves_no_damage(
    folder: PairFolder, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speculation is lossless here too: plain decoding never reads such a draft."""
    baco = damaged(folder, packed=packed, model="base")
    token = own_token(baco)
    settings: dict[str, Any] = {"router": "P:0.5", "n": 2, "seed": 1, "logit_bias": {token: -100.0}}
    expected = whole(baco.generate_batch(GOOD, max_tokens=12, **settings))
    tried = []

    def guess(proposer: Proposer, row: SequenceState, most: int) -> list[int]:
        tried.append(row)
        return [token] if min(most, len(row.tokens) % 2) else []

    monkeypatch.setattr(Proposer, "_lookup", guess)
    monkeypatch.setattr(DraftPlanner, "plan", lambda *_: Plan(None, 1))
    answers = baco.generate_batch(GOOD, max_tokens=12, **settings)
    assert tried
    assert all(completion.error is None for row in answers for completion in row)
    assert whole(answers) == expected


@pytest.mark.parametrize(
    ("row", "ends"),
    [
        ([0.0, 1.0, -math.inf], False),
        ([3e38, -3e38, 0.0], False),
        ([0.0, math.nan, 1.0], True),
        ([0.0, math.inf, 1.0], True),
        ([-math.inf] * 3, True),
    ],
)
def test_rows_with_nan_or_infinity_are_damaged(demo: Baco, row: list[float], ends: bool) -> None:
    good, bad = torch.zeros(1, 3), torch.tensor([row])

    def damaged_of(**logits: torch.Tensor) -> list[str]:
        bits = _damaged(Logits({name: Distribution(rows) for name, rows in logits.items()}))  # type: ignore[misc]
        return list(damaged_models(int(bits)))

    assert damaged_of(base=bad, aligned=good) == (["base"] if ends else [])
    assert damaged_of(base=good, aligned=bad) == (["aligned"] if ends else [])
    assert damaged_of(base=bad, aligned=bad) == (["base", "aligned"] if ends else [])
    assert damaged_of(aligned=bad) == (["aligned"] if ends else [])
    if ends:
        with pytest.raises(DamagedLogitsError):
            demo.pair.base.check_logits(bad.amax(-1))
    else:
        demo.pair.base.check_logits(bad.amax(-1))


def damaged_folder(source: PairFolder, target: Path) -> Path:
    """The pair on disk with a weight of its aligned model's output that is NaN (case 03)."""
    from safetensors.torch import load_file, save_file

    for model in ("base", "aligned"):
        (target / model).mkdir(parents=True)
        for file in getattr(source, model).iterdir():
            (target / model / file.name).write_bytes(file.read_bytes())
    file = target / "aligned" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in weights)
    weights[name][7] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("command", ["generate", "batch", "calibrate", "serve", "diagnose"])
def test_a_damaged_weight_is_one_line_at_load(
    command: str,
    random_pair: Callable[..., PairFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pair = damaged_folder(random_pair("llama", noise=0.3), tmp_path / "pair")
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "Plan a walk."}\n')
    arguments = {
        "generate": ["Plan a walk.", "-n", "2", "-r", "P-Punc:0.4", "-s", "1"],
        "batch": [str(prompts), str(tmp_path / "out"), "-r", "P-Punc:0.4"],
        "calibrate": ["-r", "P", "--output", str(tmp_path / "c.json")],
        "serve": ["--port", "0"],
        "diagnose": [],
    }[command]
    assert run([command, *arguments, "--pair", str(pair), "--dtype", "float32"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = [line for line in output.err.splitlines() if "NaN" in line]
    assert str(pair / "aligned") in line and "download it again" in line
    assert "Traceback" not in output.err
    assert not (tmp_path / "c.json").exists()
    assert not list((tmp_path).glob("out/rows-*"))


def test_the_advice_depends_on_the_number_format_of_the_weights(
    random_pair: Callable[..., PairFolder],
) -> None:
    folder = random_pair("llama", noise=0.3)
    folders: dict[str, Any] = {"base": str(folder.base), "aligned": str(folder.aligned)}
    for dtype, advice in (
        ("float16", "float16 overflows in some models: load it in bfloat16 or float32"),
        ("bfloat16", "try --dtype float32"),
        ("float32", "download it again"),
    ):
        message = Baco.load(**folders, dtype=dtype, packed=False).pair.base.damage_message
        assert advice in message and str(folder.base) in message and "\n" not in message


@pytest.fixture
def broken(random_pair: Callable[..., PairFolder]) -> Baco:
    return damaged(random_pair("llama", noise=0.3), packed=True, model="base")


def test_the_server_answers_with_an_error_and_serves_the_others(broken: Baco) -> None:
    router = "P:0.5"
    with served(broken) as server:
        fields: dict[str, Any] = {"router": router, "seed": 1, "max_tokens": 8}
        bad = server.ask(prompt=BAD, **fields)
        assert bad.status_code == 500
        assert "NaN" in bad.json()["error"]["message"]
        assert bad.json()["error"]["type"] == "server_error"
        good = server.ask(prompt=GOOD[0], **fields).json()["choices"][0]
        [expected] = broken.generate(GOOD[0], **fields)
        assert good["message"]["content"] == expected.text
        ids = list(broken.pair.renderer.render(BAD).base_ids)
        body = {"model": "baco/base", "prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 1}
        scored = server.client.post("/v1/completions", json=body)
        assert scored.status_code == 500
        assert "NaN" in scored.json()["error"]["message"]


def test_scores_of_a_damaged_model_are_an_error(broken: Baco) -> None:
    ids = broken.pair.renderer.render(BAD).base_ids
    with pytest.raises(DamagedLogitsError):
        broken.pair.base.score(ids)


def test_calibration_diagnosis_and_methods_refuse_such_answers(broken: Baco) -> None:
    with pytest.raises(BacoError, match="NaN"):
        calibrate(broken, "P", [*GOOD, BAD], samples=2, max_tokens=4)
    with pytest.raises(BacoError, match="NaN"):
        diagnose(broken, [*GOOD, BAD], samples=1, max_tokens=4)
    prompts = [
        Prompt(str(at), ({"role": "user", "content": text},))
        for at, text in enumerate([*GOOD, BAD])
    ]
    draw = Draw(2, 1, {"max_tokens": 4})
    for name in ("base", "routers", "mixing", "ensemble"):
        setting = methods()[name].settings(Grid("quick", 2))[1]
        with pytest.raises(BacoError, match="NaN"):
            answer(broken, setting, prompts, draw)


def test_the_transformers_object_names_the_model(broken: Baco) -> None:
    model = as_transformers(broken, "P:0.5")
    tokenizer = broken.pair.tokenizer

    def generate(*prompts: str) -> Any:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        return model.generate(**batch, max_new_tokens=4, do_sample=True)

    assert len(generate(*GOOD)) == len(GOOD)
    with pytest.raises(DamagedLogitsError, match="NaN"):
        generate(BAD)


@pytest.mark.parametrize(
    ("logprob", "finish_reason", "message"),
    [(math.nan, None, "are NaN or infinite"), (-1.0, "error", "vLLM ended the answer in an error")],
)
def test_an_answer_of_vllm_that_fails_ends_alone_with_the_tokens_before(
    demo: Baco, logprob: float, finish_reason: str | None, message: str
) -> None:
    class Probability:
        def __init__(self, logprob: float) -> None:
            self.logprob, self.rank = logprob, 1

    class Output:
        def __init__(
            self, tokens: list[int], logprobs: list[float], finish_reason: str | None = None
        ) -> None:
            self.finished, self.token_ids = finish_reason is not None, tokens
            self.finish_reason = finish_reason
            self.kv_transfer_params = {"baco_sources": "bab"}
            each = zip(tokens, logprobs, strict=True)
            self.logprobs = [{token: Probability(value)} for token, value in each]
            self.outputs = [self]

    aborted = []

    class Llm:
        def abort_request(self, names: list[str]) -> None:
            aborted.extend(names)

    llm: Any = Llm()
    backend = VllmBackend(demo.pair, llm)
    engine = VllmEngine(backend)
    params = demo.pair.defaults.seeded()
    request = Request((1,), (1,), params, demo.router("P:0.5"), digest=b"")
    sequence = SequenceState(request, 0, 9)
    engine._names[sequence] = "baco-0"
    backend._open["baco-0"] = (engine, sequence)
    output: Any = Output([5, 6], [-1.0, -2.0])
    engine._take(sequence, output)
    assert sequence.tokens == [5, 6]
    output = Output([7], [logprob], finish_reason)
    engine._take(sequence, output)
    assert (sequence.tokens, sequence.sources) == ([5, 6], ["base", "aligned"])
    assert sequence.finish_reason == "error"
    assert sequence.error is not None and message in sequence.error.message
    assert sequence.error.kind == "server"
    assert aborted == ["baco-0"]
    assert not engine.busy


def test_json_of_a_broken_answer_has_no_nan(
    broken: Baco, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Baco, "load", lambda *_, **__: broken)
    code = run(["generate", BAD, "--json", "-r", "P:0.5", "-s", "1", "--max-tokens", "4"])
    output = capsys.readouterr()
    assert code == 2 and "NaN" in output.err
    if output.out:
        json.loads(output.out, parse_constant=pytest.fail)
