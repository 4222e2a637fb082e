"""Pairs of the size of real ones, made on the spot, to measure speed on.

    python -m benchmarks.bodies 0.2b [--kind random] [--dtype bfloat16]

writes the pair to a folder of the cache, unless it is there already, and prints the folder, for
`baco bench FOLDER`. There are two kinds. A *body* is the demo pair's function in a larger Llama:
the demo's layers are placed in the corner of larger matrices and are followed by layers that add
nothing. It writes the demo pair's text, with the demo's agreement between the models, at the cost
of its size. A *random* pair is a Llama of random weights whose aligned model is the base model plus
a perturbation, tuned so that the draws of the two agree on a wanted share of tokens.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor
from transformers.utils import logging

from baco.errors import BacoError
from baco.models.known_pairs import KnownPair, find_pair
from baco.sampling.noise import gumbel, noise_keys
from benchmarks import launch

# Length of a hidden state's constant, and the logit it gives to tokens that no text has: too low to
# ever be drawn.
_CONSTANT, _NEVER = 1e-3, -1e3
# Share of tokens that are the most likely ones of base and aligned model alike (Lin et al. 2023,
# "The Unlocking Spell on Base LLMs", Table 1: 77.7% for Llama-2-7b and its chat model, greedy).
PUBLISHED_AGREEMENT = 0.777


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights of one model; the output shares the embedding."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * head * self.key_heads
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden


SHAPES = {
    "50m": Shape(512, 12, 8, 8, 1536, 8_000),
    "0.2b": Shape(1024, 16, 16, 8, 3072, 32_000),
    "0.5b": Shape(1024, 36, 16, 8, 3840, 32_000),
    "1b": Shape(2048, 16, 32, 8, 8192, 32_000),
    "8b": Shape(4096, 32, 32, 8, 14336, 128_000),
}


def make(kind: str, size: str, folder: Path, dtype: torch.dtype, seed: int = 0) -> Path:
    """Write a pair of one kind and size into ``folder``, as base/ and aligned/.

    Args:
        kind: ``body`` or ``random``.
        size: a key of SHAPES.
        folder: the pair's.
        dtype: of the weights.
        seed: of the weights that are drawn.

    Raises:
        BacoError: no such kind or size.
    """
    if size not in SHAPES or kind not in ("body", "random"):
        raise BacoError(
            f"pair {kind}:{size}: use body or random, and a size of {', '.join(SHAPES)}"
        )
    shape, demo = SHAPES[size], find_pair("demo")
    sources = {"base": Path(demo.base), "aligned": Path(demo.aligned)}
    if kind == "body":
        models = {name: body(source, shape, seed) for name, source in sources.items()}
    else:
        models = random_models(shape, seed, PUBLISHED_AGREEMENT)
    for name, source in sources.items():
        models[name].to(dtype).save_pretrained(folder / name)
        _widen_tokenizer(source, folder / name, shape.vocabulary)
    config = {
        "name": f"{kind}:{size}",
        "dtype": str(dtype).removeprefix("torch."),
        "sampling": dict(demo.sampling),
    }
    # Written last: a folder without it is not whole.
    (folder / "baco.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def cached(kind: str, size: str, dtype: str) -> KnownPair:
    """A pair of one kind, size and dtype, made where the cache does not have it.

    Raises:
        BacoError: no such kind, size or dtype.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise BacoError(f"dtype {dtype!r}: a pair is made in float32, bfloat16 or float16")
    home = Path(os.environ.get("BACO_HOME") or platformdirs.user_cache_dir("baco"))
    folder = home / "bench" / f"{kind}-{size}-{dtype}"
    if not (folder / "baco.json").is_file():
        make(kind, size, folder, getattr(torch, dtype))
    return KnownPair.in_folder(folder)


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a pair: PAIR, --body, --dtype, --device."""
    parser.add_argument("pair", nargs="?", default="demo", help="short name or folder")
    parser.add_argument("--body", help=f"the demo pair in a larger model: {', '.join(SHAPES)}")
    parser.add_argument("--dtype")
    parser.add_argument("--device")


def named_pair(given: argparse.Namespace) -> KnownPair:
    """The pair that the arguments of :func:`add_pair` name; loading it shows no bars."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if given.body:
        return cached("body", given.body, given.dtype or "bfloat16")
    return find_pair(given.pair)


def _llama(shape: Shape, theta: float, eps: float) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=4096,
        rms_norm_eps=eps,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    llama = model.to_empty(device="cpu")
    llama.tie_weights()
    return llama


@torch.no_grad()
def body(source: Path, shape: Shape, seed: int) -> Any:
    """The Llama saved in ``source`` as a larger one of the same function.

    Its hidden states take the first of the larger one's columns; the others stay empty, but for a
    constant that keeps words beyond its own vocabulary unlikely. Weights that only ever meet zeros
    are drawn at random, so that every product costs what it does in a real model.
    """
    from transformers import LlamaForCausalLM

    small = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = small.config
    ratio = config.hidden_size / shape.hidden
    large = _llama(shape, config.rope_parameters["rope_theta"], config.rms_norm_eps * ratio)
    generator = torch.Generator().manual_seed(seed)
    for weight in large.parameters():
        weight.normal_(0, 0.02, generator=generator)
    _embed(small, large, ratio)
    for index, layer in enumerate(large.model.layers):
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        if index < config.num_hidden_layers:
            _place(small.model.layers[index], layer, config, shape)
    return large


def _embed(small: Any, large: Any, ratio: float) -> None:
    """Embedding and final norm: the small model's, the constant, tokens that are never drawn."""
    words, width = small.model.embed_tokens.weight.shape
    table = large.model.embed_tokens.weight
    table.zero_()
    table[:words, :width] = small.model.embed_tokens.weight
    table[:words, -1] = _CONSTANT
    norm = large.model.norm.weight
    norm.zero_()
    norm[:width] = small.model.norm.weight * math.sqrt(ratio)
    norm[-1] = 1e4
    table[words:, -1] = _NEVER


def _place(small: Any, large: Any, config: Any, shape: Shape) -> None:
    """One layer in the corner of a larger one."""
    width, ratio = config.hidden_size, config.hidden_size / shape.hidden
    own, head = config.head_dim, shape.hidden // shape.heads
    group = shape.heads // shape.key_heads
    # Rotary frequencies fall with a column's share of the head, so columns spread out keep theirs.
    spread = torch.arange(own // 2) * (head // own)
    columns = torch.cat((spread, head // 2 + spread))
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(large, name).weight
        norm.zero_()
        norm[:width] = getattr(small, name).weight * math.sqrt(ratio)
    for name, step, scale in (
        ("q_proj", group, math.sqrt(head / own)),  # scores are divided by the head's width
        ("k_proj", 1, 1.0),
        ("v_proj", 1, 1.0),
    ):
        weight = getattr(large.self_attn, name).weight
        weight[:, :width] = 0
        for index in range(config.num_attention_heads):
            rows = index * step * head + columns
            own_rows = getattr(small.self_attn, name).weight[index * own : (index + 1) * own]
            weight[rows, :width] = own_rows * scale
    for index in range(config.num_attention_heads):
        rows = index * group * head + columns
        own_columns = slice(index * own, (index + 1) * own)
        large.self_attn.o_proj.weight[:width, rows] = small.self_attn.o_proj.weight[:, own_columns]
    inner = config.intermediate_size
    for name in ("gate_proj", "up_proj"):
        getattr(large.mlp, name).weight[:inner, :width] = getattr(small.mlp, name).weight
    large.mlp.down_proj.weight[:width, :inner] = small.mlp.down_proj.weight


@torch.no_grad()
def random_models(shape: Shape, seed: int, agreement: float) -> dict[str, Any]:
    """A Llama of random weights, and the same with a perturbation, as base and aligned model."""
    base, aligned = _llama(shape, 1e4, 1e-5), _llama(shape, 1e4, 1e-5)
    generator = torch.Generator().manual_seed(seed)
    noise = {}
    for name, weight in base.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0, 0.02, generator=generator)
            noise[name] = torch.randn(weight.shape, generator=generator) * 0.02
    text = torch.randint(5, 2048, (1, 128), generator=generator)
    # Untrained logits are nearly flat; stretched, they are as peaked as a real model's.
    base.model.norm.weight *= 4.0 / base(text).logits.std()
    own = _draws(base, text, seed)
    low, high = 0.0, 1.0
    for _ in range(8):
        share = (low + high) / 2
        for name, weight in aligned.named_parameters():
            change = share * noise[name] if name in noise else 0.0
            weight.copy_(base.get_parameter(name) + change)
        same = float((_draws(aligned, text, seed) == own).float().mean())
        low, high = (share, high) if same > agreement else (low, share)
    return {"base": base, "aligned": aligned}


def _draws(model: Any, text: Tensor, seed: int) -> Tensor:
    """The token drawn after each token of a text [1, T], with the decoder's own noise: [T]."""
    logits: Tensor = model(text).logits[0]
    at = torch.arange(len(logits))
    keys = noise_keys(torch.full_like(at, seed), torch.zeros_like(at), at)
    return (logits + gumbel(keys[:, None], torch.arange(logits.shape[1]))).argmax(dim=-1)


def _widen_tokenizer(source: Path, folder: Path, size: int) -> None:
    """The demo's tokenizer with words that no text has, up to ``size`` ids."""
    for file in source.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            text = file.read_text(encoding="utf-8")
            if file.name == "tokenizer.json":
                state = json.loads(text)
                words = state["model"]["vocab"]
                words |= {f"unsaid{i}": i for i in range(len(words), size)}
                text = json.dumps(state, ensure_ascii=False)
            (folder / file.name).write_text(
                text.replace('"model_max_length": 512', '"model_max_length": 4096'),
                encoding="utf-8",
            )


def main() -> None:
    """Make a pair and print its folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("--kind", choices=("body", "random"), default="body")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    print(Path(cached(given.kind, given.size, given.dtype).base).parent)


if __name__ == "__main__":
    launch(main)
