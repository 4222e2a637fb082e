"""One prompt's answers as a JSON object, for ``--json`` and ``--jsonl`` alike."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baco import Baco, Completion


def record(
    prompt: Any,
    baco: "Baco",
    settings: Mapping[str, Any],
    completions: "Sequence[Completion]",
    *,
    timed: bool = False,
) -> dict[str, Any]:
    """``prompt``, ``pair``, ``weights``, ``router``, ``seed``, ``params`` and ``samples``.

    Speed comes only where ``timed``: a file of many prompts leaves it out, so that a resumed run
    writes the same bytes.
    """
    first = completions[0]
    made: dict[str, Any] = {
        "prompt": prompt,
        "pair": baco.pair.name,
        "weights": baco.pair.held,
        "router": first.router,
        "seed": first.seed,
        "params": params(baco, settings) | ({"date": first.date} if first.date else {}),
        "samples": [
            {
                "text": c.text,
                "token_ids": list(c.token_ids),
                "sources": list(c.sources),
                # JSON has no NaN, which stands for what a server does not tell.
                "logprobs": [None if isnan(x) else round(x, 5) for x in c.logprobs],
                "base_share": round(c.base_share, 5),
                "switches": c.switches,
                "finish_reason": c.finish_reason,
            }
            | ({"error": c.error} if c.error is not None else {})
            for c in completions
        ],
    }
    if timed:
        tokens = sum(len(c.token_ids) for c in completions)
        made["tokens_per_second"] = round(tokens / max(c.seconds for c in completions), 1)
    return made


def params(baco: "Baco", settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but prompt, pair, router and seed that the answers hang on, the pair's own too."""
    beside = {name: settings[name] for name in ("system", "switch")}
    sampling = {name: value for name, value in settings.items() if name not in beside}
    every = asdict(baco.pair.defaults.updated(sampling)) | beside
    if arguments := baco.pair.renderer.chat_options:
        every["template_args"] = dict(arguments)
    return {name: value for name, value in every.items() if name not in ("seed", "logprobs")}
