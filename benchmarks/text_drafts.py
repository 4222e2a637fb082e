"""How many forwards n-gram drafts could save on a pair with different tokenizers.

    python -m benchmarks.text_drafts --base FOLDER --aligned FOLDER [-r P-Punc:0.4] [-n 8]

Answers are decoded without drafts and read again token by token. Each model has a table of n-grams
of its prompt and of all samples so far, in its own ids, as the engine of pairs with one tokenizer
has. Where a model wrote two tokens in a row, a draft could have saved the forward between them:
*predicted*, if the table's most frequent next token is the second one; *possible*, if the table has
the second one at all, which no drafter over these n-grams can exceed. A forward of a batch is only
saved where all its rows have an accepted draft.
"""

from collections import Counter
from typing import Any

from baco import Baco
from baco.engine.speculative.ngram import CONTEXTS, NgramTable
from baco.source import MODELS
from baco.text.shared_text import EncodingStats, OwnTokens
from benchmarks import launch
from benchmarks.two_tokenizers import PROMPTS, argument_parser


def count(baco: Baco, prompt: str, router: str, n: int, options: dict[str, Any]) -> Counter[str]:
    """The tokens of the answers to a prompt, and those that drafts could have supplied."""
    own, counts, stats = baco.pair.own_vocabularies, Counter[str](), EncodingStats()
    assert own is not None
    rendered = baco.pair.renderer.render(prompt)
    answers = baco.generate(prompt, router=router, n=n, seed=1, **options)
    ids = [{source: OwnTokens(own[source].tokenizer) for source in MODELS} for _ in answers]
    texts = [b"" for _ in answers]
    tables = {source: NgramTable() for source in MODELS}
    tables["base"].add_prompt(rendered.base_ids, len(rendered.base_ids))
    tables["aligned"].add_prompt(rendered.aligned_ids, len(rendered.aligned_ids))
    for at in range(max(len(answer.token_ids) for answer in answers)):
        for row, answer in enumerate(answers):
            if at >= len(answer.token_ids):
                continue
            token, source = answer.token_ids[at], answer.sources[at]
            assert source is not None
            reader, table = ids[row][source], tables[source]
            known = len(reader.ids)
            reader.read(texts[row], stats)
            counts["tokens"] += 1
            if at and answer.sources[at - 1] == source:
                counts["in a row"] += 1
                tail = [-1] * CONTEXTS[0] + reader.ids
                followers: set[int] = set()
                for size in CONTEXTS:
                    followers |= table.counts.get(tuple(tail[-size:]), {}).keys()
                counts["predicted"] += table.predict(tail, lambda _: 0.0, 0.0) == token
                counts["possible"] += token in followers
            reader.draw(token)
            table.add(reader.ids, max(len(reader.ids) - known, 1))
            texts[row] += own[source].tokenizer.data[token]
    return counts


def main() -> None:
    """Measure and print."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("-t", "--temperature", type=float, nargs="+", default=[0.0, 1.0])
    given = parser.parse_args()
    baco = Baco.load(base=given.base, aligned=given.aligned, separate_tokenizers=True)
    for temperature in given.temperature:
        for n in given.n if temperature else [1]:
            options = {"temperature": temperature, "max_tokens": given.max_tokens}
            counts = sum(
                (count(baco, prompt, given.router, n, options) for prompt in PROMPTS),
                Counter[str](),
            )
            tokens = counts["tokens"]
            shares = (
                f"{name} {counts[name]} ({counts[name] / tokens:.1%})"
                for name in ("in a row", "predicted", "possible")
            )
            print(f"t={temperature:g} n={n}  tokens {tokens}  {'  '.join(shares)}", flush=True)


if __name__ == "__main__":
    launch(main)
