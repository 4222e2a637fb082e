"""One prompt's answers as a JSON object, for ``--json`` and ``--jsonl`` alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baco import Baco, Completion


def record(
    prompt: Any, baco: "Baco", completions: "Sequence[Completion]", *, timed: bool = False
) -> dict[str, Any]:
    """``prompt``, ``pair``, ``router``, ``seed`` and ``samples``; speed only where ``timed``.

    A file of many prompts leaves speed out, so that a resumed run writes the same bytes.
    """
    first = completions[0]
    made: dict[str, Any] = {
        "prompt": prompt,
        "pair": baco.pair.name,
        "router": first.router,
        "seed": first.seed,
        "samples": [
            {
                "text": c.text,
                "token_ids": list(c.token_ids),
                "sources": list(c.sources),
                "logprobs": [round(value, 5) for value in c.logprobs],
                "base_share": round(c.base_share, 5),
                "switches": c.switches,
                "finish_reason": c.finish_reason,
            }
            for c in completions
        ],
    }
    if timed:
        tokens = sum(len(c.token_ids) for c in completions)
        made["tokens_per_second"] = round(tokens / max(c.seconds for c in completions), 1)
    return made
