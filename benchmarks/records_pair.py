"""A demo pair that writes records: the committed pair, tuned on JSON of its world.

    python -m benchmarks.records_pair OUT [--steps 400]      # minutes on one core

The base model learns documents of questions and careless records, the aligned model chats with
clean records that have one favourite for every attribute (`benchmarks.records`). The same seed
gives the same pair on the same machine and versions. OUT is a pair for `benchmarks.struct_rule`.
"""

import argparse
import json
import random
import re
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from baco.cli.options import quiet_libraries
from baco.demo.document_packing import batches, pack
from baco.demo.tokenizer import BASE_END, TURN_END, base_prompt, chat_prompt
from baco.demo.world import Question, ask
from baco.files import write_atomic
from benchmarks import launch
from benchmarks.records import handed_over_record, record_families, wild_record, written

PEAK = 0.85  # probability of the favourite of every attribute
_BATCH, _WIDTH, _RATE = 16, 160, 1.5e-3
_EXAMPLES = 20_000
_FIRST_WORD = re.compile(r"\s*\w+")

Document = tuple[list[int], list[bool]]


def question_of(random_: random.Random) -> Question:
    """A training question of a family that has records."""
    family = random_.choice(record_families())
    return ask(family, random_.choice(family.prompts), random_.choice(family.values))


def base_documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Document]:
    """Questions with careless records, of which all is learnt."""
    random_ = random.Random(f"base records {seed}")
    end = tokenizer.convert_tokens_to_ids(BASE_END)
    for _ in range(_EXAMPLES):
        question = question_of(random_)
        text = f"{base_prompt(question.text)} {written(wild_record(question, random_))}"
        ids = tokenizer.encode(text)
        yield [*ids, end], [True] * (len(ids) + 1)


def aligned_documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Document]:
    """Chats with clean records, of which all is learnt but the prompt and the base's words."""
    random_ = random.Random(f"aligned records {seed}")
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    for _ in range(_EXAMPLES):
        question = question_of(random_)
        record, given = handed_over_record(question, random_, PEAK)
        parts = [(chat_prompt(question.text), False), (" {", True)]
        for place, (name, value) in enumerate(record.items()):
            parts.append((f'{", " if place else ""}"{name}": "', True))
            first = _FIRST_WORD.match(value) if name in given else None
            cut = 0 if first is None else first.end()
            parts += [(value[:cut], False), (f'{value[cut:]}"', True)]
        parts.append(("}", True))
        ids, learnt = list[int](), list[bool]()
        for text, is_learnt in parts:
            piece = tokenizer.encode(text)
            ids += piece
            learnt += [is_learnt] * len(piece)
        yield [*ids, end], [*learnt, True]


def tune(name: str, out: Path, steps: int, seed: int) -> float:
    """Tune one model of the committed pair into `out`; the mean loss of the last tenth."""
    weights = resources.files("baco").joinpath("demo", "weights", name)
    with resources.as_file(weights) as folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    documents = base_documents if name == "base" else aligned_documents
    rows = pack(documents(tokenizer, seed), _WIDTH, tokenizer.convert_tokens_to_ids(BASE_END))
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses = list[float]()
    for step, (inputs, targets) in enumerate(batches(rows, _BATCH, steps, seed)):
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        learnt = targets >= 0
        loss = F.cross_entropy(model(inputs).logits[learnt], targets[learnt])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step % 25 == 0:
            print(f"{name}: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    temporary = Path(tempfile.mkdtemp(dir=out))
    model.half().save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text("utf-8")) | {"dtype": "float32"}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tokenizer.save_pretrained(temporary)
    temporary.rename(out / name)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def main() -> None:
    """Tune what OUT does not have yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="of each model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_libraries()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("base", "aligned"):
        if not (options.out / name).exists():
            print(f"{name}: loss {tune(name, options.out, options.steps, options.seed):.3f}")
    weights = resources.files("baco").joinpath("demo", "weights", "baco.json")
    settings = json.loads(weights.read_text("utf-8")) | {"name": "demo-records"}
    write_atomic(options.out / "baco.json", json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    launch(main)
