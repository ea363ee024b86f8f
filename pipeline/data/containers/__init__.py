"""Data files and folders as numbered raw rows, in constant memory.

Text containers (.txt, .jsonl, .json, .csv, .tsv) may also be compressed (.gz, .zst). Tables are
.parquet, .arrow and .feather files, folders of `Dataset.save_to_disk`, and data sets of the hub.
Every problem is a UserError with the file and, where there is one, the line or row.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.containers import json_list, lines
from pipeline.data.containers.rows import CHUNK, MAX_LINE_BYTES, Reading, Row, describe_type
from pipeline.data.containers.tables import SAVED, TABLES, hub_rows, saved_rows, table_rows
from pipeline.errors import UserError, first_line

__all__ = [
    "COMPRESSED",
    "MAX_LINE_BYTES",
    "READERS",
    "SAVED",
    "TABLES",
    "Reading",
    "Row",
    "describe_type",
    "is_hub_id",
    "read_rows",
    "suffix_of",
]

# Bytes that a compressed file may become: a GiB, or 200 times its own. Text becomes 3 to 20 times
# as long.
MAX_UNPACKED, MAX_RATIO = 2**30, 200
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?:\[(?P<split>[^\[\]]+)\])?",
    flags=re.ASCII,
)
READERS: dict[str, Callable[[BinaryIO, str, Reading], Iterator[Row]]] = {
    ".txt": lines.text_rows,
    ".jsonl": lines.jsonl_rows,
    ".json": json_list.json_rows,
    ".csv": partial(lines.delimited_rows, delimiter=","),
    ".tsv": partial(lines.delimited_rows, delimiter="\t"),
}


def read_rows(
    path: Path, name: str, reading: Reading | None = None, start: int = 0
) -> Iterator[Row]:
    """The rows of a file or folder, or of the hub's data set `name` if `path` does not exist.

    `name` is the path as the user wrote it. `start`: the rows of a table that are skipped, without
    decoding them. Raises UserError.
    """
    reading = reading or Reading()
    suffix, compression = suffix_of(path)
    try:
        if not path.exists() and (match := _match_hub_id(name)):
            rows = hub_rows(name, **match.groupdict())
        elif path.is_dir():
            rows = saved_rows(path, name)
        elif suffix in TABLES and not compression:
            rows = table_rows(path, name, TABLES[suffix], start)
        elif suffix in READERS:
            if suffix == ".json" and path.stat().st_size > json_list.MAX_JSON_BYTES:
                raise json_list.too_large(name)
            with _opened(path, name, compression) as file:
                yield from _refuse_empty(READERS[suffix](file, name, reading), name, reading)
            return
        else:
            raise UserError(
                f"{name}: a data file must be {', '.join([*READERS, *TABLES])}, or a save_to_disk "
                "folder."
            )
        yield from rows if start else _refuse_empty(rows, name, reading)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{name}: {reason}. Name a file that exists.") from None


def suffix_of(path: Path) -> tuple[str, str]:
    """(".jsonl", "gzip") of mine.JSONL.gz, (".txt", "") of mine.txt."""
    compression = COMPRESSED.get(path.suffix.lower(), "")
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def is_hub_id(name: str) -> bool:
    """Whether `name` is of the form org/name, org/name@revision or org/name[split]."""
    return _match_hub_id(name) is not None


def _match_hub_id(name: str) -> re.Match[str] | None:
    suffix, _ = suffix_of(Path(name))
    return None if suffix in (*READERS, *TABLES) else HUB_ID.fullmatch(name)


def _refuse_empty(rows: Iterator[Row], name: str, reading: Reading) -> Iterator[Row]:
    first = next(rows, None)
    if first is None and not reading.refused:
        raise UserError(f"{name}: the file is empty. Write one example per line or row.")
    return chain([first] if first else [], rows)


@contextmanager
def _opened(path: Path, name: str, compression: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed piece by piece. Raises UserError for broken compression."""
    with path.open("rb") as file:  # also for its error, which is shorter than pyarrow's
        if not compression:
            yield file
            return
    import pyarrow as pa

    try:
        most = max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)
        stream = pa.input_stream(str(path), compression=compression)
        with io.BufferedReader(_Unpacked(stream, most, name), CHUNK) as unpacked:
            yield unpacked
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{name}: broken {compression} data: {first_line(error)}. Compress the file again."
        ) from None


class _Unpacked(io.RawIOBase):
    """A stream of decompressed bytes. Raises UserError when there are more than `most`."""

    def __init__(self, stream: Any, most: int, name: str) -> None:
        self._stream, self._left, self._name = stream, most, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._stream.readinto(buffer))
        self._left -= count
        if self._left < 0:
            raise UserError(
                f"{self._name}: it unpacks to more than {MAX_RATIO} times its size, and more than "
                f"{MAX_UNPACKED // 2**30} GiB. Unpack it yourself if you trust it."
            )
        return count
