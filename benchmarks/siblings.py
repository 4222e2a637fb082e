"""A pair from one real model: the model itself as the aligned one, a perturbed copy as the base.

    python -m benchmarks.siblings [smollm2 | gemma3 | FILE.gguf | FOLDER] [--noise 0.05]

Few base models come as packages, so the base is made: every matrix but the embeddings gets noise of
5% of its standard deviation. The two then agree on the most likely token in 0.81 of the positions
of SmolLM2's own answers, like real pairs (0.78 for Llama 2 7B and its chat model). Prints the
folder, for `baco bench FOLDER` and others; an existing folder is used again.
"""

import argparse
from pathlib import Path

import torch

from baco.models.dtypes import chosen_dtype
from baco.models.loading import Placement, load_model, load_tokenizer
from benchmarks import launch
from tests_real.fetch import MODELS, fetch, folder, path_of

# Gemma 3 270M comes without a chat template: its prompts are continued as they are.
PLAIN_TEMPLATE = "{{ messages[-1]['content'] }}"


def pair_folder(name: str, noise: float) -> Path:
    """The folder of such a pair, with ``base`` and ``aligned`` in it."""
    if name in MODELS:
        fetch(name)
        name, stem = str(path_of(name)), name
    else:
        stem = Path(name).stem
    out = folder() / f"{stem}-{noise:g}"
    if out.exists():
        return out
    partial = out.with_suffix(".partial")
    device = torch.device("cpu")
    model = load_model(name, Placement(device, chosen_dtype("bfloat16", device)))
    tokenizer = load_tokenizer(name)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    generator = torch.Generator().manual_seed(0)
    for source in ("aligned", "base"):
        if source == "base":
            perturb(model, noise, generator)
        model.save_pretrained(partial / source)
        tokenizer.save_pretrained(partial / source)
    partial.rename(out)
    return out


def adapter_folder(model: Path, noise: float, rank: int = 8) -> Path:
    """The folder of a random LoRA adapter over a model: to every matrix but the embeddings it adds
    a product of this rank, as large as a share of the matrix (Frobenius norm).
    """
    out = folder() / f"{model.parent.name}-adapter-{noise:g}"
    if out.exists():
        return out
    from peft import LoraConfig, get_peft_model

    device = torch.device("cpu")
    plain = load_model(str(model), Placement(device, chosen_dtype("bfloat16", device)))
    torch.manual_seed(0)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False
    )
    adapted = get_peft_model(plain, config)
    with torch.no_grad():
        for layer in (module for module in adapted.modules() if hasattr(module, "lora_A")):
            if not layer.lora_A:
                continue
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            size = float(layer.get_base_layer().weight.float().norm())
            up.mul_(noise * size / float((up @ down).norm()))
    adapted.save_pretrained(out)
    load_tokenizer(str(model)).save_pretrained(out)
    return out


@torch.no_grad()
def perturb(model: torch.nn.Module, noise: float, generator: torch.Generator) -> None:
    """Add noise of a share of its standard deviation to every matrix but the embeddings."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.add_((drawn * noise * weight.float().std()).to(weight.dtype))


def main() -> None:
    """Make the pair and print its folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--noise", type=float, default=0.05)
    arguments = parser.parse_args()
    print(pair_folder(arguments.model, arguments.noise))


if __name__ == "__main__":
    launch(main)
