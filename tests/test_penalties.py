"""Tokens that penalties count are counted once: when a row joins, and as it grows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baco import Baco
from baco.engine.batch import Batch, TokenCounts
from baco.engine.sequence import Request, SequenceState
from baco.sampling.params import SamplingParams
from baco.source import MODELS
from tests.fuzzing import budget

WIDTH = 12
ids = st.lists(st.integers(0, WIDTH - 1), min_size=1, max_size=6)
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "frequency_penalty": 0.5}


def from_scratch(rows: list[SequenceState]) -> list[tuple[list[int], ...]]:
    """For each row: counts of the answer's tokens, and the tokens of both prompts."""
    return [
        (
            [row.tokens.count(token) for token in range(WIDTH)],
            *([int(token in row.request.ids(model)) for token in range(WIDTH)] for model in MODELS),
        )
        for row in rows
    ]


def seen(batch: Batch) -> list[tuple[list[int], ...]]:
    """The same, as the penalties read it from the batch."""
    size = len(batch)
    at, none = torch.arange(size), torch.empty(size, 0, dtype=torch.int64)
    (base, counts), (aligned, _) = (
        batch.token_counts(at, torch.full((size,), model == "base"), none) for model in MODELS
    )
    return list(zip(counts.tolist(), base.long().tolist(), aligned.long().tolist(), strict=True))


@settings(max_examples=budget(60), deadline=None)
@given(st.data())
def test_incremental_counts_equal_counts_from_scratch(demo: Baco, data: st.DataObject) -> None:
    batch, router = Batch("cpu", WIDTH), demo.router("P:0.5")
    for _ in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["join", "leave", "grow"])):
            case "join":
                params = SamplingParams(seed=1, **data.draw(st.sampled_from([PENALTIES, {}])))
                prompts = tuple(data.draw(ids)), tuple(data.draw(ids))
                request = Request(*prompts, params, router, digest=b"")
                count = data.draw(st.integers(1, 3))
                batch.admit([SequenceState(request, sample, 99) for sample in range(count)])
            case "leave":
                order = data.draw(st.permutations(range(len(batch))))
                batch.reorder(order[: data.draw(st.integers(0, len(batch)))])
            case "grow":
                before = [len(row.tokens) for row in batch.rows]
                for row in batch.rows:
                    row.tokens += data.draw(ids)
                batch.advance(before)
        if batch.sampling.any_penalty:
            columns = zip(batch.rows, from_scratch(batch.rows), seen(batch), strict=True)
            for row, expected, counted in columns:
                assert not row.request.params.penalises or expected == counted


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers of rows with counted prompts and of counted answer tokens."""
    numbers = {"rows": 0, "tokens": 0}
    admit, add = TokenCounts.admit, TokenCounts.add

    def admitted(counts: TokenCounts, first: int, rows: Any) -> None:
        numbers["rows"] += len(rows)
        admit(counts, first, rows)

    def added(counts: TokenCounts, first: int, rows: Any, before: Any) -> None:
        numbers["tokens"] += sum(
            len(row.tokens) - had for row, had in zip(rows, before, strict=True)
        )
        add(counts, first, rows, before)

    monkeypatch.setattr(TokenCounts, "admit", admitted)
    monkeypatch.setattr(TokenCounts, "add", added)
    return numbers


def test_a_row_is_counted_once_however_many_join_and_leave_after_it(
    demo: Baco, counted: dict[str, int]
) -> None:
    demo.max_rows, most = 4, demo.max_rows
    try:
        prompts = [f"Recommend a {word} destination" for word in ("sunny", "quiet", "summer")]
        rows = demo.generate_batch(
            prompts, router="P-Punc:0.4", n=4, seed=1, max_tokens=20, **PENALTIES
        )
    finally:
        demo.max_rows = most
    answers = [answer for row in rows for answer in row]
    # What a stop string or a next turn cut off was counted before it was cut.
    tokens = sum(len(answer.token_ids) for answer in answers)
    assert counted["rows"] == len(answers)
    assert tokens <= counted["tokens"] <= tokens + 8 * len(answers)


def test_an_answer_with_penalties_does_not_depend_on_other_rows(demo: Baco) -> None:
    settings: dict[str, Any] = {"router": "P-Punc:0.4", "seed": 1, **PENALTIES}
    alone = demo.generate("Recommend a summer destination", n=3, max_tokens=24, **settings)
    decoder, router = demo.decoder(), demo.router("P-Punc:0.4")
    del settings["router"]
    ticket = decoder.submit(
        "Recommend a summer destination", router=router, n=3, max_tokens=24, **settings
    )
    completions, steps = [], 0
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.prompt == ticket and chunk.completion is not None:
                completions.append(chunk.completion)
        steps += 1
        if steps in (1, 2, 4):
            given = settings if steps == 2 else {"seed": steps}
            decoder.submit("Give me a dinner idea", router=router, n=2, max_tokens=3, **given)
    completions.sort(key=lambda completion: completion.sample)
    assert [completion.token_ids for completion in completions] == [
        completion.token_ids for completion in alone
    ]
