"""Writes a run as Parquet, for pandas, DuckDB and spreadsheets, from its JSONL files."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baco.errors import BacoError
from baco.evaluation.store import Run, batches
from baco.files import replacing

ROWS_A_GROUP = 2048


def export(run: Run) -> list[Path]:
    """Write samples.parquet and scores.parquet.

    Returns:
        Both paths.

    Raises:
        BacoError: the library is not installed.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise BacoError("Parquet needs a library: pip install 'baco[evaluation]'") from error
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    piece = pa.struct([("text", text), ("source", text)])
    key = [(name, text) for name in ("pair", "task", "prompt", "category", "method", "setting")]
    samples = pa.schema(
        [
            *key,
            ("threshold", number),
            ("sample", whole),
            ("text", text),
            ("pieces", pa.list_(piece)),
            ("tokens", whole),
            ("base_share", number),
            ("switches", whole),
            ("finish_reason", text),
            ("seed", whole),
        ]
    )
    scores = pa.schema([*key, ("threshold", number), ("metric", text), ("value", number)])
    return [
        _write(run.path / "samples.parquet", samples, _samples(run)),
        _write(run.path / "scores.parquet", scores, _scores(run)),
    ]


def _samples(run: Run) -> Iterator[dict[str, Any]]:
    for sample in run.samples():
        yield {
            **asdict(sample),
            "category": run.prompts()[sample.task, sample.prompt].category,
            "threshold": sample.value,
            "pieces": [{"text": text, "source": source} for text, source in sample.pieces],
        }


def _scores(run: Run) -> Iterator[dict[str, Any]]:
    swept = {(setting.method, setting.label): setting.value for setting in run.settings}
    for metric in run.metrics():
        for row in run.scores(metric):
            category = run.prompts()[row["task"], row["prompt"]].category
            threshold = swept[row["method"], row["setting"]]
            yield {**row, "category": category, "threshold": threshold, "metric": metric}


def _write(path: Path, schema: Any, rows: Iterable[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        replacing(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        for some in batches(rows, ROWS_A_GROUP):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
    return path
