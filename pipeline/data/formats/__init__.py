"""Data files as examples, row by row in constant memory, and the shapes that a row may have.

Each shape is one file here with its `FORMAT`; they are asked in their order. Every problem is a
UserError with file and line or row.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.columns import rename, some
from pipeline.data.containers import MAX_LINE_BYTES, Reading, Row, describe_type, read_rows
from pipeline.data.examples import Example
from pipeline.errors import UserError
from pipeline.extensions import Registry

Note = Callable[[str], None]
Record = Mapping[str, Any]  # the keys and values of a row
SIMILAR = 0.85  # of a key to one that is missing: "compleation", but not "prompt_id"
MAX_UNUSED = 1000  # keys that are counted


class EmptyValue(UserError):
    """A text or a list without content where there must be some."""


class CannotHold(Exception):
    """Why a format cannot hold an example."""


def _reads_only(_example: Example) -> dict[str, Any]:
    raise CannotHold("this format is only read")


class Format(NamedTuple):
    """A shape that rows may have, and how an example is read from it and written in it."""

    order: int
    shape: str  # its keys, for messages
    keys: frozenset[str]  # all that it reads
    detect: Callable[[Record], bool]
    read: Callable[[Record, str, int], Example]  # (record, file, line); raises UserError
    # the record that reads as an example; raises CannotHold. An extension's may read only.
    write: Callable[[Example], dict[str, Any]] = _reads_only
    mixes: bool = False  # whether other rows of a file may have another format that mixes
    trained: str = "the assistant's turns"  # what of it is trained on

    @property
    def name(self) -> str:
        """The name of its module."""
        return self.read.__module__.rpartition(".")[2]


def read_examples(path: Path, name: str, **options: Any) -> list[Example]:
    """All of `iter_examples`."""
    return list(iter_examples(path, name, **options))


def iter_examples(
    path: Path,
    name: str,
    prompts: bool = False,
    columns: Mapping[str, str] | None = None,
    on_note: Note | None = None,
    reading: Reading | None = None,
    templated: bool = True,
) -> Iterator[Example]:
    """The examples of a file or folder, in constant memory.

    `name` is the path as the user wrote it. With `prompts`, a row may also be {"prompt"} alone, for
    the model itself to complete. `columns`: key of a format → the file's name for it. `on_note`
    gets, at the end, what was skipped or not used; `reading` counts it. `templated`: whether a
    plain prompt and its answer are turns where the base has a chat template. Raises UserError with
    the file, the line or row, and the reason.
    """
    columns, reading = columns or {}, reading or Reading()
    first: tuple[Format, int] | None = None  # format and number of the first row
    for row in read_rows(path, name, reading):
        if isinstance(row.value, str):
            if columns:
                raise UserError(f"{name}: columns are set, but a .txt file has none. Remove them.")
            reading.format = "text"
            yield Example(row.value, name, row.number)
            continue
        try:
            format_, record, unused = _recognize(row.number, row.value, name, columns, not first)
            # where every row has other keys, only the first keys are counted
            is_full = len(reading.unused) >= MAX_UNUSED
            reading.unused.update(key for key in unused if not is_full or key in reading.unused)
            first = first or (format_, row.number)
            if format_ is not first[0] and not (format_.mixes and first[0].mixes):
                raise UserError(
                    f"{name}:{row.number}: this row is {format_.shape}, but {name}:{first[1]} is "
                    f"{first[0].shape}. Put them into two files."
                )
            example = _read(format_, record, name, row.number, templated)
            if example.prompt == example.text and not prompts:
                raise UserError(
                    f'{example.location}: "prompt" needs a "completion". Add one, or use '
                    '{"text": …} to train on the whole line. Only finetune_lora.retention_data '
                    "takes prompts alone: the base model completes them."
                )
        except UserError as error:
            reading.refuse(row.number, error)
            continue
        reading.format = format_.name
        yield example
    if on_note:
        for note in notes(name, reading):
            on_note(note)


def example_of(
    row: Row, name: str, columns: Mapping[str, str] | None = None, templated: bool = True
) -> Example:
    """The example of one row, by itself; its prompt may stand alone.

    Raises UserError, as `iter_examples`, which also compares the formats of rows.
    """
    if isinstance(row.value, str):
        return Example(row.value, name, row.number)
    format_, record, _ = _recognize(row.number, row.value, name, columns or {}, is_first=False)
    return _read(format_, record, name, row.number, templated)


def _recognize(
    number: int, row: dict[str, Any], name: str, columns: Mapping[str, str], is_first: bool
) -> tuple[Format, Record, list[str]]:
    """The format of a row, its record with that format's keys, and the keys that are not used."""
    location = f"{name}:{number}"
    record, unused_in_turns = rename(row, columns, location, is_first)
    format_ = _detect(record, columns, location)
    unused = record.keys() - format_.keys
    _refuse_similar(unused, format_.keys - record.keys(), location)
    return format_, record, [*sorted(unused_in_turns), *sorted(unused)]


def _read(format_: Format, record: Record, name: str, number: int, templated: bool) -> Example:
    example = format_.read(record, name, number)
    # Neither a pair without a prompt, which does not say where the user's turn ends, nor a prompt
    # alone, which is a text to be continued.
    has_texts = isinstance(record.get("prompt"), str) and not example.messages
    if templated and has_texts and example.prompt != example.text:
        return replace(example, templated=True)
    return example


def notes(name: str, reading: Reading) -> Iterator[str]:
    """What was skipped or not used in a file."""
    if reading.blank:
        yield f"{name}: {_count(reading.blank, 'blank line')} skipped"
    if reading.unused:
        counts = [f"{key} ({_count(rows, 'row')})" for key, rows in reading.unused.most_common()]
        yield f"{name}: not used: {some(counts)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _detect(record: Record, columns: Mapping[str, str], location: str) -> Format:
    """The format of a record, by the keys that the user named, otherwise by all keys."""
    named = {key: record[key] for key in columns if key in record}
    for part in [named, record] if columns else [record]:
        for format_ in FORMATS.values():
            if format_.detect(part):
                return format_
    known = set[str]().union(*(format_.keys for format_ in FORMATS.values()))
    _refuse_similar(record.keys() - known, known - record.keys(), location)
    *others, last = (format_.shape for format_ in FORMATS.values())
    shapes = f"{', '.join(others)} or {last}"
    raise UserError(
        f"{location}: the keys must be {shapes}, got {some(map(repr, record)) or 'none'}. Rename "
        "them, or say which is which in columns, such as --columns "
        "prompt=question,completion=answer or messages=dialog."
    )


def _refuse_similar(keys: Set[str], missing: Set[str], location: str) -> None:
    """Raises UserError if one of `keys` is nearly one that is missing."""
    for key in sorted(keys, key=str):
        if close := get_close_matches(str(key)[:60].lower(), [*missing], 1, SIMILAR):
            raise UserError(
                f"{location}: unknown key {key!r}. Did you mean {close[0]!r}? Rename it."
            )


def read_string(record: Record, key: str, location: str) -> str:
    """A text that is not empty. Raises UserError."""
    value = record.get(key)
    if not isinstance(value, str):
        kind = EmptyValue if value is None else UserError
        raise kind(f"{location}: {key} must be a string, got {describe_type(value)}.")
    if not value.strip():
        raise EmptyValue(f"{location}: {key} is empty. Fill it in, or remove the line.")
    if len(value) > MAX_LINE_BYTES:  # in a table: lines of text were measured as they were read
        raise UserError(
            f"{location}: {key} must have at most {MAX_LINE_BYTES:,} characters. Split its text."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{location}: {key} contains an unpaired surrogate, which is not a character. Remove "
            "it."
        ) from None
    return value


def read_optional(record: Record, key: str, location: str) -> str:
    """A text; "" if it is missing, null or blank. Raises UserError."""
    value = record.get(key)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else read_string(record, key, location)


def read_list(record: Record, key: str, location: str, of: str = "") -> list[Any]:
    """A list, which may be written as JSON in a text; [] if it is missing or null.

    With `of`, a missing or empty list is an error. Raises UserError.
    """
    value = record.get(key)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = record[key]
    if isinstance(value, list) and (value or not of):
        return value
    if value in (None, "") and not of:
        return []
    kind = EmptyValue if value in (None, "", []) else UserError
    raise kind(f"{location}: {key} must be a list{of and f' of {of}'}, got {describe_type(value)}.")


def refuse_unknown(entry: Record, known: Sequence[str], location: str) -> None:
    """Raises UserError for a key that is not `known`."""
    if unknown := [key for key in entry if key not in known]:
        _refuse_similar(set(unknown), set(known), location)
        raise UserError(f"{location}: unknown key {unknown[0]!r:.80}. Known: {', '.join(known)}.")


FORMATS = Registry[Format]("data_format", order=lambda form: form.order)
