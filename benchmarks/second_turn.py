"""Time to the first token of the next turn of a long chat, with and without kept prefixes.

    python -m benchmarks.second_turn [PAIR] [--tokens 2000] [--turns 3] [--json]

The same conversation is held twice, turn by turn in alternation: once by a `Baco` that keeps
prefixes, and once by one that does not. Both answer with the same tokens, up to ties in bfloat16;
the conversation continues the first one's. A third time, the new message is asked alone.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baco import Baco
from baco.bench.measure import machine
from benchmarks import launch

PASSAGE = (
    "The ferry to the island left an hour late, and the rain had not stopped since the morning. "
    "Anna read the letter again, folded it twice, and looked for the harbour in the fog. "
)
QUESTIONS = (
    "How does the story go on?",
    "Who is waiting for Anna at the harbour?",
    "What did the letter say?",
    "Give the story a title and tell me why it fits.",
)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the chat.

    Attributes:
        prompt: tokens of the conversation, as the aligned model reads it.
        cached: those of them that were kept and not read.
        kept, reread, alone: seconds to the first token: with kept prefixes, without, and of the new
            message as a conversation of its own.
        same: whether both answers have the same tokens.
    """

    prompt: int
    cached: int
    kept: float
    reread: float
    alone: float
    same: bool


def chat(kept: Baco, reread: Baco, tokens: int, turns: int, router: str, answer: int) -> list[Turn]:
    """Hold a conversation whose first message has about so many tokens."""
    assert kept.prefix_cache is not None
    once, twice = (len(kept.pair.renderer.render(PASSAGE * times).aligned_ids) for times in (1, 2))
    story = PASSAGE * max(1, round(tokens / (twice - once)))
    history = [{"role": "user", "content": f"{story}\n\n{QUESTIONS[0]}"}]
    rows = []
    for number in range(turns):
        sampling: dict[str, Any] = {"router": router, "seed": number, "max_tokens": answer}
        message = history[-1:]
        alone, _ = _first_token(reread, message, sampling)
        before = kept.prefix_cache.hits["aligned"]
        kept_seconds, answered = _first_token(kept, history, sampling)
        cached = kept.prefix_cache.hits["aligned"] - before
        reread_seconds, again = _first_token(reread, history, sampling)
        rows.append(
            Turn(
                len(kept.pair.renderer.render(history).aligned_ids),
                cached,
                kept_seconds,
                reread_seconds,
                alone,
                answered.token_ids == again.token_ids,
            )
        )
        question = QUESTIONS[(number + 1) % len(QUESTIONS)]
        history += [
            {"role": "assistant", "content": answered.text},
            {"role": "user", "content": question},
        ]
    return rows


def _first_token(
    baco: Baco, history: list[dict[str, str]], sampling: dict[str, Any]
) -> tuple[float, Any]:
    """Seconds until the first token, and the completion."""
    start, first, completion = time.perf_counter(), 0.0, None
    for chunk in baco.stream(history, **sampling):
        first = first or time.perf_counter() - start
        completion = chunk.completion or completion
    return first, completion


def table(rows: Sequence[Turn]) -> str:
    """The turns as a table in Markdown."""
    lines = [
        "| turn | tokens of the prompt | kept | first token, s | without | new message alone | "
        "same answer |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(rows, 1):
        lines.append(
            f"| {number} | {row.prompt:,} | {row.cached:,} | {row.kept:.2f} | {row.reread:.2f} | "
            f"{row.alone:.2f} | {'yes' if row.same else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pair", nargs="?", help="short name or folder; by default the demo pair")
    parser.add_argument("--base", help="base model, with --aligned in place of a pair")
    parser.add_argument("--aligned")
    parser.add_argument("--dtype")
    parser.add_argument("--router", default="P-Punc:0.3")
    parser.add_argument("--tokens", type=int, default=2000, help="of the first message")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer, at most")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    kept = Baco.load(options.pair, base=options.base, aligned=options.aligned, dtype=options.dtype)
    kept.generate("Hello", router=options.router, max_tokens=4)
    reread = Baco(kept.pair, enable_prefix_caching=False)
    rows = chat(kept, reread, options.tokens, options.turns, options.router, options.answer)
    if options.json:
        device = machine(kept.pair.aligned.device)
        print(json.dumps({"machine": device, "turns": [asdict(row) for row in rows]}))
    else:
        print(table(rows))


if __name__ == "__main__":
    launch(main)
