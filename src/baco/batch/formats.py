"""Rows of answers as the bytes of a shard, in JSON lines or Parquet; the same bytes every time."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from baco.errors import BacoError

Format = Literal["jsonl", "parquet"]
FORMATS = get_args(Format)


def check_format(name: str) -> Format:
    """The format of a name.

    Raises:
        BacoError: no such format, or its library is not installed.
    """
    if name == "jsonl":
        return "jsonl"
    if name != "parquet":
        raise BacoError(f"format is {name!r}: use one of {', '.join(FORMATS)}")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise BacoError(
            "Parquet needs a library: pip install pyarrow, or give --format jsonl"
        ) from error
    return "parquet"


def encode(records: Sequence[Mapping[str, Any]], form: Format, columns: Any = None) -> bytes:
    """Records as a file.

    Args:
        records: of :func:`baco.outputs.record`, each with ``row`` and ``id``.
        form: of the file.
        columns: the pyarrow schema of other records, which are written as they are.
    """
    if form == "parquet":
        if columns is not None:
            return _parquet(records, columns)
        return _parquet([_flat(record) for record in records], schema())
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _parquet(records: Sequence[Mapping[str, Any]], columns: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(records, schema=columns)
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()


def schema() -> Any:
    """The schema of a Parquet shard: one row per prompt, with its samples nested."""
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    sample = pa.struct(
        [
            ("text", text),
            ("token_ids", pa.list_(pa.int32())),
            ("sources", pa.list_(text)),
            ("logprobs", pa.list_(pa.float32())),
            ("base_share", pa.float64()),
            ("switches", pa.int32()),
            ("finish_reason", text),
            ("thinking", text),
            ("thinking_tokens", pa.int32()),
            ("error", text),
        ]
    )
    return pa.schema(
        [
            ("row", whole),
            ("id", text),
            ("prompt", text),
            ("messages", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("pair", text),
            ("weights", pa.struct([("base", text), ("aligned", text)])),
            ("router", text),
            ("seed", whole),
            ("params", text),
            ("samples", pa.list_(sample)),
        ]
    )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record whose columns have one type each."""
    id_, prompt = record["id"], record["prompt"]
    chat = not isinstance(prompt, str)
    return {
        **record,
        "id": id_ if isinstance(id_, str) else json.dumps(id_, ensure_ascii=False),
        "prompt": None if chat else prompt,
        "messages": prompt if chat else None,
        "params": json.dumps(record["params"], ensure_ascii=False),
    }
