"""Data files in another format and container.

Nothing is lost in silence: what the target cannot hold is refused, what is left out is counted, and
the file is read again, example by example, before it gets its name.
"""

import csv
import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.data.containers import COMPRESSED, Reading, suffix_of
from pipeline.data.containers.rows import row_of_error
from pipeline.data.examples import Example, Message
from pipeline.data.formats import FORMATS, CannotHold, iter_examples, notes
from pipeline.data.formats.messages import refuse_more_than_texts, text_of
from pipeline.errors import UserError, first_line
from pipeline.files import artifact
from pipeline.files.problems import Group, Problem, Problems, shortened, without_location

Record = dict[str, Any]
_dump = partial(json.dumps, ensure_ascii=False)
GROUP_ROWS = 1024  # of a table: what a reader must hold at once
PROGRESS_ROWS = 256
OF_MESSAGES = ("messages", "alpaca", "sharegpt")
CHOICES = (*OF_MESSAGES, "prompt_completion", "text")


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    rows: int
    format: str  # "mixed" if the rows are of several
    notes: tuple[str, ...]  # what was left out or changed in kind
    skipped: tuple[Group, ...] = ()  # rows that could not be taken, alike ones together


def convert(
    source: Path,
    out: Path,
    format_: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    force: bool = False,
    skip_invalid: bool = False,
    keep: Callable[[int], bool] = lambda _: True,
    progress: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the examples of `source` to `out`, whose name says the container.

    `source`: a file, a folder or an id of the hub. `format_`: one of those of `lora data convert
    --format`; by default rows stay in their own. `columns` as for `iter_examples`.
    `skip_invalid`: leave out what cannot be read or written, instead of raising it. `keep`: whether
    the row of this number is written; of others no error counts. Raises UserError, and then `out`
    is as before.
    """
    suffix, compression = suffix_of(out)
    if suffix not in WRITERS or (compression and suffix in TABLES):
        compressible = ", ".join(name for name in WRITERS if name not in TABLES)
        raise UserError(
            f"{out}: the name must end in {', '.join(WRITERS)}; {compressible} also with "
            f"{' or '.join(COMPRESSED)}. Rename it."
        )
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"{out} is the input itself. Name another file.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name a file.")
    if out.exists() and not force:
        raise UserError(f"{out} exists. Name another file, or replace it with --force.")
    rows = _Rows(source, format_, columns, suffix == ".txt", skip_invalid, keep, progress)
    try:
        with artifact.beside(out) as folder:
            new = folder / out.name  # which says what it is to those that read it again
            with _opened(new, compression) as file:
                WRITERS[suffix](file, rows)
            if not rows.numbers:
                first = "".join(f" {group}" for group in rows.skipped.groups()[:1])
                raise UserError(f"{source}: no row is left to write.{first}")
            _verify(new, out, rows)
            with new.open("rb") as written:
                os.fsync(written.fileno())
            with suppress(OSError):  # no `out` yet, or a file system without permissions
                new.chmod(out.stat().st_mode)
            new.replace(out)
    except OSError as error:  # what is wrong with the input is a UserError
        raise OSError(error.errno, error.strerror or str(error), str(out)) from None
    format_written = rows.formats.pop() if len(rows.formats) == 1 else "mixed"
    return Conversion(len(rows.numbers), format_written, tuple(rows.notes()), rows.skipped.groups())


@dataclass
class _Rows:
    """The records to write. Iterated again, the file is read again."""

    source: Path
    format: str | None
    columns: Mapping[str, str] | None
    texts_only: bool
    skip_invalid: bool
    keep: Callable[[int], bool]
    progress: Callable[[int], None] | None

    def __post_init__(self) -> None:
        self.name = str(self.source)
        self.reading = Reading(self._refuse)
        self.skipped = Problems()
        self.formats: set[str] = set()
        # of each example: its row, and 16 bytes
        self.numbers, self.digests = array("q"), bytearray()
        self._changed: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Record]:
        self.__post_init__()
        for example in iter_examples(
            self.source, self.name, columns=self.columns, reading=self.reading
        ):
            if not self.keep(example.line):
                continue
            format_ = self.format or self.reading.format
            if example.desirable is False and format_ != self.reading.format:
                self._changed["answers labelled false left out"] += 1
                continue
            try:
                if self.texts_only:
                    _refuse_in_txt(example, format_)
                written = self._as_kind_of(example, format_)
                record = FORMATS[format_].write(written)
            except CannotHold as reason:
                error = UserError(
                    f"{example.location}: cannot be written as {format_}: {reason}. Name another "
                    "--format, or leave the row out with --skip-invalid."
                )
                self._refuse(example.line, error)
                continue
            except UserError as error:
                self._refuse(example.line, error)
                continue
            if example.rejected is not None and written.rejected is None:
                self._changed["rejected answers left out"] += 1
            self.formats.add(format_)
            self.numbers.append(example.line)
            self.digests += digest(written)
            if self.progress and len(self.numbers) % PROGRESS_ROWS == 0:
                self.progress(len(self.numbers))
            yield record

    def _refuse(self, row: int, error: UserError) -> None:
        """Raises the error of a row that is to be written, or counts the row as skipped."""
        if not self.keep(row):
            return
        if not self.skip_invalid:
            raise error from None
        text = shortened(without_location(error, self.name, row))
        self.skipped.add("skipped", "warning", 0, Problem(row, self.name, text, "warning"))

    def _as_kind_of(self, example: Example, format_: str) -> Example:
        """The example without what `format_` is not for, and as turns or texts as it needs."""
        if example.rejected is not None and format_ != "preference":
            example = replace(example, rejected=None)
        if format_ != "unpaired_preference":
            example = replace(example, desirable=None)
        if format_ in OF_MESSAGES and not example.messages:
            if not (example.prompt or "").strip():
                raise CannotHold("it has no prompt that an assistant could answer")
            change = "prompts with completions written as turns, which get a chat template"
            self._changed[change] += 1
            turns: tuple[Message, ...] = (
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.completion},
            )
            return replace(example, text=text_of(turns), prompt=None, messages=turns)
        if format_ == "prompt_completion" and example.messages:
            if [message["role"] for message in example.messages] != ["user", "assistant"]:
                raise CannotHold("it is not one question of a user and one answer")
            refuse_more_than_texts(example)
            change = "conversations written as prompt and completion, which get no chat template"
            self._changed[change] += 1
            question, answer = (str(message["content"]) for message in example.messages)
            return replace(example, text=question + answer, prompt=question, messages=())
        return example

    def notes(self) -> Iterator[str]:
        yield from notes(self.name, self.reading)
        for change, count in self._changed.items():
            yield f"{self.name}: {change}: {count:,}"


def _refuse_in_txt(example: Example, format_: str) -> None:
    """Raises UserError for what no line of a .txt file can be."""
    if format_ != "text":
        raise UserError(
            f"{example.location}: a .txt file holds texts alone, and this row is written as "
            f"{format_}. Name another file, such as one that ends in .jsonl."
        )
    is_text = not example.messages and example.prompt is None
    if is_text and ("\n" in example.text or example.text.endswith("\r")):
        raise UserError(
            f"{example.location}: the text has several lines, and a line of .txt is a text. Use "
            ".jsonl."
        )


def digest(example: Example) -> bytes:
    """16 bytes of all that an example is trained by, the order of keys included."""
    parts = [
        example.text,
        example.prompt,
        example.messages,
        sorted(example.untrained),
        example.tools,
        example.rejected,
        example.desirable,
    ]
    return sha256(json.dumps(parts).encode()).digest()[:16]


def _verify(new: Path, out: Path, rows: _Rows) -> None:
    """Raises UserError unless the written file holds the examples."""
    same = 0  # examples that were read again
    reason = ""
    try:
        for example in iter_examples(new, str(out)):
            if digest(example) != rows.digests[16 * same : 16 * (same + 1)]:
                break
            same += 1
        else:
            if same == len(rows.numbers):
                return
    except UserError as error:
        why = without_location(error, str(out), row_of_error(error, str(out)))
        reason = f" ({why.removesuffix('.').partition('. ')[0]})"  # without its advice
    row = rows.numbers[min(same, len(rows.numbers) - 1)]
    raise UserError(
        f"{rows.name}:{row}: {out.name} would not give the same example again{reason}. Name "
        "another container, such as .jsonl, or another --format."
    )


@contextmanager
def _opened(path: Path, compression: str) -> Iterator[BinaryIO]:
    if not compression:
        with path.open("wb") as file:
            yield file
        return
    import pyarrow as pa

    with (
        pa.output_stream(str(path), compression=compression) as stream,
        io.BufferedWriter(stream) as file,
    ):
        yield file


def _write_jsonl(file: BinaryIO, rows: _Rows) -> None:
    file.writelines(_dump(record).encode() + b"\n" for record in rows)


def _write_json(file: BinaryIO, rows: _Rows) -> None:
    for number, record in enumerate(rows):
        file.write((b",\n" if number else b"[\n") + _dump(record).encode())
    file.write(b"\n]\n")


def _write_txt(file: BinaryIO, rows: _Rows) -> None:
    for record in rows:
        file.write(record["text"].encode() + b"\n")


def _write_csv(file: BinaryIO, rows: _Rows, delimiter: str = ",") -> None:
    columns = list(_columns(rows))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, delimiter=delimiter)  # with \r\n, as RFC 4180
    writer.writerow(columns)
    for record in rows:
        writer.writerow([_as_cell(record.get(key, "")) for key in columns])
    text.flush()
    text.detach()  # the file is closed by its owner


def _as_cell(value: Any) -> str:
    return value if isinstance(value, str) else _dump(value)


def _columns(rows: _Rows) -> dict[str, set[str]]:
    """The keys of all records, and for a list of turns the keys in them.

    Raises UserError for rows of two formats.
    """
    columns: dict[str, set[str]] = {}
    for record in rows:
        if len(rows.formats) > 1:
            raise UserError(
                f"{rows.name}:{rows.numbers[-1]}: rows of {' and '.join(sorted(rows.formats))} do "
                "not fit into one table. Write a .jsonl file, or name one format with --format."
            )
        for key, value in record.items():
            turns = columns.setdefault(key, set())
            if isinstance(value, list) and key not in ("tools", "history"):
                turns.update(*value)
    return columns


def _write_table(file: BinaryIO, rows: _Rows, container: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([(key, _arrow_type(key, turns)) for key, turns in _columns(rows).items()])
    writers = {
        ".parquet": parquet.ParquetWriter,
        ".arrow": pa.ipc.new_stream,
        ".feather": pa.ipc.new_file,
    }
    records = iter(rows)
    try:
        with writers[container](file, schema) as writer:
            while group := list(islice(records, GROUP_ROWS)):
                cells = [_as_cells(record) for record in group]
                writer.write_batch(pa.RecordBatch.from_pylist(cells, schema))
    except (pa.ArrowException, TypeError) as error:
        raise UserError(
            f"{rows.name}: its rows do not fit into one table: {first_line(error)}. Write a "
            ".jsonl file."
        ) from None


def _arrow_type(key: str, turns: Iterable[str]) -> Any:
    import pyarrow as pa

    if key == "label":
        return pa.bool_()
    if turns:
        order = sorted(turns, key=lambda name: (name not in ("role", "from"), name))
        types = [(name, pa.bool_() if name == "train" else pa.string()) for name in order]
        return pa.list_(pa.struct(types))
    return pa.list_(pa.list_(pa.string())) if key == "history" else pa.string()


def _as_cells(record: Record) -> Record:
    """The record for a table: `tools` and tool calls as JSON, since their keys differ by row."""
    cells = dict(record)
    if "tools" in cells:
        cells["tools"] = _dump(cells["tools"])
    for key, value in record.items():
        if isinstance(value, list) and key not in ("tools", "history"):
            cells[key] = [_with_calls_as_json(turn) for turn in value]
    return cells


def _with_calls_as_json(turn: Record) -> Record:
    if "tool_calls" not in turn:
        return turn
    return {**turn, "tool_calls": _dump(turn["tool_calls"])}


TABLES = (".parquet", ".arrow", ".feather")
WRITERS: dict[str, Callable[[BinaryIO, _Rows], None]] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".txt": _write_txt,
    **{container: partial(_write_table, container=container) for container in TABLES},
}
