"""Answers end with ``length`` at the end of the context, whatever the configuration calls it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig, SuppressTokensLogitsProcessor

from baco import Baco, BacoError, as_transformers
from baco.models.context import UNBOUNDED, context_of
from tests import fuzzing
from tests.test_transformers import encoded
from tests.tiny import CONTEXT, EVERY, drafting, save_tiny_pair, tiny_config, tiny_model

PROMPTS = ["Plan a walk.", "Where should I go, when the sea is warm?"]
# One of each way to have a limit; ``pytest --fuzz 2`` tries every architecture.
A_FEW = (
    "bart",  # a table whose first two rows are unused
    "gemma3",  # nested: the vision model's table of positions is no limit
    "gpt2",
    "mpt",  # max_seq_len
    "openai-gpt",  # read anew at every token, over a table of what each position sees
    "roberta",  # positions begin behind that of the padding
    "whisper",  # max_target_positions
    "xglm",  # a table that grows
)


@pytest.fixture(params=A_FEW if fuzzing.times == 1 else EVERY)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_answers_run_into_the_end_of_the_context_and_end_with_length(
    architecture: str, tmp_path: Path
) -> None:
    folder = save_tiny_pair(tmp_path, architecture)
    baco = drafting(Baco.load(str(folder), dtype="float32"))
    contexts = (baco.pair.base.context, baco.pair.aligned.context)
    never = dict.fromkeys(baco.pair.end_ids, -100.0)
    settings: dict[str, Any] = {"seed": 3, "logit_bias": never, "router": "Rand:0.5"}
    if UNBOUNDED in contexts:
        answers = baco.generate_batch(PROMPTS, max_tokens=2 * CONTEXT, **settings)
        assert [len(one.token_ids) for many in answers for one in many] == [2 * CONTEXT] * 2
        return
    assert contexts == (CONTEXT, CONTEXT) or architecture == "roberta"
    for prompt, (answer,) in zip(
        PROMPTS, baco.generate_batch(PROMPTS, max_tokens=10 * CONTEXT, **settings), strict=True
    ):
        rendered = baco.pair.renderer.render(prompt)
        longest = max(len(rendered.base_ids), len(rendered.aligned_ids))
        assert answer.finish_reason == "length"
        assert longest + len(answer.token_ids) == min(contexts)
    with pytest.raises(BacoError, match="its context window is"):
        baco.generate("sea " * CONTEXT, **settings)


def test_the_transformers_object_ends_when_the_longest_row_fills_a_context(
    tmp_path: Path,
) -> None:
    baco = Baco.load(str(save_tiny_pair(tmp_path, "gpt2")), dtype="float32")
    batch = encoded(baco, *([{"role": "user", "content": prompt}] for prompt in PROMPTS))
    never = SuppressTokensLogitsProcessor(sorted(baco.pair.end_ids))
    columns = batch["input_ids"].shape[1]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10 * CONTEXT}
    assisted: dict[str, Any] = {"prompt_lookup_num_tokens": 8}
    for router, own in (("Gap:0", {}), ("Aligned", {}), ("Base", assisted)):
        model = as_transformers(baco, router)
        longest = max(
            len(baco.pair.renderer.render(prompt).base_ids) if router == "Base" else columns
            for prompt in PROMPTS
        )
        rows = {name: table[1:] if own else table for name, table in batch.items()}
        output = model.generate(**rows, **settings, **own, logits_processor=[never])
        assert output.shape[1] - columns == CONTEXT - longest
        config = GenerationConfig(**settings, max_length=None)
        assert output.equal(
            model.generate(**rows, **own, generation_config=config, logits_processor=[never])
        )
        with pytest.raises(BacoError, match=f"its context window is {CONTEXT}"):
            model.generate(**encoded(baco, [{"role": "user", "content": "sea " * CONTEXT}]))
        with pytest.raises(BacoError, match=f"its context window is {CONTEXT}"):
            model(input_ids=torch.full((1, CONTEXT + 1), 40))


def test_a_draft_model_with_a_shorter_table_of_positions_drafts_within_it(
    tmp_path: Path,
) -> None:
    folder = save_tiny_pair(tmp_path / "pair", "gpt2")
    short = save_tiny_pair(tmp_path / "draft", "gpt2", n_positions=30) / "aligned"
    plain = Baco.load(str(folder), dtype="float32")
    drafted = drafting(Baco.load(str(folder), dtype="float32", draft=str(short)))
    settings: dict[str, Any] = {"router": "Aligned", "seed": 3, "max_tokens": CONTEXT}
    decoder = drafted.decoder()
    for prompt in PROMPTS:  # as the draft model reads them: 24 tokens, and 34
        decoder.submit(prompt, **settings | {"router": drafted.router("Aligned")})
    answers = {}
    while decoder.busy:
        for chunk in decoder.step():
            if chunk.completion is not None:
                answers[chunk.prompt] = chunk.completion.token_ids
    expected = [many[0].token_ids for many in plain.generate_batch(PROMPTS, **settings)]
    assert [answers[0], answers[1]] == expected


@pytest.mark.parametrize(
    ("limits", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 512}, 512),
        ({"max_seq_len": 2048}, 2048),
        ({"seq_length": 32768}, 32768),
        ({"max_sequence_length": 4096}, 4096),
        ({"max_target_positions": 448, "max_source_positions": 100}, 448),
        ({"model_max_length": 131072, "max_position_embeddings": 8192}, 131072),
        ({"block_size": 1024}, 1024),
        ({"block_size": 64, "max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": -1}, UNBOUNDED),
        ({"max_position_embeddings": None, "model_max_length": 10**30}, UNBOUNDED),
        ({}, UNBOUNDED),
    ],
)
def test_a_limit_counts_under_every_name_that_configurations_give_it(
    limits: dict[str, Any], context: int
) -> None:
    assert context_of(PreTrainedConfig(**limits)) == context


def test_a_table_of_positions_with_fewer_rows_limits_the_context() -> None:
    for model_type, name, rows in (
        ("gpt2", "n_positions", 40),
        ("opt", "max_position_embeddings", 40),
        ("roberta", "max_position_embeddings", 38),
    ):
        model = tiny_model(tiny_config(model_type, **{name: 40}))
        model.config.max_position_embeddings = 1000
        assert context_of(model.config) == 1000
        assert context_of(model.config, model) == rows
