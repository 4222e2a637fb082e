"""The example of exploration in TRL gives the trainer the log-probabilities of what was drawn."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from baco import Baco

pytest.importorskip("trl", reason="needs pip install 'trl>=1.16,<2'")

FILE = Path(__file__).parents[1] / "examples" / "grpo_exploration.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("grpo_exploration", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logprobs(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of the tokens of an answer after a prompt, in nats."""
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        rows = model.eval()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    picked: torch.Tensor = rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return picked


def test_the_trainer_compares_its_model_with_the_pair_that_drew_the_answers(
    demo: Baco, tmp_path: Path
) -> None:
    example = load_example()
    pair = demo.pair
    explorer = example.Explorer(pair.base.name, pair.aligned.name, "P-Punc:0.4", 1, 16, 1)
    trainer = example.make_trainer(explorer, pair.aligned.name, 2, 2, tmp_path)
    compute, batches = trainer._generate_and_score_completions, list[dict[str, torch.Tensor]]()
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}

    def record(inputs: Any) -> Any:
        batches.append(compute(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = record
    trainer.train()
    assert len(batches) == 2
    assert any(not weight.equal(before[name]) for name, weight in trainer.model.named_parameters())

    prompts = [example.PROMPTS[0]] * 4
    drawn = explorer(prompts, trainer)  # with the weights after the last step
    assert len({tuple(ids) for ids in drawn["completion_ids"]}) > 1
    shares = 0
    for row, sources in enumerate(explorer.sources):
        given = torch.tensor(drawn["logprobs"][row])
        own = logprobs(trainer.model, drawn["prompt_ids"][row], drawn["completion_ids"][row])
        is_aligned = torch.tensor([source == "aligned" for source in sources])
        torch.testing.assert_close(given[is_aligned], own[is_aligned], atol=1e-4, rtol=1e-4)
        shares += int((~is_aligned).sum())
        if (~is_aligned).any():
            assert not given[~is_aligned].allclose(own[~is_aligned], atol=1e-3)
    assert shares > 0
    # The old policy of the loss is the pair, not the trained model.
    batch = batches[-1]
    mask = batch["completion_mask"].bool()
    old, sampled = batch["old_per_token_logps"], batch["sampling_per_token_logps"]
    assert old[mask].equal(sampled[mask]) and (old[mask] < 0).any()
    explorer.pair.close()
