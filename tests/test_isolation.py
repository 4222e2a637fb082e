"""A prompt that breaks a step ends alone, and no other loses work, in every front end."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco, BacoError, Completion
from baco.cli import run
from baco.engine.engine import Engine
from baco.engine.isolation import IsolatingEngine
from baco.engine.sequence import Request, SequenceState
from baco.engine.verify import Verifier
from baco.outputs import check_group
from tests.fuzzing import budget

GOOD = [f"Recommend a {word} destination" for word in ("summer", "winter", "quiet", "sunny")]
BAD = "Tell me about poison"
ROUTER = "P-Punc:0.4"
SETTINGS: dict[str, Any] = {"router": ROUTER, "n": 2, "seed": 5, "max_tokens": 12}


class BrokenError(RuntimeError):
    pass


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Every step fails that decodes ``poison["tokens"]`` tokens or more for a poisoned prompt."""
    after = {"tokens": 0}
    verify = Verifier.verify

    def poisoned_verify(verifier: Verifier, draft: Any, logits: Any) -> Any:
        for row in draft.batch.rows:
            if is_poisoned(row) and len(row.tokens) >= after["tokens"]:
                raise BrokenError("the poison works")
        return verify(verifier, draft, logits)

    monkeypatch.setattr(Verifier, "verify", poisoned_verify)
    return after


MARK: list[bytes] = []


def is_poisoned(row: SequenceState) -> bool:
    return row.request.digest in MARK


@pytest.fixture(autouse=True)
def marked(demo: Baco) -> Iterator[None]:
    MARK[:] = [demo.pair.renderer.render(BAD).digest]
    yield
    MARK.clear()


def whole(rows: list[list[Completion]]) -> list[list[tuple[str, Any, Any]]]:
    return [[(one.text, one.token_ids, one.sources) for one in row] for row in rows]


@pytest.mark.parametrize("tokens", [0, 5])
def test_the_other_prompts_of_a_batch_get_the_same_answers(
    demo: Baco, poison: dict[str, int], tokens: int
) -> None:
    expected = demo.generate_batch(GOOD, **SETTINGS)
    poison["tokens"] = tokens
    prompts = [*GOOD[:2], BAD, *GOOD[2:]]
    rows = demo.generate_batch(prompts, **SETTINGS)
    broken = rows.pop(2)
    assert whole(rows) == whole(expected)
    assert [completion.finish_reason for completion in broken] == ["error"] * 2
    assert all("BrokenError" in str(completion.error) for completion in broken)
    assert all(len(completion.token_ids) >= tokens for completion in broken)


def test_samples_go_on_that_compare_themselves_with_one_that_has_ended(
    demo: Baco, poison: dict[str, int]
) -> None:
    settings = SETTINGS | {"router": "P-Punc:share=0.3,over=samples", "n": 6, "max_tokens": 60}
    poison["tokens"] = 20
    expected = demo.generate_batch(GOOD, **settings)
    lengths = [[len(one.token_ids) for one in row] for row in expected]
    assert any(min(row[:-1]) < poison["tokens"] < row[-1] for row in lengths)
    rows = demo.generate_batch([*GOOD, BAD], **settings)
    assert whole(rows[:-1]) == whole(expected)


def test_nothing_is_streamed_twice_when_an_answer_is_decoded_again(
    demo: Baco, poison: dict[str, int]
) -> None:
    expected = demo.generate_batch(GOOD, **SETTINGS)
    poison["tokens"] = 6
    ids: dict[tuple[int, int], list[int]] = {}
    texts: dict[tuple[int, int], str] = {}
    for chunk in demo.stream_batch([*GOOD, BAD], **SETTINGS):
        place = chunk.prompt, chunk.sample
        ids.setdefault(place, []).extend(token.id for token in chunk.tokens)
        texts[place] = texts.get(place, "") + chunk.text
    for prompt, row in enumerate(expected):
        for completion in row:
            assert ids[prompt, completion.sample] == list(completion.token_ids)
            assert texts[prompt, completion.sample] == completion.text


def test_several_prompts_that_break_steps_are_all_found(demo: Baco, poison: dict[str, int]) -> None:
    expected = demo.generate_batch(GOOD, **SETTINGS)
    poison["tokens"] = 2
    rows = demo.generate_batch([BAD, *GOOD[:3], BAD, BAD, GOOD[3]], **SETTINGS)
    assert [[one.finish_reason for one in rows[at]] for at in (0, 4, 5)] == [["error"] * 2] * 3
    assert whole([*rows[1:4], rows[6]]) == whole(expected)


@settings(max_examples=budget(12), deadline=None)
@given(st.data())
def test_requests_added_and_cancelled_during_bisection_are_complete(
    demo: Baco, data: st.DataObject
) -> None:
    """This holds for any order of submitting, cancelling and stepping."""
    steps, lengths = data.draw(st.integers(0, 4)), {"tokens": data.draw(st.integers(0, 6))}
    verify = Verifier.verify

    def poisoned_verify(verifier: Verifier, draft: Any, logits: Any) -> Any:
        for row in draft.batch.rows:
            if is_poisoned(row) and len(row.tokens) >= lengths["tokens"]:
                raise BrokenError
        return verify(verifier, draft, logits)

    router = demo.router(ROUTER)
    expected = {prompt: [one.text for one in demo.generate(prompt, **SETTINGS)] for prompt in GOOD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Verifier, "verify", poisoned_verify)
        decoder = demo.decoder()
        prompts: dict[int, str] = {}
        texts: dict[tuple[int, int], str] = {}
        cancelled: set[int] = set()

        def step() -> None:
            for chunk in decoder.step():
                place = chunk.prompt, chunk.sample
                assert chunk.prompt not in cancelled
                texts[place] = texts.get(place, "") + chunk.text
                if chunk.completion is not None and prompts[chunk.prompt] != BAD:
                    assert chunk.completion.error is None
                    assert texts[place] == expected[prompts[chunk.prompt]][chunk.sample]

        options = {name: value for name, value in SETTINGS.items() if name != "router"}
        for prompt in data.draw(st.permutations([*GOOD, BAD, BAD])):
            prompts[decoder.submit(prompt, router=router, **options)] = prompt
            for _ in range(steps):
                step()
            if data.draw(st.integers(0, 5)) == 0:
                given = data.draw(st.sampled_from(sorted(prompts)))
                if decoder.holds(given):
                    cancelled.add(given)
                    decoder.cancel(given)
        while decoder.busy:
            step()
        assert decoder.waiting == decoder.running == 0
        assert not any(decoder.holds(ticket) for ticket in prompts)


def test_an_engine_that_fails_without_a_request_is_an_error_of_the_caller(demo: Baco) -> None:
    class Failing(Engine):
        def step(self) -> list[SequenceState]:
            raise BrokenError

    engine = IsolatingEngine(lambda: Failing(demo.pair))
    with pytest.raises(BrokenError):
        engine.step()


def test_an_answer_that_cannot_be_decoded_to_text_ends_alone(
    demo: Baco, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baco.text.answer_text import AnswerText

    push, expected = AnswerText.push, demo.generate_batch(GOOD, **SETTINGS)
    victim = expected[1][0].token_ids[3]

    def pushed(text: AnswerText, token: int, source: Any) -> Any:
        if token == victim:
            raise BrokenError
        return push(text, token, source)

    monkeypatch.setattr(AnswerText, "push", pushed)
    rows = demo.generate_batch(GOOD, **SETTINGS)
    for row, before in zip(rows, expected, strict=True):
        for one, unbroken in zip(row, before, strict=True):
            if victim in unbroken.token_ids:
                assert one.finish_reason == "error" and "BrokenError" in str(one.error)
                assert one.error_kind == "process"
                assert unbroken.text.startswith(one.text)
            else:
                assert one.text == unbroken.text


def prompt_file(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def drawn(lines: str) -> list[list[tuple[str, str]]]:
    rows = [json.loads(line) for line in lines.splitlines()]
    return [[(s["text"], s["finish_reason"]) for s in row["samples"]] for row in rows]


OPTIONS = ["-n", "2", "-r", ROUTER, "-s", "5", "--max-tokens", "12"]


def test_a_file_of_prompts_keeps_the_answers_to_the_others(
    poison: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison["tokens"] = 3
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    prompts = prompt_file(tmp_path / "in.jsonl", GOOD)
    assert run(["generate", "--jsonl", str(prompts), "-o", str(good), *OPTIONS]) == 0
    prompts = prompt_file(tmp_path / "in.jsonl", [*GOOD[:2], BAD, *GOOD[2:]])
    capsys.readouterr()
    assert run(["generate", "--jsonl", str(prompts), "-o", str(bad), *OPTIONS]) == 2
    message = capsys.readouterr().err
    assert "answers to 1 of 5 prompts broke off" in message and "line 3" in message
    assert "Traceback" not in message
    rows = drawn(bad.read_text())
    assert [reason for _, reason in rows.pop(2)] == ["error"] * 2
    assert rows == drawn(good.read_text())
    assert not (tmp_path / "bad.jsonl.partial").exists()


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_batch_keeps_the_answers_to_the_others(
    poison: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    poison["tokens"] = 3
    prompts = prompt_file(tmp_path / "in.jsonl", [*GOOD[:2], BAD, *GOOD[2:]])
    out = tmp_path / "out"
    options = [*OPTIONS, "--shard-rows", "3", "--format", form]
    assert run(["batch", str(prompts), str(out), *options]) == 2
    message = capsys.readouterr().err
    assert "answers to 1 of 5 prompts broke off" in message and "line 3" in message
    if form == "parquet":
        import pyarrow.parquet as pq

        files = sorted(out.glob("*.parquet"))
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    else:
        files = sorted(out.glob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(files) == 2
    reasons = [[sample["finish_reason"] for sample in row["samples"]] for row in rows]
    assert [("error" in some) for some in reasons] == [False, False, True, False, False]
    assert "BrokenError" in rows[2]["samples"][0]["error"]


def test_if_every_prompt_of_several_breaks_off_nothing_is_written(
    poison: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then the prompts are not the cause: the run stops and can be resumed."""
    prompts, out = prompt_file(tmp_path / "in.jsonl", [BAD, BAD]), tmp_path / "out.jsonl"
    assert run(["generate", "--jsonl", str(prompts), "-o", str(out), *OPTIONS]) == 2
    assert "4 of 4 answers broke off" in capsys.readouterr().err
    assert not out.exists()
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 1


def test_answers_that_servers_failed_are_decoded_again(demo: Baco, poison: dict[str, int]) -> None:
    rows = demo.generate_batch([GOOD[0], BAD], **SETTINGS)
    assert "BrokenError" in str(check_group(rows, again=False))
    with pytest.raises(BacoError, match="2 of 4 answers broke off"):
        check_group(rows, again=True)
    assert check_group(rows[:1], again=True) is None


def test_a_single_prompt_that_breaks_ends_the_command_in_one_line(
    poison: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--json"]):
        assert run(["generate", BAD, *OPTIONS, *more]) == 2
        message = capsys.readouterr().err
        assert "BrokenError" in message and "Traceback" not in message


def test_a_waiting_sample_that_is_stopped_is_never_decoded(demo: Baco) -> None:
    """This holds also behind running samples of its own request."""
    prompt = demo.pair.renderer.render(GOOD[0])
    params = demo.pair.defaults.updated({"n": 6, "seed": 1, "max_tokens": 6})
    engine = Engine(demo.pair, max_rows=2)
    router = demo.router(ROUTER)
    request = Request(prompt.base_ids, prompt.aligned_ids, params, router, digest=prompt.digest)
    sequences = engine.add(request)
    engine.step()
    for stopped in (sequences[3], sequences[5]):
        engine.stop(stopped, 0)
    assert engine.waiting == 2
    while engine.busy:
        engine.step()
    assert [bool(one.tokens) for one in sequences] == [True, True, True, False, True, False]


def test_requests_with_and_without_logprobs_share_a_batch(demo: Baco) -> None:
    """A sample without ``logprobs`` has no top tokens, whatever is decoded with it."""
    decoder = demo.decoder()
    router = demo.router(ROUTER)
    first = decoder.submit(GOOD[0], router=router, seed=1, logprobs=0, max_tokens=12)
    decoder.submit(GOOD[1], router=router, seed=1, logprobs=2, max_tokens=3)
    done = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                done[chunk.prompt] = chunk.completion
    assert done[first].error is None
    assert done[first].top_logprobs is None


def requests_of(demo: Baco, prompts: list[str], **sampling: Any) -> list[Request]:
    requests = []
    for prompt in prompts:
        rendered = demo.pair.renderer.render(prompt)
        params = demo.pair.defaults.updated({"seed": 5, **sampling})
        ids = rendered.base_ids, rendered.aligned_ids
        requests.append(Request(*ids, params, demo.router(ROUTER), digest=rendered.digest))
    return requests


def test_requests_added_during_bisection_do_not_delay_it(
    demo: Baco, poison: dict[str, int]
) -> None:
    poison["tokens"] = 4
    engines = []

    def make() -> Engine:
        engines.append(Engine(demo.pair, speculate=False))
        return engines[-1]

    engine = IsolatingEngine(make)
    bad, *good = requests_of(demo, [BAD, *GOOD], max_tokens=8)
    (culprit,) = engine.add(bad)
    sequences = [sequence for request in good for sequence in engine.add(request)]
    while culprit.finish_reason is None:
        engine.step()
        (newcomer,) = requests_of(demo, GOOD[:1], max_tokens=8)
        sequences += engine.add(newcomer)
    assert len(engines) <= 5  # 5 prompts are bisected in three rounds
    while engine.busy:
        engine.step()
    assert culprit.finish_reason == "error"
    assert culprit.error is not None and culprit.error.kind == "process"
    assert {sequence.finish_reason for sequence in sequences} <= {"stop", "length"}
    assert {len(sequence.tokens) for sequence in sequences} == {8}


def test_samples_that_have_ended_are_not_decoded_again(demo: Baco, poison: dict[str, int]) -> None:
    poison["tokens"] = 6
    engine = IsolatingEngine(lambda: Engine(demo.pair, speculate=False))
    good, bad = requests_of(demo, [GOOD[0], BAD], n=8, max_tokens=10)
    known = {*(answers := engine.add(good)), *engine.add(bad)}
    for _ in range(3):
        engine.step()
    ended = set(answers[::2])
    for sequence in ended:
        engine.stop(sequence, 2)
    while engine.busy:
        for sequence in engine.step():
            assert sequence in known
            assert sequence not in ended
            if sequence.finish_reason is not None:
                ended.add(sequence)
    assert ended == known
    assert [len(sequence.tokens) for sequence in answers] == [2, 10] * 4
    assert {one.finish_reason for one in known if one.request is bad} == {"error"}
