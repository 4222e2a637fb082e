"""Whole words where the models have different tokenizers.

The models share text, and each reads word starts and roles off its own vocabulary. White space and
unfinished characters at the end of the text begin the next word, so the model that wrote them
writes the word. A position is a boundary if it is the first, or if the text does not end so and the
active source's most likely next token is a word start. A new source inside a text may write only
word starts of its own vocabulary.
"""

from baco.errors import BacoError
from baco.routing.parser import Entry, catalogue
from baco.routing.parser import router as parse
from baco.routing.router import Router, RuleRouter, hidden_widths, is_stateful
from baco.source import Source


def is_boundary(*, first: bool, text_is_open: bool, starts_word: bool) -> bool:
    """Whether the router decides.

    Args:
        first: nothing of the answer is written.
        text_is_open: it ends in white space or inside a character.
        starts_word: the active source's most likely next token is a word start.
    """
    return first or (starts_word and not text_is_open)


def reads_one_model(router: Router) -> bool:
    """Whether a router reads quantities of one model, or of each alone, and compares none."""
    if isinstance(router, RuleRouter):
        return router.logit is None or len(router.logit.models) < 2
    return len(router.reads) < 2


def read_model(router: Router) -> Source:
    """The model whose vocabulary a router reads roles from."""
    return next(iter(router.reads)) if len(router.reads) == 1 else "base"


def catalogue_for(*, one_tokenizer: bool) -> list[Entry]:
    """The routers of the catalogue that can decode a pair, with one tokenizer or with two."""
    entries = catalogue()
    return entries if one_tokenizer else [e for e in entries if shares_text(parse(e.example))]


def shares_text(router: Router) -> bool:
    """Whether a router can decode a pair with two tokenizers."""
    try:
        check_router(router)
    except BacoError:
        return False
    return True


def check_router(router: Router) -> None:
    """Refuse a router that compares the distributions of both models.

    Raises:
        BacoError: it reads quantities of both, which are over different vocabularies, or it reads
            the tokens of the answer so far, or hidden states.
    """
    if is_stateful(router):
        raise BacoError(
            f"{router.spelling} reads the tokens of the answer so far, which two tokenizers do not "
            "share: use a rule that reads one model, such as P, H or Punc"
        )
    if hidden_widths(router):
        raise BacoError(
            f"{router.spelling} reads hidden states, which pairs of two tokenizers do not supply: "
            "use a rule that reads one model, such as P, H or Punc"
        )
    if not reads_one_model(router):
        raise BacoError(
            f"{router.spelling} compares the distributions of both models, which have different "
            "tokenizers: use a rule that reads one model, such as P, H or Punc"
        )
