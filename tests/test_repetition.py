"""DRY and the window of penalties, next to plain references."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, SamplingParams
from baco.backends.base import Capabilities
from baco.cli import run
from baco.decoder import Decoder
from baco.engine.batch import Batch
from baco.engine.engine import Engine
from baco.engine.sequence import Request, SequenceState
from baco.outputs import params as settings_of
from baco.sampling.repetition import dry_penalties
from tests.fuzzing import budget
from tests.serving import PROMPT, served

WIDTH = 6


def dry_reference(
    history: list[int], breakers: set[int], given: SamplingParams
) -> dict[int, float]:
    """DRY as its author describes it: every earlier occurrence of the last token, one by one."""
    history = history[-given.dry_window :] if given.dry_window else history
    lengths: dict[int, int] = {}
    if not history or history[-1] in breakers:
        return {}
    for end in range(len(history) - 1):
        if history[end] != history[-1] or history[end + 1] in breakers:
            continue
        length = 1
        while length <= end:
            last = history[-1 - length]
            if history[end - length] != last or last in breakers:
                break
            length += 1
        lengths[history[end + 1]] = max(length, lengths.get(history[end + 1], 0))
    return {
        token: given.dry_multiplier * given.dry_base ** (length - given.dry_allowed_length)
        for token, length in lengths.items()
        if length >= given.dry_allowed_length
    }


@settings(max_examples=budget(300), deadline=None)
@given(
    st.lists(st.integers(0, WIDTH - 1), max_size=40),
    st.sets(st.integers(0, WIDTH - 1), max_size=2),
    st.sampled_from([0, 1, 7, 100]),
    st.integers(1, 4),
)
@example([0, 1, 2, 0, 1], set(), 0, 2)
@example([0, 0, 0, 0], set(), 0, 1)
def test_dry_lowers_what_the_reference_lowers(
    history: list[int], breakers: set[int], window: int, allowed: int
) -> None:
    given = SamplingParams(dry_multiplier=0.8, dry_window=window, dry_allowed_length=allowed)
    breaks = np.isin(np.arange(WIDTH), list(breakers))
    penalties = dry_penalties(np.array(history, dtype=np.int64), breaks, given)
    assert penalties == pytest.approx(dry_reference(history, breakers, given))


def test_dry_equals_penalties_computed_by_hand() -> None:
    """After "a b c … a b" the token c is lowered, by 0.8 at two tokens and 1.4 at three."""
    given, none = SamplingParams(dry_multiplier=0.8), np.zeros(9, dtype=bool)
    assert dry_penalties(np.array([1, 2, 3, 8, 1, 2]), none, given) == pytest.approx({3: 0.8})
    assert dry_penalties(np.array([0, 1, 2, 3, 8, 0, 1, 2]), none, given) == pytest.approx(
        {3: 0.8 * 1.75}
    )
    assert dry_penalties(np.array([2, 3, 8, 2]), none, given) == {}
    long = np.array([1] * 3000)
    assert 0 < dry_penalties(long, none, given)[1] <= 1e9


@settings(max_examples=budget(40), deadline=None)
@given(st.data())
def test_penalties_count_what_lies_in_the_window(demo: Baco, data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, WIDTH - 1), min_size=1, max_size=6)
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        window = data.draw(st.sampled_from([0, 1, 3, 8, 50]))
        params = SamplingParams(seed=1, repetition_penalty=1.3, repetition_window=window)
        prompts = tuple(data.draw(ids)), tuple(data.draw(ids))
        request = Request(*prompts, params, demo.router("P:0.5"), digest=b"")
        rows.append(SequenceState(request, 0, 99, tokens=data.draw(ids)))
    batch = Batch("cpu", WIDTH)
    batch.admit(rows)
    sources = [data.draw(st.booleans()) for _ in rows]
    drafts = [data.draw(ids) for _ in rows]
    most = max(map(len, drafts))
    padded = torch.tensor([draft + [WIDTH] * (most - len(draft)) for draft in drafts])
    at, source = torch.arange(len(rows)), torch.tensor(sources)
    in_prompt, in_answer = batch.token_counts(at, source, padded)
    batch.count_in_windows((in_prompt, in_answer), at, source, drafts)
    for row, is_base, draft, prompted, answered in zip(
        rows, sources, drafts, in_prompt.tolist(), in_answer.tolist(), strict=True
    ):
        prompt = row.request.ids("base" if is_base else "aligned")
        answer = [*row.tokens, *draft]
        window = row.request.params.repetition_window
        kept = [(token, False) for token in prompt] + [(token, True) for token in answer]
        kept = kept[-window:] if window else kept
        assert prompted == [(token, False) in kept for token in range(WIDTH)]
        assert answered == [kept.count((token, True)) for token in range(WIDTH)]


DRY: dict[str, Any] = {"dry_multiplier": 5.0, "dry_base": 3.0, "dry_allowed_length": 1}
WINDOW: dict[str, Any] = {"repetition_penalty": 1.5, "repetition_window": 6}


@pytest.mark.parametrize("changes", [DRY, WINDOW, DRY | WINDOW | {"dry_breakers": (" the",)}])
def test_answers_are_the_same_with_drafts_in_company_and_alone(
    demo: Baco, changes: dict[str, Any]
) -> None:
    sampling: dict[str, Any] = {"n": 3, "seed": 4, "max_tokens": 40, "temperature": 0.3}
    router = demo.router("P-Punc:0.4")
    answers = []
    for speculate in (False, True):
        decoder = Decoder(demo.pair, Engine(demo.pair, speculate=speculate))
        ticket = decoder.submit(PROMPT, router=router, **sampling, **changes)
        plain = decoder.submit(PROMPT, router=router, **sampling)
        texts: dict[int, dict[int, str]] = {ticket: {}, plain: {}}
        while decoder.busy:
            for chunk in decoder.step():
                if chunk.completion is not None:
                    texts[chunk.prompt][chunk.sample] = chunk.completion.text
        answers.append((texts[ticket], texts[plain]))
    assert answers[0] == answers[1]
    alone = demo.generate(PROMPT, router=router, **sampling, **changes)
    assert {c.sample: c.text for c in alone} == answers[0][0]


def test_dry_keeps_the_greedy_answer_from_repeating_a_sequence(demo: Baco) -> None:
    """Checked token by token against the models' own rows."""
    changes: dict[str, Any] = {"dry_multiplier": 50.0, "dry_allowed_length": 1, "temperature": 0}
    prompt = "Give me a four-sentence story about a dragon."
    (answer,) = demo.generate(prompt, router="Aligned", **changes)
    (plain,) = demo.generate(prompt, router="Aligned", temperature=0)
    assert answer.token_ids != plain.token_ids
    ids = list(demo.pair.renderer.render(prompt).aligned_ids)
    params = SamplingParams(**changes)
    breakers = set(demo.pair.tokens_with(params.dry_breakers))
    for token in answer.token_ids:
        row = demo.pair.aligned.score(ids)[-1].clone()
        for repeated, penalty in dry_reference(ids, breakers, params).items():
            row[repeated] -= penalty
        assert token == int(row.argmax())
        ids.append(token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dry_multiplier": -1}, "dry_multiplier is -1: give a number from 0 to 100"),
        ({"dry_base": 0.5}, "dry_base is 0.5: give a number from 1 to 10"),
        ({"dry_allowed_length": 0}, "dry_allowed_length is 0: give a whole number from 1"),
        ({"dry_window": 1.5}, "dry_window is 1.5: give a whole number"),
        ({"repetition_window": -1}, "repetition_window is -1: give a whole number"),
        ({"dry_breakers": [""]}, "dry_breakers is .*: give a string or a list"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BacoError, match=message):
        SamplingParams().updated(changes)


def test_backends_without_the_history_refuse(demo: Baco) -> None:
    prompt = demo.pair.renderer.render("Hello")
    for changes in (DRY, WINDOW):
        params = SamplingParams(seed=1, **changes)
        request = Request(
            prompt.base_ids, prompt.aligned_ids, params, demo.router("Base"), digest=prompt.digest
        )
        with pytest.raises(BacoError, match="the vllm backend has neither DRY nor a repetition"):
            Capabilities("vllm").check(request)
        Capabilities("local", samplers=True).check(request)


def test_the_command_line_and_the_server_take_them(
    demo: Baco, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling: dict[str, Any] = {"seed": 1, "max_tokens": 24}
    (expected,) = demo.generate(PROMPT, router="Aligned", **sampling, **DRY, **WINDOW)
    options = ["--dry-multiplier", "5", "--dry-base", "3", "--dry-allowed-length", "1"]
    options += ["--repetition-penalty", "1.5", "--repetition-window", "6"]
    command = ["generate", PROMPT, "-r", "Aligned", "-s", "1", "--max-tokens", "24", "--json"]
    assert run([*command, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"][0]["text"] == expected.text
    assert answer["params"]["dry_multiplier"] == 5
    assert answer["params"]["repetition_window"] == 6
    assert run([*command, "--dry-breaker", ""]) == 2
    assert "dry_breakers is" in capsys.readouterr().err
    with served(demo) as server:
        body: dict[str, Any] = {"model": "baco/aligned", "router": None, **sampling}
        reply = server.ask(**body, **DRY, **WINDOW)
        assert reply.json()["choices"][0]["message"]["content"] == expected.text
        others = {
            "repetition_penalty": 1.5,
            "repetition_penalty_range": 6,
            "dry_penalty_last_n": -1,
            "dry_sequence_breakers": '["\\n", ":", "\\"", "*"]',
        }
        reply = server.ask(**body, **DRY, **others)
        assert reply.json()["choices"][0]["message"]["content"] == expected.text
        off = {"dry_multiplier": 0, "dry_base": 0, "dry_allowed_length": 0}
        assert server.ask(**body, **off).status_code == 200
        refused = server.ask(**body, dry_multiplier=1, dry_sequence_breakers="[")
        assert refused.status_code == 400
        assert "give a list of texts" in refused.json()["error"]["message"]


def test_records_name_them_only_where_they_act(demo: Baco) -> None:
    kept = settings_of(demo.pair, {"system": None, "switch": "word"})
    assert not [name for name in kept if name.startswith("dry_") or name == "repetition_window"]
    named = settings_of(demo.pair, {"system": None, "switch": "word", **DRY, **WINDOW})
    assert {*DRY, *WINDOW} <= named.keys()
