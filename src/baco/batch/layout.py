"""The columns and the card of a dataset: one row per answer, with its provenance.

Columns have the same types in all shards, so that `datasets` and pandas read shards in any order.
The card declares them in the YAML header of a ``README.md``, as on the Hugging Face hub.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baco.batch.rows import Row
from baco.outputs import Completion
from baco.text.answer_text import merge_pieces
from baco.text.prompts import conversation

Type = str | Mapping[str, str]

MESSAGE = {"role": "string", "content": "string"}
SPAN = {"start": "int64", "end": "int64", "source": "string"}
# The types of columns by the datasets library's names; a mapping is a list of structs.
PROMPT: dict[str, Type] = {"row": "int64", "id": "string", "sample": "int64", "prompt": "string"}
ANSWER: dict[str, Type] = {
    "answer": "string",
    "thinking": "string",
    "finish_reason": "string",
    "error": "string",
    "base_share": "float64",
    "switches": "int64",
    "tokens": "int64",
    "logprob": "float64",
    "spans": SPAN,
    "pair": "string",
    "router": "string",
    "seed": "int64",
    "params": "string",
}
INT64 = range(-(2**63), 2**63)
VERSIONS = ("baco", "torch", "transformers")
LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a dataset; plain data, which is sent to other machines.

    Attributes:
        inputs: the columns of the input by their names in the dataset: a column whose name the
            dataset uses itself has ``input_`` before it.
        types: of these, by their names in the dataset.
        has_messages: whether any prompt is a list of messages.
    """

    inputs: Mapping[str, str]
    types: Mapping[str, str]
    has_messages: bool

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Layout":
        """The columns for these rows, in the order in which they appear."""
        has_messages = any(not isinstance(row.prompt, str) for row in rows)
        own = _columns(has_messages, {})
        inputs: dict[str, str] = {}
        # A column that keeps its name goes first: another must not take it.
        found = dict.fromkeys(name for row in rows for name in row.columns)
        for column in sorted(found, key=lambda name: name in own):
            name = column
            while name in own or name in inputs:
                name = f"input_{name}"
            inputs[name] = column
        inputs = {name: column for column in found for name in inputs if inputs[name] == column}
        types = {
            name: _type([row.columns.get(column) for row in rows])
            for name, column in inputs.items()
        }
        return cls(inputs, types, has_messages)

    @property
    def columns(self) -> dict[str, Type]:
        """All columns with their types."""
        return _columns(self.has_messages, self.types)

    def rows(
        self,
        records: Sequence[Mapping[str, Any]],
        rows: Sequence[Row],
        answers: Sequence[Sequence[Completion]],
    ) -> Iterator[dict[str, Any]]:
        """A row per answer.

        Args:
            records: of :func:`baco.outputs.record`, each with ``row`` and ``id``.
            rows: the rows that were answered.
            answers: of each of them.
        """
        for record, row, completions in zip(records, rows, answers, strict=True):
            text = isinstance(row.prompt, str)
            messages = None if text else conversation(row.prompt)
            shared = {
                "prompt": row.prompt if text else None,
                **({"messages": messages} if self.has_messages else {}),
                **{
                    name: _cell(row.columns.get(column), self.types[name])
                    for name, column in self.inputs.items()
                },
            }
            for sample, completion in zip(record["samples"], completions, strict=True):
                logprob = math.fsum(completion.logprobs)
                yield {
                    "row": record["row"],
                    "id": str(record["id"]),
                    "sample": completion.sample,
                    **shared,
                    "answer": completion.text,
                    "thinking": completion.thinking or None,
                    "finish_reason": completion.finish_reason,
                    "error": completion.error,
                    "base_share": sample["base_share"],
                    "switches": sample["switches"],
                    "tokens": len(completion.token_ids),
                    "logprob": None if math.isnan(logprob) else round(logprob, 4),
                    "spans": _spans(completion),
                    "pair": record["pair"],
                    "router": record["router"],
                    "seed": record["seed"],
                    "params": json.dumps(record["params"], ensure_ascii=False),
                }

    def schema(self) -> Any:
        """The pyarrow schema; None where pyarrow is not installed."""
        try:
            import pyarrow as pa
        except ImportError:
            return None
        kinds = {
            "string": pa.string(),
            "int64": pa.int64(),
            "float64": pa.float64(),
            "bool": pa.bool_(),
            "json": pa.string(),
        }
        return pa.schema(
            [
                (
                    name,
                    kinds[kind]
                    if isinstance(kind, str)
                    else pa.list_(pa.struct([(key, kinds[of]) for key, of in kind.items()])),
                )
                for name, kind in self.columns.items()
            ]
        )


def _columns(has_messages: bool, inputs: Mapping[str, Type]) -> dict[str, Type]:
    """All columns with their types, those of the input between prompt and answer."""
    messages = {"messages": MESSAGE} if has_messages else {}
    return {**PROMPT, **messages, **inputs, **ANSWER}


def _type(values: Sequence[Any]) -> str:
    """The type of a column. Values of several types, lists, objects and whole numbers that 64 bits
    cannot hold become texts.
    """
    if any(type(value) is int and value not in INT64 for value in values):
        return "json"
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int64"
    if kinds and kinds <= {int, float}:
        return "float64"
    return "string" if kinds <= {str} else "json"


def _cell(value: Any, kind: str) -> Any:
    if value is None or kind in ("string", "bool", "int64"):
        return value
    if kind == "float64":
        return float(value) if math.isfinite(value) else None
    return json.dumps(value, ensure_ascii=False)


def _spans(completion: Completion) -> list[dict[str, Any]]:
    """Stretches of one source: from and to which character of the answer."""
    spans, start = [], 0
    for text, source in merge_pieces(completion.pieces):
        end = start + len(text)
        if text:
            spans.append({"start": start, "end": end, "source": source})
        start = end
    return spans


def card(manifest: Mapping[str, Any], layout: Layout) -> str:
    """The dataset card, with the columns in its YAML header.

    The licence is left to the user: it depends on both models and on the prompts.
    """
    settings, made = manifest["settings"], manifest["made"]
    title = f"Answers of {settings['pair']}"
    answers = settings["rows"] * settings["n"]
    header = [
        "# Choose one and remove the '#'; it depends on both models and on the prompts:",
        f"# {LICENCES}",
        "# license: …",
        f"pretty_name: {_yaml(title)}",
        "tags:",
        "- synthetic",
        "- baco",
        "configs:",
        "- config_name: default",
        f"  data_files: data/*.{settings['shards']}",
        "dataset_info:",
        "  features:",
        *(line for name, kind in layout.columns.items() for line in _feature(name, kind)),
    ]
    template = manifest.get("prompt_template")
    facts = {
        "pair": settings["pair"],
        "weights": ", ".join(f"{source} {form}" for source, form in settings["weights"].items()),
        "router": settings["router"],
        "seed": manifest["seed"],
        "prompts": settings["rows"],
        "answers per prompt": settings["n"],
        "versions": ", ".join(f"{k} {made[k]}" for k in VERSIONS if made.get(k)),
    }
    rows = "\n".join(f"| {name} | {_markdown(value)} |" for name, value in facts.items())
    command = made.get("command")
    return (
        "---\n"
        + "\n".join(header)
        + f"""
---

# {title}

{answers:,} answers to {settings["rows"]:,} prompts, written by a base model and its aligned sibling
together ([BACo](https://arxiv.org/abs/2511.05650)).

## How it was made

| | |
|---|---|
{rows}
"""
        + (f"\n{_fenced(command)}" if command else "")
        + (f"\nThe prompt template:\n\n{_fenced(template)}" if template else "")
        + """
## Columns

A row is one answer. `row` and `id` name its prompt; `sample` counts its answers from 0.
`answer` is the text; `finish_reason` is `stop`, `length` (cut off) or `error`. `spans` says which
model wrote which characters of the answer; `base_share` is the base model's share of the tokens.
`logprob` is the sum of the tokens' log-probabilities, in nats, each under the model that wrote it.
`pair`, `router`, `seed` and `params` give the same answer again.
"""
    )


def _feature(name: str, kind: Type) -> list[str]:
    """A column in the YAML header."""
    if isinstance(kind, str):
        # A JSON value is written as a text.
        return [f"  - name: {_yaml(name)}", f"    dtype: {'string' if kind == 'json' else kind}"]
    inner = [f"    - name: {key}\n      dtype: {of}" for key, of in kind.items()]
    return [f"  - name: {_yaml(name)}", "    list:", *inner]


def _yaml(text: str) -> str:
    """A text as a YAML scalar: YAML reads the quoted texts of JSON."""
    return json.dumps(text)


def _markdown(value: Any) -> str:
    """A value as a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _fenced(text: str) -> str:
    """A text as a block of code, whose fence is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}\n"
