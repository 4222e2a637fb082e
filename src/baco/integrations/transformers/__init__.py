"""A pair as a `transformers` model, for everything that takes one."""

from typing import TYPE_CHECKING, Literal

from baco.errors import BacoError

if TYPE_CHECKING:
    from baco.api import Baco
    from baco.integrations.transformers.model import BacoForCausalLM
    from baco.models.pair import Pair
    from baco.routing.router import Router


def as_transformers(
    pair: "Pair | Baco",
    router: "str | Router | None" = None,
    *,
    seed: int | None = None,
    base_prompt: Literal["auto", "same"] = "auto",
) -> "BacoForCausalLM":
    """A pair with a router as a `transformers` model.

    Args:
        pair: a [`Baco`][baco.Baco] or its ``pair``.
        router: a spelling such as ``"P-Punc:0.4"``, a router, or None for the pair's own default.
        seed: of the coins of ``Rand``; None takes a random seed. Tokens are drawn by `transformers`
            itself, from torch's generator.
        base_prompt: ``"auto"``: if the input is a rendering of the aligned model's chat template,
            the base model reads the same conversation as plain text; otherwise both models read
            the input as it is. ``"same"``: both always read the input as it is.

    Returns:
        A ``PreTrainedModel`` for ``pair.tokenizer``'s token ids, with ``generate()``.

    Raises:
        BacoError: an unknown router or ``base_prompt``.
    """
    from baco.api import Baco
    from baco.integrations.transformers.chat import ChatReader
    from baco.integrations.transformers.model import BacoForCausalLM
    from baco.routing.combiners import Combination
    from baco.routing.router import further_reads

    if base_prompt not in ("auto", "same"):
        raise BacoError(f"base_prompt is {base_prompt!r}: give 'auto' or 'same'")
    baco = pair if isinstance(pair, Baco) else Baco(pair)
    pair, rule = baco.pair, baco.router(router)
    if isinstance(rule, Combination):
        raise BacoError(
            f"the transformers object runs routers, not the combiner {rule.spelling}: use a "
            "router, or Baco.generate"
        )
    pair.check_one_tokenizer("the transformers object")
    if (more := further_reads(rule)) is not None:
        raise BacoError(
            f"the transformers object cannot run {rule.spelling}, which reads {more}: use "
            "Baco.generate, or another router"
        )
    reader = ChatReader(pair.renderer) if base_prompt == "auto" else None
    return BacoForCausalLM(pair, rule, seed=seed, reader=reader)
