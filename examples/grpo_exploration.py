"""Train a model by GRPO in TRL on answers that a pair explores.

The base model writes some of the words, so answers differ and the advantages within a group are not
all zero. The pair draws at temperature 1, without truncation, and token by token. So a token's
log-probability under its source is that of the policy that drew it, and the trainer takes it for
the old policy of its ratio: it is 1 for tokens of the aligned model, as long as the pair has the
trained weights, and tokens of the base model are weighted and clipped.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLE = "example: python examples/grpo_exploration.py --steps 5 --router P-Punc:0.4"
PROMPTS = ["Recommend a summer destination", "Give me a cosy dinner idea", "Recommend a gift"]
WORDS = 12


def short(completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: 1 for an answer of at most WORDS words, 0.1 less for each word more."""
    return [1 - 0.1 * max(0, len(text.split()) - WORDS) for text in completions]


class Explorer:
    """Rollouts of TRL by a pair whose aligned model is the one that is trained.

    Args:
        base: name or folder of the base model.
        aligned: of the aligned model, as it is before the training.
        router: which model writes the next token.
        refresh: steps after which the pair takes the trained weights.
        max_tokens: of an answer.
        seed: of the first step's draws.
    """

    def __init__(
        self, base: str, aligned: str, router: str, refresh: int, max_tokens: int, seed: int
    ) -> None:
        self.base, self.router, self.refresh = base, router, refresh
        self.max_tokens, self.seed = max_tokens, seed
        self.step = 0  # of the pair's weights
        self.pair = self._load(aligned)
        self.sources: list[tuple[str, ...]] = []  # of the last rollout

    def _load(self, aligned: str) -> Any:
        from baco import Baco

        return Baco.load(base=self.base, aligned=aligned, dtype="float32")

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """An answer for each prompt; TRL repeats a prompt as often as it wants answers."""
        step = trainer.state.global_step
        if step - self.step >= self.refresh:
            self._take_weights(trainer)
            self.step = step
        answers = {
            prompt: iter(
                self.pair.generate(
                    prompt,
                    n=prompts.count(prompt),
                    router=self.router,
                    seed=self.seed + step,
                    max_tokens=self.max_tokens,
                    # Drawn from the raw distribution of the source: no mask of whole words, either.
                    switch="token",
                    temperature=1.0,
                    min_p=0.0,
                    top_p=1.0,
                    top_k=0,
                )
            )
            for prompt in dict.fromkeys(prompts)
        }
        drawn = [next(answers[prompt]) for prompt in prompts]
        self.sources = [answer.sources for answer in drawn]
        render = self.pair.pair.renderer.render
        return {
            "prompt_ids": [list(render(prompt).aligned_ids) for prompt in prompts],
            "completion_ids": [list(answer.token_ids) for answer in drawn],
            "logprobs": [list(answer.logprobs) for answer in drawn],
            "base_share": [answer.base_share for answer in drawn],
        }

    def _take_weights(self, trainer: Any) -> None:
        """Load the pair with the trained weights: it keeps weights in a layout of its own."""
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_model(folder)
            trainer.processing_class.save_pretrained(folder)
            self.pair.close()
            self.pair = self._load(folder)


def make_trainer(explorer: Explorer, aligned: str, steps: int, n: int, out: Path) -> Any:
    """A GRPO trainer of the aligned model that learns from the explorer's answers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    class ExploringTrainer(GRPOTrainer):  # type: ignore[misc]
        """GRPO whose old policy is the pair that drew the answers."""

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
            return output

    tokenizer = AutoTokenizer.from_pretrained(aligned)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return ExploringTrainer(
        model=AutoModelForCausalLM.from_pretrained(aligned, dtype="float32"),
        reward_funcs=short,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * steps}),
        processing_class=tokenizer,
        rollout_func=explorer,
        args=GRPOConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=2 * n,
            num_generations=n,
            max_completion_length=explorer.max_tokens,
            learning_rate=1e-4,
            beta=0.0,  # no reference model
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            disable_tqdm=True,
            seed=explorer.seed,
        ),
    )


def main() -> None:
    """Train for a few steps, and print each step's reward and base share."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--pair", default="demo", help="name or folder of a pair (demo)")
    parser.add_argument("--router", default="P-Punc:0.4", help="router and threshold (P-Punc:0.4)")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps (10)")
    parser.add_argument("-n", type=int, default=4, help="answers to a prompt in a group (4)")
    parser.add_argument(
        "--refresh", type=int, default=1, help="steps until the pair takes the trained weights (1)"
    )
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of an answer (48)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same answers (1)")
    parser.add_argument("--out", type=Path, help="folder for the trained model")
    args = parser.parse_args()
    if args.n < 2:
        sys.exit(f"grpo_exploration: n is {args.n}: a group needs 2 answers or more")
    try:
        import trl  # noqa: F401
    except ImportError:
        sys.exit("grpo_exploration: TRL is missing: pip install 'trl>=1.16,<2' 'baco[evaluation]'")
    from baco import Baco, BacoError

    try:
        pair = Baco.load(args.pair).pair
        base, aligned = pair.base.name, pair.aligned.name
        explorer = Explorer(base, aligned, args.router, args.refresh, args.max_tokens, args.seed)
    except BacoError as error:
        sys.exit(f"grpo_exploration: {error}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(explorer, aligned, args.steps, args.n, args.out or Path(folder))
        trainer.train()
        if args.out is not None:
            trainer.save_model(args.out)
    for row in trainer.state.log_history:
        if "reward" in row:
            print(f"step {row['step']}: reward {float(row['reward']):.3f}")


if __name__ == "__main__":
    main()
