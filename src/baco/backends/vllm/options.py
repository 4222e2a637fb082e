"""The options of a request to a pair inside vLLM, checked in the process that accepts requests.

The options are sent in ``SamplingParams.extra_args``, which over HTTP is ``vllm_xargs``. vLLM's
caches and limits refer to one prompt: that of the aligned model. Where the base model's prompt is
longer, fill tokens are put before it, as many as the difference; the aligned model skips them.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

from baco.errors import BacoError
from baco.routing.parser import named_files, portable, router
from baco.routing.router import Router, further_reads, reads_structure
from baco.routing.word_boundaries import Switch
from baco.sampling.structure import (
    ANY_OBJECT,
    Structure,
    check_choice,
    check_pattern,
    check_schema,
    structure_of,
)

PREFIX = "baco_"
DEFAULT_ROUTER = "P-Punc:0.4"


@dataclass(frozen=True)
class Limits:
    """Limits on token ids and prompts of the pair that this process serves, if any; its folder, and
    whether code that comes with it may run.
    """

    vocabulary: int | None = None
    context: int | None = None
    folder: Path | None = None
    trust_remote_code: bool = False
    here: ClassVar["Limits"]

    @classmethod
    def of_pair(
        cls, vocabulary: int, context: int, folder: Path, trust_remote_code: bool = False
    ) -> None:
        """Set the limits of this process."""
        cls.here = cls(vocabulary, context, folder, trust_remote_code)


Limits.here = Limits()


@dataclass(frozen=True, slots=True)
class PairOptions:
    """How one request is routed.

    Attributes:
        base_ids: the base model's prompt; None: the same as the aligned model's.
        fill: tokens before the aligned model's prompt that it skips.
        router: picks the source at every boundary.
        switch: ``word`` or ``token``.
        seed, sample: of the coins of random routers; a seed of None: vLLM's seed of the answer, and
            without one a seed of the answer's own.
        digest: of the prompt, a key of the coins; None: of the aligned model's token ids.
        joining_space: whether one space may precede the text of a structured answer.
    """

    base_ids: tuple[int, ...] | None
    fill: int
    router: Router
    switch: Switch
    seed: int | None
    sample: int
    digest: bytes | None = None
    joining_space: bool = False

    @classmethod
    def read(cls, arguments: Mapping[str, Any] | None) -> Self:
        """The options of a request's extra arguments.

        Raises:
            BacoError: an option is unknown, or its value is not allowed.
        """
        given = {
            name.removeprefix(PREFIX): value
            for name, value in (arguments or {}).items()
            if name.startswith(PREFIX)
        }
        known = (
            "base_prompt_ids",
            "fill",
            "router",
            "threshold",
            "switch",
            "seed",
            "sample",
            "digest",
            "joining_space",
        )
        for name in given:
            if name not in known:
                raise BacoError(
                    f"unknown argument {PREFIX}{name}: known are "
                    f"{', '.join(PREFIX + option for option in known)}"
                )
        switch = given.get("switch", "word")
        if switch not in get_args(Switch):
            raise BacoError(f"{PREFIX}switch is {switch!r}: use word or token")
        return cls(
            _ids(given.get("base_prompt_ids")),
            _whole("fill", given.get("fill", 0)),
            _router(given.get("router"), given.get("threshold")),
            switch,
            None if given.get("seed") is None else _whole("seed", given["seed"]),
            _whole("sample", given.get("sample", 0)),
            _digest(given.get("digest")),
            bool(_whole("joining_space", given.get("joining_space", 0))),
        )

    def check_prompt(self, length: int, vocabulary: int) -> None:
        """Raise BacoError if the options do not fit a prompt of ``length`` tokens."""
        if self.fill >= length:
            raise BacoError(
                f"{PREFIX}fill is {self.fill}: the prompt has {length} tokens, and the aligned "
                "model has to read some of them"
            )
        if self.base_ids is not None and len(self.base_ids) > length:
            raise BacoError(
                f"{PREFIX}base_prompt_ids has {len(self.base_ids)} tokens and the prompt {length}: "
                f"put {len(self.base_ids) - length} tokens before the prompt and say so in "
                f"{PREFIX}fill"
            )
        if self.base_ids is not None and max(self.base_ids) >= vocabulary:
            raise BacoError(
                f"{PREFIX}base_prompt_ids names token {max(self.base_ids)}: the vocabulary has "
                f"{vocabulary} tokens"
            )


def structure_named(outputs: Any) -> Structure | None:
    """The structure that vLLM's ``StructuredOutputsParams`` name.

    Raises:
        BacoError: it is of a kind that answers cannot be held to, or cannot be read.
    """
    if outputs is None or outputs.all_constraints_none():
        return None
    for name in ("structural_tag", "whitespace_pattern"):
        if getattr(outputs, name, None) is not None:
            raise BacoError(
                f"structured_outputs with {name}: a pair takes json, json_object, regex, choice "
                "and grammar, and writes JSON on one line"
            )
    schema = ANY_OBJECT if outputs.json_object else outputs.json
    check_pattern("regex", outputs.regex)
    check_pattern("grammar", outputs.grammar)
    return structure_of(
        check_schema(schema), outputs.regex, check_choice(outputs.choice), outputs.grammar
    )


def pair_prompt(
    base_ids: Sequence[int], aligned_ids: Sequence[int], digest: bytes | None = None
) -> tuple[list[int], dict[str, Any]]:
    """The arguments to vLLM for a prompt that the two models read differently.

    Args:
        base_ids, aligned_ids: the prompt as each model reads it.
        digest: of the prompt, a key of the coins; None: of the aligned model's token ids.

    Returns:
        (token ids, extra arguments).
    """
    fill = max(0, len(base_ids) - len(aligned_ids))
    # A token of the prompt, so that penalties count no other token.
    ids = [aligned_ids[0]] * fill + list(aligned_ids)
    arguments: dict[str, Any] = {
        f"{PREFIX}base_prompt_ids": list(base_ids),
        f"{PREFIX}fill": fill,
    }
    if digest is not None:
        arguments[f"{PREFIX}digest"] = digest.hex()
    return ids, arguments


def _ids(given: object) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, str):  # some HTTP clients cannot send lists
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    if not isinstance(given, list | tuple) or not given:
        raise BacoError(f"{PREFIX}base_prompt_ids: give a list of token ids, one at least")
    ids: list[int] = []
    for token in given:
        whole = int(token) if isinstance(token, float) and token.is_integer() else token
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < 0:
            raise BacoError(f"{PREFIX}base_prompt_ids has {token!r} in it: give token ids")
        ids.append(whole)
    vocabulary, context = Limits.here.vocabulary, Limits.here.context
    if vocabulary is not None and max(ids) >= vocabulary:
        raise BacoError(
            f"{PREFIX}base_prompt_ids names token {max(ids)}: the vocabulary has {vocabulary} "
            "tokens"
        )
    if context is not None and len(ids) >= context:
        raise BacoError(
            f"prompt of {len(ids)} tokens, as the base model reads it: its context window is "
            f"{context}; shorten the prompt"
        )
    return tuple(ids)


def _whole(name: str, given: object) -> int:
    whole = int(given) if isinstance(given, float) and given.is_integer() else given
    if isinstance(whole, bool) or not isinstance(whole, int) or not 0 <= whole < 2**63:
        raise BacoError(f"{PREFIX}{name} is {given!r}: give a whole number from 0")
    return whole


def _digest(given: object) -> bytes | None:
    if given is None:
        return None
    with contextlib.suppress(TypeError, ValueError):
        return bytes.fromhex(given)  # type: ignore[arg-type]
    raise BacoError(f"{PREFIX}digest is {given!r}: give the prompt's digest in hexadecimal digits")


def _router(spelling: object, threshold: object) -> Router:
    if threshold is not None and (
        isinstance(threshold, bool) or not isinstance(threshold, int | float)
    ):
        raise BacoError(f"{PREFIX}threshold is {threshold!r}: give a number")
    if spelling is None:
        spelling = DEFAULT_ROUTER if threshold is None else DEFAULT_ROUTER.partition(":")[0]
    if not isinstance(spelling, str):
        raise BacoError(f"{PREFIX}router is {spelling!r}: give a spelling such as P-Punc:0.4")
    if named_files(spelling):
        raise BacoError(f"router {spelling!r} names a file, which vLLM's processes do not read")
    chosen = router(spelling, None if threshold is None else float(threshold))
    more = "the structure of the answer" if reads_structure(chosen) else further_reads(chosen)
    if more is not None:
        raise BacoError(f"router {spelling!r} reads {more}, which vLLM does not supply")
    if not portable(chosen):
        raise BacoError(
            f"router {spelling!r} exists in this process only: vLLM's processes know built-in "
            "rules and those of installed packages"
        )
    return chosen
