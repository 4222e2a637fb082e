"""``model.generate(..., custom_generate=...)`` of `transformers`: a model answers with its base.

The folder ``hub`` beside this file is what `transformers` loads. Its ``generate.py`` only imports
`generate` from here, so the code that runs is that of the installed `baco`.
"""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from baco.errors import BacoError
from baco.integrations.transformers import as_transformers
from baco.models.known_pairs import KnownPair, choose_pair, known_pairs
from baco.models.loading import Placement, check_model, load_model, load_tokenizer
from baco.models.model import PairModel
from baco.models.pair import Pair, make_known_pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from baco.routing.router import Router

# The attribute of the user's model that keeps its pairs, so that they are freed with it.
_KEPT = "_baco_pairs"


class _Pairs(dict[Any, Pair]):
    """The pairs of a model, by base model and tokenizers. A copy of the model has none."""

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


def custom_generate_folder() -> str:
    """The folder to pass as ``custom_generate``, or to upload as a repository of the hub."""
    return str(resources.files("baco").joinpath("integrations", "transformers", "hub"))


def generate(
    model: "PreTrainedModel",
    *,
    base_model: "str | Path | PreTrainedModel | None" = None,
    router: "str | Router | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    base_tokenizer: "PreTrainedTokenizerBase | None" = None,
    base_prompt: Literal["auto", "same"] = "auto",
    **arguments: Any,
) -> Any:
    """``generate()`` of `transformers` by a model and its base model under a router.

    Args:
        model: the aligned model.
        base_model: the base model, or its hub id or folder. One that is named is loaded on the
            device and in the number format of ``model``, and kept as long as ``model``.
        router: a spelling such as ``"P-Punc:0.4"``, a router, or None for the pair's own default.
        tokenizer: the aligned model's; by default it is loaded from where the model was.
        base_tokenizer: the base model's, likewise.
        base_prompt: see :func:`baco.as_transformers`.
        arguments: of ``generate()``.

    Returns:
        What ``generate()`` of the model of :func:`baco.as_transformers` returns.

    Raises:
        BacoError: no base model, a router that cannot run here, or models that are no pair.
    """
    training = model.training
    pair = _pair(model, base_model, tokenizer, base_tokenizer)
    try:
        routed = as_transformers(pair, router, base_prompt=base_prompt)
        return routed.generate(tokenizer=tokenizer, **arguments)
    finally:
        model.train(training)


def _pair(model: Any, base_model: Any, tokenizer: Any, base_tokenizer: Any) -> Pair:
    """The pair of a model and its base model, made at the first call with them."""
    if base_model is None:
        raise BacoError("no base model: give generate() base_model=, a model, hub id or folder")
    if isinstance(base_model, Path):
        base_model = str(base_model)
    pairs: _Pairs = vars(model).setdefault(_KEPT, _Pairs())
    key = (
        base_model if isinstance(base_model, str) else id(base_model),
        id(tokenizer),
        id(base_tokenizer),
    )
    if key not in pairs:
        aligned = _model(model, tokenizer, "tokenizer")
        if isinstance(base_model, str):
            check_model(base_model)
            base_tokenizer = base_tokenizer or load_tokenizer(base_model)
            loaded = load_model(base_model, Placement(model.device, model.dtype))
            base = PairModel(base_model, loaded, base_tokenizer)
        else:
            base = _model(base_model.eval(), base_tokenizer, "base_tokenizer")
        pairs[key] = make_known_pair(_known_pair(base.name, aligned.name), base, aligned)
    return pairs[key]


def _model(model: Any, tokenizer: Any, argument: str) -> PairModel:
    """A loaded model with its tokenizer, by default the one in its own folder or repository."""
    name = getattr(model, "name_or_path", "")
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(name)
        except BacoError as error:
            raise BacoError(
                f"{name or 'the model'} has no tokenizer beside it: give generate() {argument}="
            ) from error
    return PairModel(name or type(model).__name__, model, tokenizer)


def _known_pair(base: str, aligned: str) -> KnownPair:
    """The pair of two names, with its own settings where it has a short name."""
    pairs = {(pair.base, pair.aligned): pair for pair in known_pairs()}
    return pairs.get((base, aligned)) or choose_pair(None, base, aligned)
