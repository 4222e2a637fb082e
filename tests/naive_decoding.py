"""The reference decoder: both models over the whole text at every token, one row, no cache.

It is written from the design alone and uses nothing of the engine, which is tested against it:
integers for the noise, plain Python for the rules. It is slow on purpose.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

MASK = 0xFFFFFFFF


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def coin_word(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=4).digest(), "big") | 2**31


def chat_digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()


def prompt_seed(seed: int, digest: bytes) -> int:
    """The seed of one prompt's draws: BLAKE2b of its digest under the seed as key."""
    mixed = hashlib.blake2b(digest, key=seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(mixed, "little") % 2**63


def uniform(seed: int, sample: int, position: int, token: int) -> float:
    low, high = seed & MASK, seed >> 32 & MASK
    first = mix(mix(mix(mix(low) ^ high) ^ sample) ^ position)
    second = mix(first ^ 0x9E3779B9 ^ mix(low + 0x85EBCA6B & MASK))
    return (2 * (mix(mix(token ^ first) ^ second) >> 9) + 1) * 2.0**-24


def entropy(row: torch.Tensor) -> float:
    p = row.double().softmax(-1)
    return float(-(p[p > 0] * p[p > 0].log()).sum())


def max_probability(row: torch.Tensor) -> float:
    return float(row.double().softmax(-1).max())


def decode(
    pair: Any,
    base_prompt: tuple[int, ...],
    aligned_prompt: tuple[int, ...],
    rule: Callable[..., bool],
    *,
    digest: bytes,
    seed: int,
    sample: int,
    temperature: float,
    max_tokens: int,
    allowed: Callable[[list[int]], set[int]] | None = None,
    place: Callable[[list[int]], str] | None = None,
    keeps_structure: bool = False,
    min_p: float = 0.0,
    base_min_p: float = 0.0,
    whole_words: bool = True,
    thought: Sequence[int] = (),
    marks: Sequence[int] = (),
    logit_bias: Mapping[int, float] = MappingProxyType({}),
    reads_hidden_states: bool = False,
) -> tuple[list[int], list[str]]:
    """Tokens and sources of one answer; ``rule`` gets (base row, aligned row, coin), and with
    ``reads_hidden_states`` the last hidden states [D] of both models.

    ``thought`` is what the aligned model wrote before it. Positions, and so noise, count on. The
    base model never writes ``marks``. ``allowed`` returns what may follow some tokens; the rule
    then also gets the base row with everything else at -inf. ``place`` returns ``structure``,
    ``beginning`` or ``inside`` for the position after some tokens; the rule then also gets whether
    the base model's most likely allowed token belongs to the structure. ``keeps_structure``: the
    rule picks the source of forced tokens too.
    """
    vocabulary, seed = pair.vocabulary, prompt_seed(seed, digest)
    aligned_prompt, first = (*aligned_prompt, *thought), len(thought)
    tokens: list[int] = []
    sources: list[str] = []
    while first + len(tokens) < max_tokens and not (tokens and tokens[-1] in pair.end_ids):
        rows = {
            "base": pair.base.score([*base_prompt, *tokens])[-1],
            "aligned": pair.aligned.score([*aligned_prompt, *tokens])[-1],
        }
        coin = uniform(seed, sample, first + len(tokens), coin_word("router"))
        read: list[Any] = [rows["base"], rows["aligned"], coin]
        if reads_hidden_states:
            read.append(last_hidden_state(pair.base, [*base_prompt, *tokens]))
            read.append(last_hidden_state(pair.aligned, [*aligned_prompt, *tokens]))
        forced = False
        if allowed is not None:
            following = allowed(tokens)
            forced = len(following) == 1 or following <= pair.end_ids
            others = [token for token in range(len(rows["base"])) if token not in following]
            rows = {name: row.clone() for name, row in rows.items()}
            for row in rows.values():
                row[others] = -math.inf
            read.append(rows["base"])
        begins = place is not None and place(tokens) == "beginning"
        if place is not None:
            top = int(rows["base"].argmax())
            ends = top in pair.end_ids or place([*tokens, top]) != "inside"
            read.append(ends or place(tokens) == "structure")
        wanted = "base" if rule(*read) else "aligned"
        source, masked = wanted, False
        if forced and not keeps_structure:
            source = sources[-1] if sources else "aligned"
        elif tokens and whole_words:
            active = sources[-1]
            ended = bool(vocabulary.ends_word[tokens[-1]]) or begins or forced
            boundary = ended or bool(vocabulary.word_start[int(rows[active].argmax())])
            source = wanted if boundary else active
            masked = source != active and not ended
        row = rows[source].clone()
        for token in range(len(row)):
            special = bool(vocabulary.special[token]) and token not in pair.end_ids
            special = special or token in marks
            if (source == "base" and special) or (masked and not vocabulary.word_start[token]):
                row[token] = -math.inf
        row = _biased(row, logit_bias)
        if base_min_p and source == "base":
            row[row < row.max() + math.log(base_min_p)] = -math.inf
        tokens.append(_draw(row, temperature, min_p, (seed, sample, first + len(tokens))))
        sources.append(source)
    return tokens, sources


def last_hidden_state(model: Any, ids: list[int]) -> torch.Tensor:
    """What `transformers` itself returns as the hidden state after the last layer and its norm."""
    with model.model.disable_adapter() if model.adapter_off else contextlib.nullcontext():
        output = model.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    row: torch.Tensor = output.hidden_states[-1][0, -1].double()
    return row


def think(
    pair: Any,
    aligned_prompt: tuple[int, ...],
    *,
    marks: tuple[int, int],
    begun: bool,
    between: Callable[[int], bool],
    digest: bytes,
    seed: int,
    sample: int,
    temperature: float,
    max_tokens: int,
    logit_bias: Mapping[int, float] = MappingProxyType({}),
) -> list[int]:
    """The aligned model alone, from ``marks[0]`` to ``marks[1]`` and the tokens ``between`` that
    and the answer; nothing where its first token is another one.
    """
    seed, tokens, ended = prompt_seed(seed, digest), list[int](), False
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in pair.end_ids):
        row = _biased(pair.aligned.score([*aligned_prompt, *tokens])[-1], logit_bias)
        token = _draw(row, temperature, 0.0, (seed, sample, len(tokens)))
        if (ended and not between(token)) or not (tokens or begun or token == marks[0]):
            break
        tokens.append(token)
        ended = ended or token == marks[1]
    return tokens


def _biased(row: torch.Tensor, logit_bias: Mapping[int, float]) -> torch.Tensor:
    row = row.clone()
    for token, bias in logit_bias.items():
        row[token] += bias
    return row


def _draw(row: torch.Tensor, temperature: float, min_p: float, key: tuple[int, int, int]) -> int:
    if temperature == 0:
        return int(row.argmax())
    row = row / temperature
    if min_p > 0:
        row[row < row.max() + math.log(min_p)] = -math.inf
    noise = [-math.log(-math.log(uniform(*key, token))) for token in range(len(row))]
    return int((row + torch.tensor(noise)).argmax())
