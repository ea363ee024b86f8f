"""Arrow and Parquet tables, folders of `Dataset.save_to_disk`, and data sets of the hub."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.containers.rows import CHUNK, HTML, MAX_LINE_BYTES, Row, html_error
from pipeline.errors import UserError, first_line, install_command

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes that a Parquet column may become in a row group: 64 MiB, or 1000 times its own; and those of
# its dictionary.
MAX_COLUMN, MAX_COLUMN_RATIO, MAX_DICTIONARY = 2**26, 1000, 2**23
TABLE_ROWS = 64  # converted to Python at a time
SAVED = "dataset_info.json"

# (path, start) → the batches of the rows after the first `start`
Batches = Callable[[Path, int], Iterator["pa.RecordBatch"]]


def table_rows(path: Path, name: str, batches: Batches, start: int = 0) -> Iterator[Row]:
    """The rows of an Arrow or Parquet file after the first `start`.

    Raises UserError for a damaged one.
    """
    import pyarrow as pa

    with path.open("rb") as file:  # a missing file fails here, with a shorter error than pyarrow's
        head = file.read(CHUNK)
    if HTML.match(head.decode("latin-1")):
        raise html_error(name)
    number = start
    try:
        for batch in batches(path, start):
            for first in range(0, batch.num_rows, TABLE_ROWS):
                for value in batch.slice(first, TABLE_ROWS).to_pylist():
                    number += 1
                    yield Row(number, _row_of_table(value))
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        where = f" after row {number}" if number else ""
        kind, reason = path.suffix.lower().removeprefix("."), first_line(error).rstrip(".")
        raise UserError(
            f"{name}: not a readable {kind} file{where}: {reason}. Download or write it again."
        ) from None


def _row_of_table(value: dict[str, Any]) -> dict[str, Any]:
    """A row's value. Structs inside it lose their keys without a value, as in JSON.

    A table has every key in every struct.
    """
    return {
        key: _without_nulls(part) if isinstance(part, list | dict) else part
        for key, part in value.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def count_rows(path: Path, name: str) -> int:
    """The number of rows of a table, from its metadata. Raises UserError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                return int(file.metadata.num_rows)
        with pa.memory_map(str(path)) as source:
            return sum(batch.num_rows for batch in _arrow_reader(source))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{name}: cannot be read: {reason}. Download or write it again.") from None


def _behind(batches: Iterator["pa.RecordBatch"], start: int) -> Iterator["pa.RecordBatch"]:
    """The rows of `batches` after the first `start`."""
    for batch in batches:
        if start < batch.num_rows:
            yield batch.slice(start)
        start = max(0, start - batch.num_rows)


def _parquet_batches(path: Path, start: int) -> Iterator["pa.RecordBatch"]:
    from pyarrow import parquet

    # Without pre-buffering, which reads a whole row group.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK) as file:
        _refuse_parquet_bombs(path, file.metadata)
        groups = [*range(file.num_row_groups)]
        while groups and start >= (rows := file.metadata.row_group(groups[0]).num_rows):
            start -= rows
            del groups[0]
        if groups:
            yield from _behind(
                file.iter_batches(TABLE_ROWS, row_groups=groups, use_threads=False), start
            )


def _refuse_parquet_bombs(path: Path, metadata: Any) -> None:
    """Raises UserError for a column, or a dictionary of texts, that unpacks to far too much.

    Writers keep a dictionary at 1 MiB. Each row that refers to one of its entries gets a copy of
    it: 64 rows with the same large text are 64 large texts.
    """
    advice = "Write it again with pyarrow or pandas if you trust it."
    with path.open("rb") as file:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
                where = f"{path.name}: the column {column.path_in_schema}"
                if unpacked > max(MAX_COLUMN, MAX_COLUMN_RATIO * packed):
                    raise UserError(f"{where} unpacks {packed:,} bytes to {unpacked:,}. {advice}")
                if column.has_dictionary_page and column.dictionary_page_offset is not None:
                    file.seek(column.dictionary_page_offset)
                    size = _page_size(file.read(24))
                    if size is None:
                        raise ValueError(f"the column {column.path_in_schema} is damaged")
                    if size > MAX_DICTIONARY:
                        limit = f"{MAX_DICTIONARY:,} bytes, got {size:,}"
                        raise UserError(
                            f"{where} must have a dictionary of at most {limit}. {advice}"
                        )


def _page_size(header: bytes) -> int | None:
    """The bytes that a Parquet page unpacks to, by the fields 1 and 2 of its Thrift header.

    None for a header that is damaged, or written in a longer form than any writer's.
    By hand, as the file's metadata has only its packed size, which may be a thousandth of it.
    """
    position = 0
    for _ in ("type", "size"):
        if header[position : position + 1] != b"\x15":  # the next field, of 32 bits
            return None
        value, shift, position = 0, 0, position + 1
        while position < len(header):
            value |= (header[position] & 127) << shift
            shift, position = shift + 7, position + 1
            if header[position - 1] < 128:
                break
    return value >> 1  # zigzag, of a number that is not negative


def _arrow_batches(path: Path, start: int) -> Iterator["pa.RecordBatch"]:
    """The batches of an Arrow file: the file format (Feather), or `datasets`' stream format."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        for batch in _behind(_arrow_reader(source), start):
            # wrong offsets in a file of others would read outside its memory
            batch.validate(full=True)
            yield batch


def _arrow_reader(source: Any) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    return (
        (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else iter(reader)
    )


def saved_rows(folder: Path, name: str) -> Iterator[Row]:
    """The rows of a folder of `Dataset.save_to_disk`; the split `train` of a `DatasetDict`'s."""
    advice = "Name a file, or a folder of `Dataset.save_to_disk`."
    if (folder / "dataset_dict.json").is_file():
        splits = _read_small_json(folder / "dataset_dict.json", name).get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise UserError(
                f"{name}: a DatasetDict without the split train. It has: "
                f"{', '.join(map(str, splits or []))}. Name the folder of one split."
            )
        folder = folder / "train"
    if not (folder / "state.json").is_file():
        raise UserError(f"{name}: this folder is no data set: it has no state.json. {advice}")
    parts = _read_small_json(folder / "state.json", name).get("_data_files")
    parts = parts if isinstance(parts, list) else []
    files = [str(part.get("filename")) for part in parts if isinstance(part, dict)]
    if not files or any(Path(file).name != file for file in files):
        raise UserError(f"{name}: its state.json names no data files in the folder. {advice}")
    number = 0
    for file in files:
        for row in table_rows(folder / file, f"{name}/{file}", _arrow_batches):
            number += 1
            yield Row(number, row.value)


def _read_small_json(path: Path, name: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(MAX_LINE_BYTES))
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: {path.name} is not JSON. Save the data set again.")
    return tree


def hub_rows(id_: str, name: str, revision: str | None, split: str | None) -> Iterator[Row]:
    """The rows of a data set of the hub, from the cache of `datasets` or downloaded into it."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{id_}: no such file, and data sets of the hub need the datasets library. Run "
            f"`{install_command('datasets')}`, or name a file that exists."
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        loaded = datasets.load_dataset(name, revision=revision, split=split)
    except Exception as error:  # whatever the library raises
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"{id_}: no such file, and it cannot be loaded from the hub: {reason}. Check the "
            "name and the connection, or name a file that exists."
        ) from None
    if isinstance(loaded, dict):
        if "train" not in loaded:
            choices = ", ".join(f"{id_}[{key}]" for key in loaded)
            raise UserError(f"{id_}: it has no split train. Name one: {choices}.")
        loaded = loaded["train"]
    number = 0
    for table in loaded.with_format("arrow").iter(batch_size=TABLE_ROWS):
        for value in table.to_pylist():
            number += 1
            yield Row(number, _row_of_table(value))


TABLES: dict[str, Batches] = {
    ".parquet": _parquet_batches,
    ".arrow": _arrow_batches,
    ".feather": _arrow_batches,
}
