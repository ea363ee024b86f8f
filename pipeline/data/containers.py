"""Data files and folders as numbered raw rows, in constant memory.

Text containers (.txt, .jsonl, .json, .csv, .tsv) may also be compressed (.gz, .zst). Tables are
.parquet, .arrow and .feather files, folders of `Dataset.save_to_disk`, and data sets of the hub.
Every problem is a UserError with the file and, where there is one, the line or row.
"""

import csv
import io
import json
import re
from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from pipeline.errors import UserError, first_line, install_command

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LINE_BYTES = 2**20  # a tokenizer needs up to about 350 bytes of memory per byte of text
# a list cannot be split between processes or read from its middle: larger data has other forms
MAX_JSON_BYTES = 2**30
CHUNK = 2**16
# Bytes that a compressed file may become: a GiB, or 200 times its own. Text becomes 3 to 20 times
# as long.
MAX_UNPACKED, MAX_RATIO = 2**30, 200
# Bytes that a Parquet column may become in a row group: 64 MiB, or 1000 times its own; and those of
# its dictionary.
MAX_COLUMN, MAX_COLUMN_RATIO, MAX_DICTIONARY = 2**26, 1000, 2**23
TABLE_ROWS = 64  # converted to Python at a time
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SAVED = "dataset_info.json"
HUB_ID = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?:\[(?P<split>[^\[\]]+)\])?",
    flags=re.ASCII,
)
HTML = re.compile(r"\s*<(?:!doctype html|html|head|body)\b", flags=re.IGNORECASE)
# A cell of a .csv file that holds messages as JSON. Other texts that look like JSON stay texts.
TURNS = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')


Batches = Callable[[Path, int], Iterator["pa.RecordBatch"]]  # those behind the first rows


class Row(NamedTuple):
    """`number`: the line where it begins; in a .json list and in a table, the number of the row,
    from 1.

    `value`: the text of a line of .txt, or the row's keys and values.
    """

    number: int
    value: str | dict[str, Any]


def _raise(row: int, error: UserError) -> None:  # noqa: ARG001
    raise error


@dataclass
class Reading:
    """What a reading counts. `on_error(row, error)` is called for a bad row: if it does not raise,
    the row is skipped.

    What makes the rest of a file unreadable is raised all the same.
    """

    on_error: Callable[[int, UserError], None] = _raise
    refused: int = 0  # rows
    blank: int = 0  # lines that were skipped
    format: str = ""  # of the last row
    unused: Counter[str] = field(default_factory=Counter)  # key that no format reads → rows

    def refuse(self, row: int, error: UserError) -> None:
        self.refused += 1
        self.on_error(row, error)


def read_rows(path: Path, name: str, reading: Reading | None = None) -> Iterator[Row]:
    """The rows of a file or folder; of the hub's data set `name` if `path` does not exist and
    `name` is an id of one.

    `name` is the path as the user wrote it. Raises UserError.
    """
    reading = reading or Reading()
    suffix, compression = suffix_of(path)
    try:
        if suffix not in READERS and not path.exists() and is_hub_id(name):
            rows = _hub_rows(name)
        elif path.is_dir():
            rows = _saved_rows(path, name)
        elif suffix in TABLES and not compression:
            rows = _table_rows(path, name, TABLES[suffix])
        elif suffix in READERS:
            if suffix == ".json" and path.stat().st_size > MAX_JSON_BYTES:
                raise _too_large(name)
            with _opened(path, name, compression) as file:
                yield from _refuse_empty(READERS[suffix](file, name, reading), name, reading)
            return
        else:
            raise UserError(
                f"{name}: a data file must be {', '.join([*READERS, *TABLES])}, or a save_to_disk "
                "folder."
            )
        yield from _refuse_empty(rows, name, reading)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{name}: {reason}. Name a file that exists.") from None


def suffix_of(path: Path) -> tuple[str, str]:
    """(".jsonl", "gzip") of mine.JSONL.gz, (".txt", "") of mine.txt."""
    compression = COMPRESSED.get(path.suffix.lower(), "")
    return (Path(path.stem) if compression else path).suffix.lower(), compression


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub data set: org/name, org/name@revision,
    org/name[split].
    """
    return bool(HUB_ID.fullmatch(name)) and suffix_of(Path(name))[0] not in (*READERS, *TABLES)


def _refuse_empty(rows: Iterator[Row], name: str, reading: Reading) -> Iterator[Row]:
    first = next(rows, None)
    if first is None and not reading.refused:
        raise UserError(f"{name}: the file is empty. Write one example per line or row.")
    return chain([first] if first else [], rows)


@contextmanager
def _opened(path: Path, name: str, compression: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed piece by piece. Raises UserError for broken compression."""
    if not compression:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow as pa

    with path.open("rb"):  # for its error, which is shorter than pyarrow's
        pass
    try:
        most = max(MAX_UNPACKED, MAX_RATIO * path.stat().st_size)
        with io.BufferedReader(
            _Unpacked(pa.input_stream(str(path), compression=compression), most, name), CHUNK
        ) as file:
            yield file
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


def read_piece(file: BinaryIO) -> bytes:
    """The next line with its end, or the beginning of one that is too long."""
    return file.readline(MAX_LINE_BYTES + 3)  # +2 for \r\n, +1 to detect more


def is_too_long(raw: bytes) -> bool:
    return len(raw.removesuffix(b"\n").removesuffix(b"\r")) > MAX_LINE_BYTES


def decode_line(raw: bytes, number: int, start: int, name: str) -> str:
    """A line as text; `start` is its first byte in the file. Raises UserError if it is long, binary
    or not UTF-8.
    """
    # a long line cannot be cut before it is tokenized: the text behind the cut may change the
    # tokens
    if is_too_long(raw):
        raise UserError(
            f"{name}:{number}: a line must have at most {MAX_LINE_BYTES:,} bytes, got more. "
            "Split its text into several lines."
        )
    try:
        line = raw.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        byte = start + error.start
        raise UserError(
            f"{name}:{number}: not UTF-8 (byte {byte}). Save the file as UTF-8 text."
        ) from None
    if "\0" in line:
        raise UserError(
            f"{name}:{number}: not a text file: byte {start + raw.index(0)} is zero. Save it as "
            "UTF-8 text."
        )
    return line


def skip_blank_lines(file: BinaryIO, blank: bytes | None = None) -> tuple[int, int]:
    """Skip the blank lines that come next, which may be millions. Returns how many, and their
    bytes.

    `blank`: the characters that they consist of, by default all white space.
    """
    assert isinstance(file, io.BufferedReader)
    lines = size = 0
    while ahead := file.peek():
        end = ahead.rfind(b"\n", 0, len(ahead) - len(ahead.lstrip(blank))) + 1
        if not end:
            break
        file.read(end)
        lines, size = lines + ahead.count(b"\n", 0, end), size + end
    return lines, size


class _Lines:
    """Numbered lines with their line ends, as text. Raises UserError for a line that is long,
    binary or not UTF-8.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self.number = self._start = 0  # lines that were read or skipped, and their bytes

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> tuple[int, str]:
        if not (raw := read_piece(self._file)):
            raise StopIteration
        self.number += 1
        line = decode_line(raw, self.number, self._start, self._name)
        self._start += len(raw)
        return self.number, line

    def skip_blank(self, blank: bytes | None = None) -> int:
        """As `skip_blank_lines`; returns how many."""
        count, size = skip_blank_lines(self._file, blank)
        self.number, self._start = self.number + count, self._start + size
        return count


def _filled_lines(file: BinaryIO, name: str, reading: Reading) -> Iterator[tuple[int, str]]:
    """The numbered lines that are not blank; the blank ones before them are counted."""
    lines, waiting = _Lines(file, name), 0  # blank lines at the end of the file are of no interest
    for number, line in lines:
        if not line.strip():
            waiting += 1 + lines.skip_blank()
            continue
        reading.blank, waiting = reading.blank + waiting, 0
        yield number, line


def _text_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    """One text per line. Only a newline ends a line; all other white space belongs to the text."""
    for number, line in _filled_lines(file, name, reading):
        yield row_of_text(number, line)


def row_of_text(number: int, line: str) -> Row:
    # Windows editors end lines with \r\n. A \r anywhere else is part of the text.
    return Row(number, line.removesuffix("\r\n" if line.endswith("\r\n") else "\n"))


def _jsonl_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    """One JSON object per line."""
    for number, line in _filled_lines(file, name, reading):
        try:
            row = row_of_json(number, line, name)
        except UserError as error:
            if HTML.match(line):  # so is the rest of it
                raise
            reading.refuse(number, error)
            continue
        yield row


def row_of_json(number: int, line: str, name: str) -> Row:
    """The row of a line of .jsonl. Raises UserError."""
    try:
        value = json.loads(line.removesuffix("\n"), object_pairs_hook=_reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        raise _not_json(
            f"{name}:{number}", error, line, "Write one JSON object per line."
        ) from None
    return _object_row(number, value, name)


def _not_json(location: str, error: Exception, text: str, advice: str) -> UserError:
    if HTML.match(text):
        return _html(location)
    reason = (
        f"{error.msg} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)[:200]
    )
    return UserError(f"{location}: not JSON: {reason}. {advice}")


def _html(location: str) -> UserError:
    return UserError(f"{location}: this is an HTML page, not data. Download the file itself.")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("duplicate key")
    return record


def _object_row(number: int, value: Any, name: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(
            f'{name}:{number}: must be a JSON object, such as {{"text": …}} or {{"messages": […]}}, got '
            f"{describe_type(value)}."
        )
    return Row(number, value)


def describe_type(value: Any) -> str:
    """The JSON type of a value; null, true, false, [] and {} as they are."""
    if value is None or isinstance(value, bool) or value in ([], {}):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _json_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    """The objects of a JSON list, decoded one by one from a buffer that holds little more than one
    of them.
    """
    scan = json.JSONDecoder(object_pairs_hook=_reject_duplicate_keys).raw_decode
    text = _TextBuffer(file, name)
    if not text.peek():
        return
    if text.peek() != "[":
        advice = "Write the objects as a list, or one per line in a .jsonl file."
        if text.peek() == "{":
            raise UserError(
                f"{name}: a .json file must hold a list of objects, got one object. {advice}"
            )
        raise _not_json(name, ValueError("it does not begin with ["), text.data, advice)
    text.position += 1
    number, ended = 0, text.peek() == "]"
    text.position += ended
    while not ended:
        number += 1
        text.peek()  # skips white space
        while True:
            try:
                value, stop = scan(text.data, text.position)
                break
            except (ValueError, RecursionError) as error:
                # Half an object is no JSON either: decide when there is no more to read, or too
                # much was read.
                if isinstance(error, RecursionError) or not text.read_more():
                    raise _not_json(
                        f"{name}: row {number}", error, "", "Write a list of JSON objects."
                    ) from None
                if len(text.data) - text.position > MAX_LINE_BYTES + CHUNK:
                    raise UserError(
                        f"{name}: row {number}: not JSON, or more than {MAX_LINE_BYTES:,} "
                        "characters. Split its text "
                        "into several rows."
                    ) from None
        text.position = stop
        mark = text.peek()
        if mark not in (",", "]"):
            got = repr(mark) if mark else "the end of the file"
            raise UserError(
                f"{name}: row {number} must be followed by a comma or ], got {got}. Is the file "
                "complete?"
            )
        text.position += 1
        ended = mark == "]"
        try:
            row = _object_row(number, value, name)
        except UserError as error:
            reading.refuse(number, error)
            continue
        yield row
    if rest := text.peek():
        raise UserError(
            f"{name}: {rest!r} after the end of the list. A .json file must hold one list."
        )


class _TextBuffer:
    """UTF-8 text that is read as it is needed; what lies before `position` is dropped."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.data, self.position = "", 0
        self._file, self._name, self._bytes = file, name, 0
        self._decode = getincrementaldecoder("utf-8-sig")().decode

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            match = JSON_SPACE.match(self.data, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self.data):
                return self.data[self.position]
            if not self.read_more():
                return ""

    def read_more(self) -> bool:
        """Append a piece as long as what is left, so that a long object is scanned few times. False
        at the end.
        """
        left = len(self.data) - self.position
        raw = self._file.read(max(CHUNK, left))
        self._bytes += len(raw)
        if self._bytes > MAX_JSON_BYTES:
            raise _too_large(self._name)
        try:
            self.data = self.data[self.position :] + self._decode(raw, not raw)
        except UnicodeDecodeError as error:
            byte = self._bytes - len(raw) + error.start
            raise UserError(
                f"{self._name}: not UTF-8 (near byte {byte}). Save the file as UTF-8 text."
            ) from None
        self.position = 0
        return bool(raw)


JSON_SPACE = re.compile(r"[ \t\r\n]*")


def _too_large(name: str) -> UserError:
    return UserError(
        f"{name}: a .json file must have at most {MAX_JSON_BYTES // 2**30} GiB. Save it as .jsonl "
        "or .parquet instead."
    )


def _delimited_rows(file: BinaryIO, name: str, reading: Reading, delimiter: str) -> Iterator[Row]:
    """Rows under a header, each with a text for every column. A cell may hold turns or tools as
    JSON.
    """
    size, numbered = 0, _Lines(file, name)

    def lines() -> Iterator[str]:
        nonlocal size
        for at, line in numbered:
            size += len(line)
            if size > MAX_LINE_BYTES:  # of a row, whose texts may have many lines
                raise UserError(
                    f"{name}:{at}: a row must have at most {MAX_LINE_BYTES:,} characters, got "
                    "more. Is a quote not "
                    "closed? Otherwise split its text into several rows."
                )
            yield line

    # of the process: nothing else here reads csv with long fields
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        number, size = numbered.number + 1, 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{name}:{number}: {error}. Quote texts that contain quotes, {delimiter!r} or "
                "line breaks."
            ) from None
        if cells is None:
            break
        if not header:
            header = _read_header(cells, name, number)
        elif not cells:
            reading.blank += 1 + numbered.skip_blank(b"\r\n")
        elif len(cells) != len(header):
            ragged = (
                f"{name}:{number}: {len(cells)} values, but the header has {len(header)} columns. "
                "Quote texts that "
                f"contain {delimiter!r}, quotes or line breaks."
            )
            reading.refuse(number, UserError(ragged))
        else:
            yield Row(number, dict(zip(header, map(_read_cell, cells), strict=True)))


def _read_header(cells: list[str], name: str, number: int) -> list[str]:
    header = [cell.strip() for cell in cells]
    if HTML.match("".join(header)):
        raise _html(f"{name}:{number}")
    if not all(header) or len(set(header)) < len(header):
        raise UserError(
            f"{name}:{number}: the first line must name every column, each name once, got "
            f"{', '.join(map(repr, header))[:200] or 'a blank line'}."
        )
    return header


def _read_cell(cell: str) -> Any:
    if TURNS.match(cell):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def _table_rows(path: Path, name: str, batches: Batches, start: int = 0) -> Iterator[Row]:
    """The rows of an Arrow or Parquet file behind the first `start`. Raises UserError for a damaged
    one.
    """
    import pyarrow as pa

    with path.open("rb") as file:  # for its error, which is shorter than pyarrow's
        head = file.read(CHUNK)
    if HTML.match(head.decode("latin-1")):
        raise _html(name)
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
    """A table has every key in every struct: those without a value are left out, as in JSON."""
    return {
        key: _without_nulls(part) if isinstance(part, list | dict) else part
        for key, part in value.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def table_rows(path: Path, name: str, start: int = 0) -> Iterator[Row]:
    """The rows of a table behind the first `start`, which are not decoded. Raises UserError."""
    try:
        yield from _table_rows(path, name, TABLES[suffix_of(path)[0]], start)
    except OSError as error:
        raise UserError(
            f"{name}: {error.strerror or first_line(error)}. Name a file that exists."
        ) from None


def count_table_rows(path: Path, name: str) -> int:
    """The number of rows of a table, from its metadata. Raises UserError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if suffix_of(path)[0] == ".parquet":
            with parquet.ParquetFile(path) as file:
                return int(file.metadata.num_rows)
        with pa.memory_map(str(path)) as source:
            return sum(batch.num_rows for batch in _arrow_reader(source))
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{name}: cannot be read: {reason}. Download or write it again.") from None


def _behind(batches: Iterator["pa.RecordBatch"], start: int) -> Iterator["pa.RecordBatch"]:
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
    """Raises UserError for a column that unpacks to far more than its size, and for a large
    dictionary of texts.

    A row refers to an entry of the dictionary, which writers keep at 1 MiB: 64 rows of a large one
    are 64 copies.
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
                    if (size := _page_size(file.read(24))) > MAX_DICTIONARY:
                        limit = f"{MAX_DICTIONARY:,} bytes, got {size:,}"
                        raise UserError(
                            f"{where} must have a dictionary of at most {limit}. {advice}"
                        )


def _page_size(header: bytes) -> int:
    """The bytes that a Parquet page unpacks to, by the begin of its header: Thrift's fields 1,
    type, and 2, size.
    """
    position = 0
    for _ in ("type", "size"):
        if header[position : position + 1] != b"\x15":  # the next field, of 32 bits
            return 0  # damaged, which pyarrow reports
        value, shift, position = 0, 0, position + 1
        while position < len(header):
            value |= (header[position] & 127) << shift
            shift, position = shift + 7, position + 1
            if header[position - 1] < 128:
                break
    return value >> 1  # zigzag, of a number that is not negative


def _arrow_batches(path: Path, start: int) -> Iterator["pa.RecordBatch"]:
    """Of the file format (Feather) and of the stream format, which `datasets` writes."""
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


def _saved_rows(folder: Path, name: str) -> Iterator[Row]:
    """The rows of a folder of `Dataset.save_to_disk`; the split `train` of a `DatasetDict`'s."""
    advice = "Name a file, or a folder of `Dataset.save_to_disk`."
    if (folder / "dataset_dict.json").is_file():
        splits = _read_small_json(folder / "dataset_dict.json", name).get("splits")
        if not isinstance(splits, list) or "train" not in splits:
            raise UserError(
                f"{name}: a DatasetDict without the split train. It has: "
                f"{', '.join(map(str, splits or []))}. Name the "
                "folder of one split."
            )
        folder = folder / "train"
    if not (folder / "state.json").is_file():
        raise UserError(f"{name}: this folder is no data set: it has no state.json. {advice}")
    parts = _read_small_json(folder / "state.json", name).get("_data_files")
    files = (
        [str(part.get("filename")) for part in parts if isinstance(part, dict)]
        if isinstance(parts, list)
        else []
    )
    if not files or any(Path(file).name != file for file in files):
        raise UserError(f"{name}: its state.json names no data files in the folder. {advice}")
    rows = (
        row
        for file in files
        for row in _table_rows(folder / file, f"{name}/{file}", _arrow_batches)
    )
    yield from (Row(number, row.value) for number, row in enumerate(rows, 1))


def _read_small_json(path: Path, name: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            tree = json.loads(file.read(MAX_LINE_BYTES))
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{name}: {path.name} is not JSON. Save the data set again.")
    return tree


def _hub_rows(name: str) -> Iterator[Row]:
    """The rows of a data set of the hub, from the cache of `datasets` or downloaded into it."""
    match = HUB_ID.fullmatch(name)
    assert match is not None
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name}: no such file, and data sets of the hub need the datasets library. Run "
            f"`{install_command('datasets')}`, or name a file that exists."
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    split = match["split"]
    try:
        loaded = datasets.load_dataset(match["name"], revision=match["revision"], split=split)
    except Exception as error:  # whatever the library raises
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"{name}: no such file, and it cannot be loaded from the hub: {reason}. Check the "
            "name and the connection, "
            "or name a file that exists."
        ) from None
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise UserError(
                f"{name}: it has no split train. Name one: "
                f"{', '.join(f'{name}[{key}]' for key in loaded)}."
            )
        loaded = loaded["train"]
    number = 0
    for table in loaded.with_format("arrow").iter(batch_size=TABLE_ROWS):
        for value in table.to_pylist():
            number += 1
            yield Row(number, _row_of_table(value))


def _csv_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    return _delimited_rows(file, name, reading, ",")


def _tsv_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    return _delimited_rows(file, name, reading, "\t")


READERS: dict[str, Callable[[BinaryIO, str, Reading], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _tsv_rows,
}
TABLES: dict[str, Batches] = {
    ".parquet": _parquet_batches,
    ".arrow": _arrow_batches,
    ".feather": _arrow_batches,
}
