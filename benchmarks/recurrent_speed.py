"""Recurrent and hybrid models of SmolLM2's size beside Llama: paired decoding over `generate`.

    python -m benchmarks.recurrent_speed [NAMES] [--dtype float32] [--tokens 8] [--repeats 3]

Weights are random, and the models of a pair differ a little. Llama runs on the masked forward of
`transformers`, which is what models without a forward of BACo's own can reach. Each pair takes
turns with Llama on one thread; figures are medians over turns.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from baco.bench.contestants import Generate, Paired, Task, never_ending
from baco.models.forward.masked import MaskedForward, MaskForm
from baco.models.forward.selection import ModelCall
from baco.models.known_pairs import KnownPair
from baco.models.pair import Pair, load_pair
from baco.routing.parser import router
from baco.source import MODELS
from benchmarks import launch
from tests.pairs import train_tokenizer, wrapped
from tests.tiny import perturb, tiny_config

_COMMON = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}
_MAMBA = {"mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
# About as many parameters as SmolLM2-135M has.
BODIES: dict[str, dict[str, Any]] = {
    "llama": _HEADS | {"head_dim": 64, "num_hidden_layers": 30, "intermediate_size": 1536},
    "falcon_h1": _HEADS
    | _MAMBA
    | {
        "head_dim": 64,
        "num_hidden_layers": 24,
        "intermediate_size": 1152,
        "mamba_d_ssm": 768,
        "mamba_n_heads": 12,
    },
    "granitemoehybrid": _HEADS
    | _MAMBA
    | {
        "num_hidden_layers": 30,
        "layer_types": ["attention" if at % 10 == 5 else "mamba" for at in range(30)],
        "shared_intermediate_size": 1152,
        "intermediate_size": 1152,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 18,
        "mamba_expand": 2,
    },
    "mamba2": {
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "state_size": 128,
        "num_heads": 24,
        "head_dim": 64,
        "expand": 2,
        "n_groups": 1,
    },
    "lfm2": _HEADS
    | {
        "num_hidden_layers": 30,
        "layer_types": ["full_attention" if at % 3 == 2 else "conv" for at in range(30)],
        "intermediate_size": 1536,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_next": _HEADS
    | {
        "head_dim": 64,
        "num_hidden_layers": 24,
        "intermediate_size": 1152,
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 12,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 0,
        "mlp_only_layers": list(range(24)),
        "decoder_sparse_step": 1,
    },
}
NOISE = 0.3
PROMPT, ROUTER = "Plan a walk.", "P:0.5"


class Body:
    """Paired decoding and `generate` on one body."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as directory:
            known = KnownPair.in_folder(_save_pair(Path(directory), name))
            ours = load_pair(known, dtype=given.dtype)
            plain = load_pair(known, dtype=given.dtype, packed=False)
        if name == "llama":
            _run_masked(ours)
        prompt = ours.renderer.render(PROMPT)
        self._n = given.n
        self._tasks = [
            Task(prompt, router(ROUTER), never_ending(ours, given.tokens, seed=seed))
            for seed in range(given.repeats)
        ]
        self._paired, self._generate = Paired(ours), Generate(plain)
        for contestant in (self._paired, self._generate):
            contestant.decode(self._tasks[0].of(self._n, 2))

    def times_generate(self, turn: int) -> float:
        """Tokens per second of paired decoding over those of `generate`, in one turn."""
        task = self._tasks[turn].of(self._n)
        return self._paired.decode(task).speed / self._generate.decode(task).speed


def _save_pair(folder: Path, name: str) -> Path:
    tokenizer = train_tokenizer()
    for source in MODELS:
        torch.manual_seed(0)
        config = tiny_config(name, **_COMMON | BODIES[name])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if source == "aligned":
            perturb(model, NOISE)
        model.save_pretrained(folder / source)
        wrapped(tokenizer, aligned=source == "aligned").save_pretrained(folder / source)
    return folder


def _run_masked(pair: Pair) -> None:
    """Let both models run the forward of `transformers`, all rows at once."""
    for model in (pair.base, pair.aligned):
        form = MaskForm.of(model.model.config)
        assert form is not None
        model.__dict__["_forward"] = MaskedForward(ModelCall(model), form, model.context)


def measure(name: str, llama: Body, given: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Times `generate` of a body and of Llama, turn by turn."""
    body = Body(name, given)
    for turn in range(given.repeats):
        if turn % 2:
            yield body.times_generate(turn), llama.times_generate(turn)
        else:
            of_llama = llama.times_generate(turn)
            yield body.times_generate(turn), of_llama


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    bodies = [name for name in BODIES if name != "llama"]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(bodies)}; all by default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n", type=int, default=8, help="answers")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    given = parser.parse_args()
    if unknown := sorted(set(given.names) - set(bodies)):
        parser.error(f"no body named {', '.join(unknown)}: give any of {', '.join(bodies)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    llama = Body("llama", given)
    print("body                times generate   Llama beside it   ratio")
    for name in given.names or bodies:
        turns = list(measure(name, llama, given))
        own, others = (median(column) for column in zip(*turns, strict=True))
        ratio = median(one / other for one, other in turns)
        print(f"{name:20}{own:>14.2f}{others:>18.2f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    launch(main)
