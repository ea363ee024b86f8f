"""Data files in every container, written by other libraries than those that read them here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import csv, feather, parquet

Records = list[dict[str, Any]]


def write_arrow(records: Records, path: Path, new: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def compressed(text: str, path: Path) -> None:
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[path.suffix]) as file:
        file.write(text.encode())


def json_lines(records: Records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_csv(records: Records, path: Path, delimiter: str) -> None:
    """By pyarrow, not by the module that reads."""
    options = csv.WriteOptions(delimiter=delimiter, quoting_style="all_valid")
    csv.write_csv(pa.Table.from_pylist(records), path, options)


WRITERS: dict[str, Callable[[Records, Path], object]] = {
    "d.jsonl": lambda records, path: path.write_text(json_lines(records), encoding="utf-8"),
    "d.jsonl.gz": lambda records, path: compressed(json_lines(records), path),
    "d.JSONL.zst": lambda records, path: compressed(json_lines(records), path.with_suffix(".zst")),
    "d.json": lambda records, path: path.write_text(
        json.dumps(records, indent=1), encoding="utf-8"
    ),
    "d.json.gz": lambda records, path: compressed(json.dumps(records), path),
    "d.parquet": lambda records, path: parquet.write_table(
        pa.Table.from_pylist(records), path, row_group_size=5
    ),
    "d.arrow": lambda records, path: write_arrow(records, path, pa.ipc.new_stream),
    "e.arrow": lambda records, path: write_arrow(records, path, pa.ipc.new_file),
    "d.feather": lambda records, path: feather.write_feather(
        pa.Table.from_pylist(records), str(path)
    ),
    "saved": lambda records, path: datasets.Dataset.from_list(records).save_to_disk(
        path, num_shards=2
    ),
    "splits": lambda records, path: datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(records),
            "test": datasets.Dataset.from_list(records[:1]),
        }
    ).save_to_disk(path),
}
TEXT_WRITERS = WRITERS | {
    "d.csv": lambda records, path: write_csv(records, path, ","),
    "d.tsv": lambda records, path: write_csv(records, path, "\t"),
}
datasets.disable_progress_bars()
